"""Matrix products with weights, and the lookup of token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.weights import Fp8Weight, Int4Weight, Int8Weight, QuantisedWeight, quantise
from .activation import gelu_erf, gelu_tanh, swiglu
from .rows import QuantisedRows, RowFormat, Rows, as_rows

Weight: TypeAlias = Tensor | QuantisedWeight
"""``[N, K]``, as read from a checkpoint or quantised."""

ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu_erf": gelu_erf}

_ROWS = 4096
# 127² · 1024 < 2²⁴: float32 holds every sum of that many int8 products exactly.
_EXACT = 1024


@dataclass(frozen=True)
class Linear:
    """A linear as a backend's ``prepare`` made it.

    Attributes:
        weight: belongs to the backend; several projections of the same input may be in it, one
            after the other.
        bias: ``[N]`` or None.
        rows: the form it wants its input in. Tensors in the model's dtype are taken always.
    """

    weight: Any
    bias: Tensor | None = None
    rows: RowFormat = "float"


def prepare(
    parts: Sequence[Weight],
    bias: Tensor | None = None,
    *,
    form: str | None = None,
    group: int = 64,
    weight_only: bool = False,
    gated: bool = False,
) -> Linear:
    """Make weights ready for :func:`linear` or, with ``gated``, :func:`gated_linear`.

    Args:
        parts: ``[Ni, K]`` each, whose outputs follow one another; gate and up if ``gated``.
        bias: ``[sum of Ni]``.
        form: quantise float weights to ``int8``, ``int4`` or ``fp8``; None keeps them.
        group: inputs that share a multiplier, for ``int4``.
        weight_only: int4 weights are multiplied by rows in floating point, and not by int8 ones.
    """
    made = tuple(
        quantise(w, form, group) if form is not None and isinstance(w, Tensor) else w for w in parts
    )
    alone = weight_only and all(isinstance(part, Int4Weight) for part in made)
    rows: RowFormat = "float"
    if isinstance(made[0], Int8Weight | Int4Weight) and not alone:
        rows = "int8"
    elif isinstance(made[0], Fp8Weight):
        rows = "fp8"
    return Linear(made, bias, rows)


def linear(x: Rows, layer: Linear, *, activation: str | None = None) -> Tensor:
    """activation(x · weightᵀ + bias), accumulated in float32, int8 exactly.

    Args:
        x: ``[M, K]``, float32, bfloat16 or float16, or quantised.
        layer: of :func:`prepare`.
        activation: ``gelu_tanh``, ``gelu_erf`` or None.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    y = _product(x, layer)
    return y if activation is None else ACTIVATIONS[activation](y)


def add_linear(y: Tensor, x: Rows, layer: Linear) -> None:
    """``y += linear(x, layer)``, in place: the second half of a residual branch.

    Args:
        y: ``[M, N]``, the dtype of ``x``; rows may be apart.
    """
    y += _product(x, layer)


def gated_linear(x: Rows, layer: Linear, *, rows: RowFormat = "float") -> Rows:
    """silu(x · gateᵀ) · (x · upᵀ), the first half of the decoder's MLP.

    Args:
        x: ``[M, K]``, as in :func:`linear`.
        layer: of :func:`prepare` with ``gated``.
        rows: the form to return it in, that which the next linear wants.

    Returns:
        ``[M, N / 2]`` for the N outputs of gate and up together.
    """
    gate, up = _product(x, layer).chunk(2, dim=1)
    return as_rows(swiglu(gate, up), rows)


def _product(x: Rows, layer: Linear) -> Tensor:
    """x · weightᵀ + bias, ``[M, N]`` in the dtype of ``x``."""
    if isinstance(x, Tensor):
        x = as_rows(x, layer.rows)
    parts, start = [], 0
    for weight in layer.weight:
        stop = start + weight.shape[0]
        bias = None if layer.bias is None else layer.bias[start:stop]
        if isinstance(x, QuantisedRows):
            parts.append(_multiply_quantised(x, weight, bias))
        else:
            parts.append(_multiply(x, weight, bias))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    native = x.dtype == torch.float32 or x.device.type != "cpu"
    native = native or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if isinstance(weight, Tensor) and native:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if not isinstance(weight, Tensor):
        weight = weight.dequantise()
    # torch has no fast 16-bit product for this processor: multiply in float32, a block of weight
    # rows at a time so that the weight never exists twice.
    wide = x.float()
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = None if bias is None else bias[rows].float()
        out[:, rows] = F.linear(wide, weight[rows].float(), part)
    return out


def _multiply_quantised(x: QuantisedRows, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Int4Weight):
        weight = weight.widen()
    if not isinstance(weight, Int8Weight | Fp8Weight):
        raise TypeError("this is a bug: quantised rows meet a weight that is not quantised")
    if isinstance(weight, Int8Weight):
        total = torch.zeros(len(x), weight.shape[0], dtype=torch.float64, device=x.values.device)
        for start in range(0, weight.shape[1], _EXACT):
            columns = slice(start, start + _EXACT)
            total += x.values[:, columns].float() @ weight.values[:, columns].float().T
        y = total.float()
    else:
        y = x.values.float() @ weight.values.float().T
    y = y * x.scale[:, None] * weight.scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` ``[V, C]`` at ``ids`` ``[T]`` int64; returns ``[T, C]``."""
    return F.embedding(ids, table)
