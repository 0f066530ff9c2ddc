"""Every op as a Triton kernel. Nothing falls back: what a kernel does not take is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..kernels.attention import attention
from ..kernels.common import RefusalError
from ..kernels.embed import add_rows, embed
from ..kernels.gemm import linear, linear_quantised
from ..kernels.gemm_int4 import Int4Packed, linear_int4, pack_int4
from ..kernels.gemm_int4_float import linear_int4_float
from ..kernels.norm import layer_norm, rms_norm
from ..kernels.patch_embed import patch_embed
from ..kernels.pool import pool, score
from ..kernels.quantise import has_e4m3, quantise_rows, require_form
from ..kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables
from ..ops import Linear, Ops, QuantisedRows, RowFormat, Rows, Weight
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


def _product(x: Rows, layer: Linear, **epilogue: Any) -> Tensor:
    rows = _as_rows(x, layer.rows) if isinstance(x, Tensor) else x
    weight = layer.weight
    if isinstance(weight, Tensor) and isinstance(rows, Tensor):
        return linear(rows, weight, layer.bias, **epilogue)
    if isinstance(weight, Int4Packed) and isinstance(rows, Tensor):
        return linear_int4_float(rows, weight, layer.bias, **epilogue)
    if isinstance(weight, Tensor) or isinstance(rows, Tensor):
        raise RefusalError("linear: quantised rows meet a weight that is not quantised")
    if isinstance(weight, Int4Packed):
        return linear_int4(
            rows.values, rows.scale, weight, layer.bias, dtype=rows.dtype, **epilogue
        )
    return linear_quantised(
        rows.values,
        rows.scale,
        weight.values,
        weight.scale,
        layer.bias,
        dtype=rows.dtype,
        **epilogue,
    )


@_guarded
def _linear(
    x: Rows, layer: Linear, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    return _product(x, layer, activation=activation or "none", residual=residual)


@_guarded
def _gated_linear(x: Rows, layer: Linear, *, rows: RowFormat = "float") -> Rows:
    # A program has a few columns of a row, so the scale of the whole row takes another launch.
    return _as_rows(_product(x, layer, gated=True), rows)


@_guarded
def _rms_norm(x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float") -> Rows:
    return _rows(rms_norm(x, weight, eps, rows), x.dtype)


@_guarded
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, rows: RowFormat = "float"
) -> Rows:
    return _rows(layer_norm(x, weight, bias, eps, rows), x.dtype)


@_guarded
def _patch_embed(
    pixels: Tensor,
    layer: Linear,
    table: Tensor,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
) -> Tensor:
    return patch_embed(pixels, layer.weight, layer.bias, table, grids, merge)


def _rows(made: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Rows:
    return made if isinstance(made, Tensor) else QuantisedRows(*made, dtype)


def _as_rows(x: Tensor, form: RowFormat) -> Rows:
    return x if form == "float" else _rows(quantise_rows(x, form), x.dtype)


class TritonOps(Ops):
    """The table with every entry a Triton kernel."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.keeps = frozenset({"int8", "int4"})
        if has_e4m3(device):
            self.keeps |= {"fp8", "fp8_blocks"}

    prepare = staticmethod(_prepare)
    linear = staticmethod(_linear)
    gated_linear = staticmethod(_gated_linear)
    embed = staticmethod(_guarded(embed))
    rms_norm = staticmethod(_rms_norm)
    layer_norm = staticmethod(_layer_norm)
    mrope_tables = staticmethod(_guarded(mrope_tables))
    vision_rope_tables = staticmethod(_guarded(vision_rope_tables))
    rope = staticmethod(_guarded(rope))
    norm_rope = staticmethod(_guarded(norm_rope))
    attention = staticmethod(_guarded(attention))
    patch_embed = staticmethod(_patch_embed)
    add_rows = staticmethod(_guarded(add_rows))
    pool = staticmethod(_guarded(pool))
    score = staticmethod(_guarded(score))
