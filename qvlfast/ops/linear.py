"""Matrix products with weights, and the lookup of token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 4096


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x · weightᵀ + bias, accumulated in float32.

    Args:
        x: ``[M, K]``, float32, bfloat16 or float16.
        weight: ``[N, K]``, the dtype of ``x``.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    native = x.dtype == torch.float32 or x.device.type != "cpu"
    if native or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return F.linear(x, weight, bias)
    # torch has no fast 16-bit product for this processor: multiply in float32, a block of weight
    # rows at a time so that the weight never exists twice.
    wide = x.float()
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = None if bias is None else bias[rows].float()
        out[:, rows] = F.linear(wide, weight[rows].float(), part)
    return out


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` ``[V, C]`` at ``ids`` ``[T]`` int64; returns ``[T, C]``."""
    return F.embedding(ids, table)
