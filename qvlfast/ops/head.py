"""From the decoder's last hidden states to vectors and scores, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import normalise


def pool(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    read: Tensor | None = None,
    size: int | None = None,
) -> Tensor:
    """The final RMSNorm of the read tokens, not rounded back to the model's dtype.

    Args:
        x: ``[T, C]``.
        weight: ``[C]``.
        read: ``[R]`` int64 rows of ``x``; None for all of them.
        size: keep that many values (Matryoshka), and scale them to unit length.

    Returns:
        ``[R, C]`` float32, not of unit length; or ``[R, size]``, of unit length.
    """
    pooled = normalise(x if read is None else x[read], weight, eps)
    return pooled if size is None else F.normalize(pooled[:, :size], dim=1)


def score(
    x: Tensor, weight: Tensor, eps: float, answer_rows: Tensor, *, read: Tensor | None = None
) -> Tensor:
    """sigmoid(h · (yes − no)), h as of :func:`pool`: the probability of ``yes`` against ``no``.

    Args:
        x, weight, read: as in :func:`pool`.
        answer_rows: ``[2, C]`` float32, the head's rows of ``yes`` and ``no``.

    Returns:
        ``[R]`` float32.
    """
    pooled = pool(x, weight, eps, read=read)
    return torch.sigmoid(pooled @ (answer_rows[0] - answer_rows[1]))
