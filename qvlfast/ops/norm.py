"""Row-wise normalisations. Both compute in float32, whatever the dtype of the rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis.

    Args:
        x: ``[..., C]``.
        weight: ``[C]``.

    Returns:
        The shape and dtype of ``x``.
    """
    wide = x.float()
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias over the last axis.

    Args:
        x: ``[..., C]``.
        weight: ``[C]``.
        bias: ``[C]``.

    Returns:
        The shape and dtype of ``x``.
    """
    wide = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return wide.to(x.dtype)
