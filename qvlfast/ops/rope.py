"""Rotary position embeddings, of the decoder (interleaved mrope) and of the vision tower.

Angles, sines and products are float32. Both towers rotate halves: value i of a head is paired
with value i + D/2, so ``cos`` and ``sin`` hold D/2 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import normalise


def mrope_tables(
    positions: Tensor, head_dim: int, theta: float, section: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the decoder's interleaved three-axis rope.

    Frequency i turns with the row position if i % 3 = 1 and i < 3 · section[1], with the column
    position if i % 3 = 2 and i < 3 · section[2], else with time.

    Args:
        positions: ``[3, T]`` integer: time, row, column.
        section: the number of frequencies of each axis; they add up to ``head_dim`` / 2.

    Returns:
        cos, sin: ``[T, head_dim / 2]`` float32.
    """
    half = head_dim // 2
    device = positions.device
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / theta**exponent
    index = torch.arange(half, device=device)
    axis = torch.zeros(half, dtype=torch.int64, device=device)
    axis[(index % 3 == 1) & (index < 3 * section[1])] = 1
    axis[(index % 3 == 2) & (index < 3 * section[2])] = 2
    angle = positions.to(torch.float32)[axis].T.contiguous() * frequency  # [T, head_dim / 2]
    return angle.cos(), angle.sin()


def vision_rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the vision tower's rope: a quarter of the head turns with the row, a
    quarter with the column, and the other half repeats them.

    Args:
        positions: ``[2, N]`` integer: row and column of each patch.

    Returns:
        cos, sin: ``[N, head_dim / 2]`` float32.
    """
    axis_dim = head_dim // 2
    exponent = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / theta ** (exponent / axis_dim)
    angle = positions.to(torch.float32)[..., None] * frequency  # [2, N, head_dim / 4]
    angle = torch.cat((angle[0], angle[1]), dim=-1)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate every head of every token, in place.

    Args:
        x: ``[T, H, D]``; tokens and heads may be apart.
        cos, sin: ``[T, D / 2]`` float32.
    """
    x.copy_(_rotated(x, cos, sin))


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    """RMSNorm of each head, then :func:`rope`, in place: what the decoder does to its queries and
    keys.

    Args:
        x: ``[T, H, D]``; tokens and heads may be apart.
        weight: ``[D]``.
        cos, sin: ``[T, D / 2]`` float32.
    """
    x.copy_(_rotated(normalise(x, weight, eps), cos, sin))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
