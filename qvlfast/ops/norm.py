"""Row-wise normalisations. Both compute in float32, whatever the dtype of the rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .rows import RowFormat, Rows, as_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float") -> Rows:
    """x / sqrt(mean(x²) + eps) · weight over the last axis.

    Args:
        x: ``[T, C]``.
        weight: ``[C]``.
        rows: the form to return it in, that which the next linear wants.

    Returns:
        The shape and dtype of ``x``, or quantised.
    """
    return as_rows(normalise(x, weight, eps).to(x.dtype), rows)


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The float32 RMSNorm of ``[..., C]``."""
    wide = x.float()
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return wide * scale * weight.float()


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, rows: RowFormat = "float"
) -> Rows:
    """(x − mean) / sqrt(var + eps) · weight + bias over the last axis.

    Args:
        x: ``[T, C]``.
        weight: ``[C]``.
        bias: ``[C]``.
        rows: the form to return it in, that which the next linear wants.

    Returns:
        The shape and dtype of ``x``, or quantised.
    """
    wide = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return as_rows(wide.to(x.dtype), rows)
