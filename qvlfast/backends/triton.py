"""Every op as a Triton kernel. Nothing falls back: what a kernel does not take is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..kernels.activation import gelu_erf, gelu_tanh, swiglu
from ..kernels.attention import attention
from ..kernels.common import RefusalError
from ..kernels.embed import embed
from ..kernels.gemm import linear
from ..kernels.gemm_int8 import linear_int8, quantise_rows
from ..kernels.norm import layer_norm, rms_norm
from ..kernels.patch_embed import patch_embed, resample_positions
from ..kernels.pool import pool, score
from ..kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables
from ..ops import Linear, Ops, QuantisedRows, RowFormat, Rows, Weight
from ..quant import Int4Weight, Int8Weight, quantise


def _guarded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, whose refusals callers get as BackendError."""

    @wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except RefusalError as error:
            raise BackendError(f"backend 'triton' refuses {error}") from error

    return run


@_guarded
def _prepare(
    parts: Sequence[Weight],
    bias: Tensor | None = None,
    *,
    form: str | None = None,
    group: int = 64,
    gated: bool = False,
) -> Linear:
    if form is None and all(isinstance(part, Tensor) for part in parts):
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return Linear(tensors[0] if len(tensors) == 1 else torch.cat(tensors), bias)
    made = [quantise(p, form or "", group) if isinstance(p, Tensor) else p for p in parts]
    wide = [part.widen() if isinstance(part, Int4Weight) else part for part in made]
    eights = [part for part in wide if isinstance(part, Int8Weight)]
    if len(eights) < len(wide):
        raise RefusalError(f"prepare: weights of format {form!r}")
    values, scale = torch.cat([w.values for w in eights]), torch.cat([w.scale for w in eights])
    return Linear(Int8Weight(values, scale), bias, "int8")


@_guarded
def _linear(
    x: Rows, layer: Linear, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    if isinstance(layer.weight, Tensor):
        if not isinstance(x, Tensor):
            raise RefusalError("linear: quantised rows meet a weight that is not quantised")
        y = linear(x, layer.weight, layer.bias, activation=activation or "none")
    else:
        rows = _as_rows(x, "int8")
        assert isinstance(rows, QuantisedRows)
        y = linear_int8(
            rows.values,
            rows.scale,
            layer.weight.values,
            layer.weight.scale,
            layer.bias,
            dtype=rows.dtype,
        )
        if activation is not None:
            y = {"gelu_tanh": gelu_tanh, "gelu_erf": gelu_erf}[activation](y)
    return y if residual is None else residual + y


@_guarded
def _gated_linear(x: Rows, layer: Linear, *, rows: RowFormat = "float") -> Rows:
    gate, up = _linear(x, layer).chunk(2, dim=1)
    return _as_rows(swiglu(gate, up), rows)


@_guarded
def _rms_norm(x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float") -> Rows:
    return _as_rows(rms_norm(x, weight, eps), rows)


@_guarded
def _patch_embed(pixels: Tensor, layer: Linear, positions: Tensor) -> Tensor:
    return patch_embed(pixels, layer.weight, layer.bias, positions)


def _as_rows(x: Rows, form: RowFormat) -> Rows:
    if form == "float" or not isinstance(x, Tensor):
        return x
    values, scale = quantise_rows(x)
    return QuantisedRows(values, scale, x.dtype)


class TritonOps(Ops):
    """The table with every entry a Triton kernel."""

    name = "triton"

    prepare = staticmethod(_prepare)
    linear = staticmethod(_linear)
    gated_linear = staticmethod(_gated_linear)
    embed = staticmethod(_guarded(embed))
    rms_norm = staticmethod(_rms_norm)
    layer_norm = staticmethod(_guarded(layer_norm))
    mrope_tables = staticmethod(_guarded(mrope_tables))
    vision_rope_tables = staticmethod(_guarded(vision_rope_tables))
    rope = staticmethod(_guarded(rope))
    norm_rope = staticmethod(_guarded(norm_rope))
    attention = staticmethod(_guarded(attention))
    patch_embed = staticmethod(_patch_embed)
    resample_positions = staticmethod(_guarded(resample_positions))
    pool = staticmethod(_guarded(pool))
    score = staticmethod(_guarded(score))
