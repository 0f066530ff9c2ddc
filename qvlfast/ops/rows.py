"""Activations with one scale a token, as quantised products take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

RowFormat: TypeAlias = Literal["float", "int8", "fp8"]

_MOST = {"int8": 127.0, "fp8": 448.0}
# In place of the largest value of a row of zeros.
TINY = 1e-30


@dataclass(frozen=True)
class QuantisedRows:
    """x ≈ values · scale.

    Attributes:
        values: ``[M, K]`` int8 in −127 … 127, or float8_e4m3fn.
        scale: ``[M]`` float32; NaN where a row had NaN or infinity in it.
        dtype: of the rows before, and of what a linear makes of them.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> QuantisedRows:
        return QuantisedRows(self.values[rows], self.scale[rows], self.dtype)


Rows: TypeAlias = Tensor | QuantisedRows


def quantise_rows(x: Tensor, form: RowFormat) -> QuantisedRows:
    """Round each row: scale = max(|x|, 1e-30) / 127 for ``int8``, / 448 for ``fp8``.

    Halves go to the even neighbour. A row with NaN or infinity in it becomes NaN as a whole.

    Args:
        x: ``[M, K]``.
    """
    wide = x.float()
    most = wide.abs().amax(dim=1)
    finite = most.isfinite()
    bound = _MOST[form]
    most = most.clamp(min=TINY)
    # A tensor by a tensor: a number by a tensor is a product with the rounded inverse.
    scaled = wide * (torch.full_like(most, bound) / most)[:, None]
    scaled = torch.where(finite[:, None], scaled, 0.0).clamp(-bound, bound)
    scale = torch.where(finite, most / bound, torch.nan)
    kind = torch.float8_e4m3fn if form == "fp8" else torch.int8
    values = scaled.to(kind) if form == "fp8" else scaled.round().to(kind)
    return QuantisedRows(values, scale, x.dtype)


def as_rows(x: Tensor, form: RowFormat) -> Rows:
    """``x`` itself, or quantised."""
    return x if form == "float" else quantise_rows(x, form)


def add_rows(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """``x[index] += rows``, in place: what deepstack does after the first decoder layers.

    Args:
        x: ``[T, C]``.
        index: ``[V]`` int64, no row twice.
        rows: ``[V, C]`` in the dtype of ``x``.
    """
    x.index_add_(0, index, rows)
