"""Prompts packed into the tensors of one forward pass; nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import Forest
from .pixels import Patches
from .prompt import Prompt
from .sharing import content_keys, no_sharing, prefix_tree


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
        visual_index: ``[V]`` int64: the tokens that stand for merged patches.
        visual_rows: ``[V]`` int64: which merged patch of ``vision`` each of them stands for.
    """

    ids: Tensor
    positions: Tensor
    forest: Forest
    read: NDArray[np.int64]
    vision: VisionBatch | None
    visual_index: Tensor
    visual_rows: Tensor

    @cached_property
    def read_rows(self) -> Tensor:
        """``read`` on the device of the batch; put there once, which graphs count on."""
        return torch.from_numpy(self.read).to(self.ids.device)


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


@dataclass(frozen=True)
class Packed:
    """A batch, and for each prompt the row of the batch's result that is its own ``[N]``."""

    batch: Batch
    rows: NDArray[np.int64]


def pack(
    prompts: Sequence[Prompt], merge: int, device: torch.device, *, share: bool = False
) -> Packed:
    """Pack prompts, reading the last token of each.

    Args:
        merge: patches along each side of a visual token.
        share: compute common beginnings, equal prompts and equal pictures once.
    """
    numbers: dict[bytes, int] = {}
    if share:
        tree = prefix_tree([content_keys(prompt, numbers) for prompt in prompts])
    else:
        tree = no_sharing([len(prompt.ids) for prompt in prompts])
    lengths = [s.stop - s.start for s in tree.segments]
    starts = np.cumsum([0, *lengths])
    media = _Media(share)
    index, rows = [], []
    for segment, start in zip(tree.segments, starts[:-1], strict=True):
        prompt = prompts[segment.prompt]
        inside = slice(*np.searchsorted(prompt.visual_index, (segment.start, segment.stop)))
        if inside.start < inside.stop:
            index.append(prompt.visual_index[inside].astype(np.int64) + (start - segment.start))
            rows.append(media.rows(prompt)[inside])
    ends = starts[1:][list(tree.last)] - 1
    read, own_rows = np.unique(ends, return_inverse=True)
    pieces = [(prompts[s.prompt], slice(s.start, s.stop)) for s in tree.segments]
    ids = np.concatenate([prompt.ids[span] for prompt, span in pieces]).astype(np.int64)
    positions = np.concatenate([prompt.positions[:, span] for prompt, span in pieces], axis=1)
    forest = replace(
        Forest.plain(lengths), parent=np.array([s.parent for s in tree.segments], dtype=np.int32)
    )
    ordered, moved = media.stills_first()
    visual_rows = moved[np.concatenate(rows)] if rows else np.empty(0, np.int64)
    batch = Batch(
        ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions.astype(np.int64)).to(device),
        forest=forest,
        read=read.astype(np.int64),
        vision=pack_vision(ordered, merge, device) if ordered else None,
        visual_index=_indices(index, device),
        visual_rows=torch.from_numpy(visual_rows).to(device),
    )
    return Packed(batch, own_rows.astype(np.int64))


def _indices(parts: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    whole = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return torch.from_numpy(whole).to(device)


class _Media:
    """The pictures and videos of a batch, and where their visual tokens are in its vision part."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._media: list[Patches] = []
        self._first: list[int] = []
        self._known: dict[bytes | int, int] = {}
        self._count = 0

    def rows(self, prompt: Prompt) -> NDArray[np.int64]:
        """A row for each pad of ``prompt``, in the order in which media were first seen."""
        parts = []
        for patches in prompt.media:
            key: bytes | int = patches.digest if self._share else id(patches)
            if key not in self._known:
                self._known[key] = self._count
                self._media.append(patches)
                self._first.append(self._count)
                self._count += patches.num_tokens
            parts.append(self._known[key] + np.arange(patches.num_tokens, dtype=np.int64))
        return np.concatenate(parts)

    def stills_first(self) -> tuple[list[Patches], NDArray[np.int64]]:
        """The media in the order of a :class:`VisionBatch`, and where each row has moved."""
        order = sorted(range(len(self._media)), key=lambda i: self._media[i].is_video)
        moved = np.empty(self._count, dtype=np.int64)
        place = 0
        for i in order:
            count = self._media[i].num_tokens
            moved[self._first[i] : self._first[i] + count] = place + np.arange(count)
            place += count
        return [self._media[i] for i in order], moved
