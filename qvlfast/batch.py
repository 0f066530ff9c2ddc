"""Prompts packed into the tensors of one forward pass; nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import Forest
from .pixels import Patches
from .prompt import Prompt


@dataclass(frozen=True)
class VisionBatch:
    """The pictures and videos of a batch: all stills, then all videos.

    Attributes:
        stills: ``[N₁, 3 · patch²]`` uint8 patches of pictures.
        videos: ``[N₂, 3 · temporal · patch²]`` uint8 patches of videos.
        grids: (t, h, w) in patches of each picture and video, in that order.
        positions: ``[2, N₁ + N₂]`` int64, row and column of each patch.
        forest: one segment a frame (pair): attention never crosses it.
    """

    stills: Tensor
    videos: Tensor
    grids: tuple[tuple[int, int, int], ...]
    positions: Tensor
    forest: Forest


@dataclass(frozen=True)
class Batch:
    """What the forward pass takes.

    Attributes:
        ids: ``[T]`` int64 token ids.
        positions: ``[3, T]`` int64: time, row, column.
        forest: the segments of the packed tokens.
        read: ``[R]`` rising int64 indices into the T tokens: whose hidden states are wanted.
        vision: None in a batch of text alone.
        visual_index: ``[V]`` int64: the token that each merged patch of ``vision`` becomes.
    """

    ids: Tensor
    positions: Tensor
    forest: Forest
    read: NDArray[np.int64]
    vision: VisionBatch | None
    visual_index: Tensor


@lru_cache(maxsize=256)
def _patch_positions(height: int, width: int, merge: int) -> NDArray[np.int64]:
    """Row and column of each patch of a frame, ``[2, height · width]``, in merge order."""
    rows, columns = np.mgrid[:height, :width]
    grid = np.stack((rows, columns)).reshape(2, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(grid.swapaxes(2, 3)).reshape(2, -1)


def pack_vision(media: Sequence[Patches], merge: int, device: torch.device) -> VisionBatch:
    """Pack pictures and videos; all stills must come before all videos."""

    def concatenated(video: bool) -> Tensor:
        rows = [m.pixels for m in media if m.is_video == video]
        packed = np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.uint8)
        return torch.from_numpy(packed).to(device)

    positions = [np.tile(_patch_positions(h, w, merge), t) for t, h, w in (m.grid for m in media)]
    return VisionBatch(
        stills=concatenated(video=False),
        videos=concatenated(video=True),
        grids=tuple(m.grid for m in media),
        positions=torch.from_numpy(np.concatenate(positions, axis=1)).to(device),
        forest=Forest.plain([h * w for t, h, w in (m.grid for m in media) for _ in range(t)]),
    )


def pack(prompts: Sequence[Prompt], merge: int, device: torch.device) -> Batch:
    """Pack whole prompts, one root segment each, reading the last token of each.

    Args:
        merge: patches along each side of a visual token.
    """
    starts = np.cumsum([0] + [len(p.ids) for p in prompts])
    placed = []
    for prompt, start in zip(prompts, starts[:-1], strict=True):
        used = 0
        for patches in prompt.media:
            index = prompt.visual_index[used : used + patches.num_tokens]
            placed.append((patches, index.astype(np.int64) + start))
            used += patches.num_tokens
    placed.sort(key=lambda pair: pair[0].is_video)  # stable: stills first
    visual_index = np.concatenate([i for _, i in placed]) if placed else np.empty(0, np.int64)
    positions = np.concatenate([p.positions for p in prompts], axis=1).astype(np.int64)
    return Batch(
        ids=torch.from_numpy(np.concatenate([p.ids for p in prompts]).astype(np.int64)).to(device),
        positions=torch.from_numpy(positions).to(device),
        forest=Forest.plain([len(p.ids) for p in prompts]),
        read=starts[1:].astype(np.int64) - 1,
        vision=pack_vision([m for m, _ in placed], merge, device) if placed else None,
        visual_index=torch.from_numpy(visual_index).to(device),
    )
