"""Every op as a Triton kernel. Nothing falls back: what a kernel does not take is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arena import HEAP, Memory
from ..errors import BackendError
from ..kernels.attention import attention
from ..kernels.common import New, RefusalError, target_of
from ..kernels.embed import add_rows, embed
from ..kernels.gemm import linear, linear_quantised
from ..kernels.gemm_int4 import Int4Packed, linear_int4, pack_int4
from ..kernels.gemm_int4_float import linear_int4_float
from ..kernels.norm import layer_norm, rms_norm
from ..kernels.patch_embed import patch_embed
from ..kernels.pool import pool, score
from ..kernels.quantise import has_e4m3, quantise_rows, require_form
from ..kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables
from ..kernels.vendor import choose_product, vendor_linear
from ..ops import Forest, Linear, Ops, QuantisedRows, RowFormat, Rows, Weight
from ..quant import Fp8BlockWeight, Fp8Weight, Int4Weight, Int8Weight, quantise
from ..quant.weights import FP8_BLOCK


def _guarded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, whose refusals callers get as BackendError."""

    @wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except RefusalError as error:
            raise BackendError(f"backend 'triton' refuses {error}") from error

    return run


@dataclass(frozen=True)
class _Scaled:
    """A weight as :func:`linear_quantised` takes it."""

    values: Tensor
    scale: Tensor


@_guarded
def _prepare(
    parts: Sequence[Weight],
    bias: Tensor | None = None,
    *,
    form: str | None = None,
    group: int = 64,
    weight_only: bool = False,
    gated: bool = False,
) -> Linear:
    made = [
        quantise(p, form, group) if form is not None and isinstance(p, Tensor) else p for p in parts
    ]
    tensors = [part for part in made if isinstance(part, Tensor)]
    if len(tensors) == len(made):
        return Linear(tensors[0] if len(tensors) == 1 else torch.cat(tensors), bias)
    fours = [part for part in made if isinstance(part, Int4Weight)]
    if len(fours) == len(made) and len({four.group for four in fours}) == 1:
        triples = [(four.values(), four.multiplier, four.scale) for four in fours]
        rows: RowFormat = "float" if weight_only else "int8"
        return Linear(pack_int4(triples, fours[0].group), bias, rows)
    wide = [part.widen() if isinstance(part, Int4Weight) else part for part in made]
    eights = [part for part in wide if isinstance(part, Int8Weight)]
    if len(eights) == len(wide):
        values, scale = torch.cat([w.values for w in eights]), torch.cat([w.scale for w in eights])
        return Linear(_Scaled(values, scale), bias, "int8")
    channels = [part for part in made if isinstance(part, Fp8Weight)]
    blocks = [part for part in made if isinstance(part, Fp8BlockWeight)]
    if len(made) in (len(channels), len(blocks)):
        require_form("prepare", "fp8", (channels or blocks)[0].values.device)
        if blocks:
            # A row for each 128 inputs: then parts of any number of outputs can follow another.
            each = [b.scale_inv.repeat_interleave(FP8_BLOCK, 0)[: b.shape[0]] for b in blocks]
            scale = torch.cat(each).T.contiguous()
        else:
            scale = torch.cat([w.scale for w in channels])
        # As bytes: torch concatenates no e4m3.
        values = torch.cat([w.values.view(torch.int8) for w in channels or blocks])
        return Linear(_Scaled(values.view(torch.float8_e4m3fn), scale), bias, "fp8")
    kinds = ", ".join(type(part).__name__ for part in made)
    raise RefusalError(f"prepare: weights of several formats in one linear: {kinds}")


def _product(x: Rows, layer: Linear, memory: Memory, **epilogue: Any) -> Tensor:
    rows = _as_rows(x, layer.rows, memory) if isinstance(x, Tensor) else x
    weight, bias, new = layer.weight, layer.bias, memory.empty
    if isinstance(weight, Tensor) and isinstance(rows, Tensor):
        return _product_of_floats(rows, weight, bias, new, **epilogue)
    if isinstance(weight, Int4Packed) and isinstance(rows, Tensor):
        return linear_int4_float(rows, weight, bias, new=new, **epilogue)
    if isinstance(weight, Tensor) or isinstance(rows, Tensor):
        raise RefusalError("linear: quantised rows meet a weight that is not quantised")
    values, scale, dtype = rows.values, rows.scale, rows.dtype
    if isinstance(weight, Int4Packed):
        return linear_int4(values, scale, weight, bias, dtype=dtype, new=new, **epilogue)
    return linear_quantised(
        values, scale, weight.values, weight.scale, bias, dtype=dtype, new=new, **epilogue
    )


def _product_of_floats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    new: New,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    choice = choose_product(
        target_of(x.device),
        x.dtype,
        len(x),
        activation=activation,
        gated=gated,
        bias=bias is not None,
        residual=residual is not None,
    )
    if choice.vendor:
        return vendor_linear(x, weight, bias, residual=residual, new=new)
    return linear(
        x, weight, bias, activation=activation, gated=gated, residual=residual, out=out, new=new
    )


@_guarded
def _linear(
    x: Rows, layer: Linear, *, activation: str | None = None, memory: Memory = HEAP
) -> Tensor:
    return _product(x, layer, memory, activation=activation or "none")


@_guarded
def _add_linear(y: Tensor, x: Rows, layer: Linear, *, memory: Memory = HEAP) -> None:
    _product(x, layer, memory, residual=y, out=y)


@_guarded
def _gated_linear(
    x: Rows, layer: Linear, *, rows: RowFormat = "float", memory: Memory = HEAP
) -> Rows:
    # A program has a few columns of a row, so the scale of the whole row takes another launch.
    return _as_rows(_product(x, layer, memory, gated=True), rows, memory)


@_guarded
def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float", memory: Memory = HEAP
) -> Rows:
    return _rows(rms_norm(x, weight, eps, rows, new=memory.empty), x.dtype)


@_guarded
def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    rows: RowFormat = "float",
    memory: Memory = HEAP,
) -> Rows:
    return _rows(layer_norm(x, weight, bias, eps, rows, new=memory.empty), x.dtype)


@_guarded
def _embed(ids: Tensor, table: Tensor, *, memory: Memory = HEAP) -> Tensor:
    return embed(ids, table, new=memory.empty)


@_guarded
def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    rope(x, cos, sin, out=x)


@_guarded
def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    norm_rope(x, weight, cos, sin, eps, out=x)


@_guarded
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    *,
    causal: bool,
    scale: float,
    read: NDArray[np.int64] | None = None,
    memory: Memory = HEAP,
) -> Tensor:
    new = memory.empty
    return attention(q, k, v, forest, causal=causal, scale=scale, read=read, new=new)


@_guarded
def _patch_embed(
    pixels: Tensor,
    layer: Linear,
    table: Tensor,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
    *,
    memory: Memory = HEAP,
) -> Tensor:
    return patch_embed(pixels, layer.weight, layer.bias, table, grids, merge, new=memory.empty)


def _rows(made: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Rows:
    return made if isinstance(made, Tensor) else QuantisedRows(*made, dtype)


def _as_rows(x: Tensor, form: RowFormat, memory: Memory) -> Rows:
    return x if form == "float" else _rows(quantise_rows(x, form, new=memory.empty), x.dtype)


class TritonOps(Ops):
    """The table with every entry a Triton kernel."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.keeps = frozenset({"int8", "int4"})
        if has_e4m3(device):
            self.keeps |= {"fp8", "fp8_blocks"}

    allocating = (
        "linear",
        "add_linear",
        "gated_linear",
        "embed",
        "rms_norm",
        "layer_norm",
        "attention",
        "patch_embed",
    )

    prepare = staticmethod(_prepare)
    linear = staticmethod(_linear)
    add_linear = staticmethod(_add_linear)
    gated_linear = staticmethod(_gated_linear)
    embed = staticmethod(_embed)
    rms_norm = staticmethod(_rms_norm)
    layer_norm = staticmethod(_layer_norm)
    mrope_tables = staticmethod(_guarded(mrope_tables))
    vision_rope_tables = staticmethod(_guarded(vision_rope_tables))
    rope = staticmethod(_rope)
    norm_rope = staticmethod(_norm_rope)
    attention = staticmethod(_attention)
    patch_embed = staticmethod(_patch_embed)
    add_rows = staticmethod(_guarded(add_rows))
    pool = staticmethod(_guarded(pool))
    score = staticmethod(_guarded(score))
