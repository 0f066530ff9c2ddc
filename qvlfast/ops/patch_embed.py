"""From uint8 pixels to the vision tower's first hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Linear


def patch_embed(
    pixels: Tensor,
    layer: Linear,
    table: Tensor,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
) -> Tensor:
    """pixels · weightᵀ + bias + positions, with the pixel normalisation already in the weights.

    Args:
        pixels: ``[N, K]`` uint8, one flattened patch a row.
        layer: weight ``[C, K]`` and bias ``[C]`` float32, see
            :func:`qvlfast.weights.fold_normalisation`.
        table, grids, merge: of the positions, see :func:`resample_positions`.

    Returns:
        ``[N, C]`` in the dtype of the weight.
    """
    (weight,) = layer.weight
    positions = resample_positions(table, grids, merge)
    # 0..255 and the weights are exact in float32, so only the sum rounds.
    return (F.linear(pixels.float(), weight.float(), layer.bias) + positions).to(weight.dtype)


def resample_positions(table: Tensor, grids: Sequence[tuple[int, int, int]], merge: int) -> Tensor:
    """Resample the learned position grid bilinearly, corners aligned, to each picture's patches.

    Args:
        table: ``[side², C]``, the learned grid row by row.
        grids: frames (pairs), rows and columns of patches of each picture or video.
        merge: patches come in blocks of ``merge`` × ``merge``, see ``qvlfast._C.extract_patches``.

    Returns:
        ``[sum of t · h · w, C]`` float32; every frame of a video has the same positions.
    """
    side = round(table.shape[0] ** 0.5)
    known: dict[tuple[int, int], Tensor] = {}
    parts = []
    for frames, height, width in grids:
        if (height, width) not in known:
            known[height, width] = _resample(table, side, height, width, merge)
        parts.append(known[height, width].repeat(frames, 1))
    if not parts:
        return table.new_empty(0, table.shape[1], dtype=torch.float32)
    return torch.cat(parts)


def _resample(table: Tensor, side: int, height: int, width: int, merge: int) -> Tensor:
    device = table.device
    rows = torch.linspace(0, side - 1, height, device=device)
    columns = torch.linspace(0, side - 1, width, device=device)
    top, left = rows.long(), columns.long()
    bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
    down, across = (rows - top)[:, None], (columns - left)[None, :]
    out = table.new_zeros(height, width, table.shape[1], dtype=torch.float32)
    for row, vertical in ((top, 1 - down), (bottom, down)):
        for column, horizontal in ((left, 1 - across), (right, across)):
            corner = table[row[:, None] * side + column[None, :]].float()
            out += corner * (vertical * horizontal)[..., None]
    blocks = out.view(height // merge, merge, width // merge, merge, -1).transpose(1, 2)
    return blocks.reshape(height * width, -1)
