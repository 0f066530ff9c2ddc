"""From the decoder's last hidden states to vectors and scores, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import normalise


def pool(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The final RMSNorm of the read tokens, not rounded back to the model's dtype.

    Args:
        x: ``[R, C]``.
        weight: ``[C]``.

    Returns:
        ``[R, C]`` float32, not yet of unit length.
    """
    return normalise(x, weight, eps)


def score(pooled: Tensor, answer_rows: Tensor) -> Tensor:
    """sigmoid(h · (yes − no)): the probability of ``yes`` against ``no``.

    Args:
        pooled: ``[R, C]`` float32.
        answer_rows: ``[2, C]`` float32, the head's rows of ``yes`` and ``no``.

    Returns:
        ``[R]`` float32.
    """
    return torch.sigmoid(pooled @ (answer_rows[0] - answer_rows[1]))
