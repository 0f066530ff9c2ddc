"""Prompts packed into the tensors of one forward pass; nothing is padded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import Forest
from .pixels import Patches
from .plan import Plan, plan_alone, plan_shared
from .prompt import Prompt
from .sharing import Keys, Numbers


@dataclass(frozen=True)
class Window:
    """A stretch of a batch's tokens, or of its patches, that is worked at once.

    Attributes:
        rows: where they are in the batch.
        forest: the forest in which only these ask, see :meth:`qvlfast.ops.Forest.window`; for
            patches that of its frames alone.
    """

    rows: slice
    forest: Forest


@dataclass(frozen=True)
class VisionBatch:
    """The pictures and videos of a batch: all stills, then all videos.

    Attributes:
        stills: ``[N₁, 3 · patch²]`` uint8 patches of pictures.
        videos: ``[N₂, 3 · temporal · patch²]`` uint8 patches of videos.
        grids: (t, h, w) in patches of each picture and video, in that order.
        positions: ``[2, N₁ + N₂]`` int64, row and column of each patch.
        forest: one segment a frame (pair): attention never crosses it.
        windows: the patches in stretches of whole frames; empty: all at once.
    """

    stills: Tensor
    videos: Tensor
    grids: tuple[tuple[int, int, int], ...]
    positions: Tensor
    forest: Forest
    windows: tuple[Window, ...] = ()


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
        windows: the tokens in stretches that keep memory and the time of a piece bounded; empty:
            all at once.
    """

    ids: Tensor
    positions: Tensor
    forest: Forest
    read: NDArray[np.int64]
    vision: VisionBatch | None
    visual_index: Tensor
    visual_rows: Tensor
    windows: tuple[Window, ...] = ()

    @cached_property
    def read_rows(self) -> Tensor:
        """``read`` on the device of the batch; put there once, which graphs count on."""
        return torch.from_numpy(self.read).to(self.ids.device)


@dataclass(frozen=True)
class Cut:
    """Some of the read tokens of a batch, and the form that their vectors are wanted in.

    Attributes:
        size: the first values that are kept, and scaled to unit length (Matryoshka); None: all
            of them, as the final norm leaves them. A reranker's scores have no size.
        reads: ``[N]`` rising int64 indices into ``Batch.read``.
    """

    size: int | None
    reads: NDArray[np.int64]


@dataclass(frozen=True)
class PieceLimits:
    """The most that is worked in one piece.

    Attributes:
        rows: tokens.
        pairs: queries times the keys that each sees.
        patches: of pictures; a frame is never cut.
    """

    rows: int
    pairs: int
    patches: int


# On a CPU the products are at full speed from a few hundred rows on (csrc/gemm.cpp takes 384 at a
# time), and a piece is what an urgent request waits for; a GPU wants more at once.
_CPU_PIECES = PieceLimits(rows=768, pairs=1 << 23, patches=4096)
_GPU_PIECES = PieceLimits(rows=1 << 14, pairs=1 << 28, patches=1 << 16)


def piece_limits(device: str) -> PieceLimits:
    """Those of a kind of device, ``cpu`` or ``cuda``."""
    return _CPU_PIECES if device == "cpu" else _GPU_PIECES


def cut_windows(forest: Forest, limits: PieceLimits) -> tuple[Window, ...]:
    """Windows of about equal length within the limits; empty if one would do."""
    total = int(forest.cu_q[-1])
    pairs = np.cumsum(forest.visible())
    if total <= limits.rows and (not total or pairs[-1] <= limits.pairs):
        return ()
    rows = -(-total // -(-total // limits.rows))
    windows, start = [], 0
    while start < total:
        before = int(pairs[start - 1]) if start else 0
        most = int(np.searchsorted(pairs, before + limits.pairs, side="right"))
        stop = min(max(most, start + 1), start + rows, total)
        windows.append(Window(slice(start, stop), forest.window(start, stop)))
        start = stop
    return tuple(windows)


def group_frames(frames: Sequence[int], most: int) -> tuple[Window, ...]:
    """Windows of whole frames of so many patches, where possible; empty if one would do."""
    windows, start, group = [], 0, [frames[0]]
    for frame in [*frames[1:], most + 1]:
        if sum(group) + frame > most:
            stop = start + sum(group)
            windows.append(Window(slice(start, stop), Forest.plain(group)))
            start, group = stop, []
        group.append(frame)
    return tuple(windows) if len(windows) > 1 else ()


@lru_cache(maxsize=256)
def _patch_positions(height: int, width: int, merge: int) -> NDArray[np.int64]:
    """Row and column of each patch of a frame, ``[2, height · width]``, in merge order."""
    rows, columns = np.mgrid[:height, :width]
    grid = np.stack((rows, columns)).reshape(2, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(grid.swapaxes(2, 3)).reshape(2, -1)


def pack_vision(
    media: Sequence[Patches], merge: int, device: torch.device, most: int | None = None
) -> VisionBatch:
    """Pack pictures and videos; all stills must come before all videos.

    Args:
        most: patches that the tower works in one piece, where frames allow it.
    """

    def concatenated(video: bool) -> Tensor:
        rows = [m.pixels for m in media if m.is_video == video]
        packed = np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.uint8)
        return torch.from_numpy(packed).to(device)

    frames = [h * w for t, h, w in (m.grid for m in media) for _ in range(t)]
    positions = [np.tile(_patch_positions(h, w, merge), t) for t, h, w in (m.grid for m in media)]
    return VisionBatch(
        stills=concatenated(video=False),
        videos=concatenated(video=True),
        grids=tuple(m.grid for m in media),
        positions=torch.from_numpy(np.concatenate(positions, axis=1)).to(device),
        forest=Forest.plain(frames),
        windows=group_frames(frames, most) if most else (),
    )


@dataclass(frozen=True)
class Packed:
    """A batch and what goes with it.

    Attributes:
        rows: ``[N]``: for each prompt the row of the batch's result that is its own.
        plan: what is computed, and what is resident.
        spans: the computed tokens of each segment in ``plan.keep``.
        media: what ``batch.vision`` holds, in that order.
        ready: digests of pictures whose visual tokens are there already. In the rows that
            ``batch.visual_rows`` points into they come first, in this order.
    """

    batch: Batch
    rows: NDArray[np.int64]
    plan: Plan
    spans: tuple[slice, ...]
    media: tuple[Patches, ...]
    ready: tuple[bytes, ...]


def pack(
    prompts: Sequence[Prompt],
    merge: int,
    device: torch.device,
    *,
    share: bool = False,
    plan: Plan | None = None,
    limits: PieceLimits | None = None,
    ready: Collection[bytes] = (),
) -> Packed:
    """Pack prompts, reading the last token of each.

    Args:
        merge: patches along each side of a visual token.
        share: compute common beginnings, equal prompts and equal pictures once.
        plan: the forest; None makes one of these prompts alone.
        limits: of the pieces that the decoder works in; None: everything at once.
        ready: digests of pictures that need not go through the vision tower.
    """
    if plan is None and share:
        numbers = Numbers()
        plan = plan_shared([Keys.of_prompt(prompt, numbers) for prompt in prompts])
    elif plan is None:
        plan = plan_alone([len(prompt.ids) for prompt in prompts])
    lengths = [s.stop - s.start for s in plan.segments]
    starts = np.cumsum([0, *lengths])
    media = _Media(share, ready)
    index, rows = [], []
    for segment, start in zip(plan.segments, starts[:-1], strict=True):
        prompt = prompts[segment.prompt]
        inside = slice(*np.searchsorted(prompt.visual_index, (segment.start, segment.stop)))
        if inside.start < inside.stop:
            index.append(prompt.visual_index[inside].astype(np.int64) + (start - segment.start))
            rows.append(media.rows(prompt, inside))
    ends = starts[1:][list(plan.last)] - 1
    read, own_rows = np.unique(ends, return_inverse=True)
    pieces = [(prompts[s.prompt], slice(s.start, s.stop)) for s in plan.segments]
    ids = np.concatenate([prompt.ids[span] for prompt, span in pieces]).astype(np.int64)
    positions = np.concatenate([prompt.positions[:, span] for prompt, span in pieces], axis=1)
    forest = _forest(plan, lengths)
    known, computed, moved = media.ordered()
    visual_rows = moved[np.concatenate(rows)] if rows else np.empty(0, np.int64)
    batch = Batch(
        ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions.astype(np.int64)).to(device),
        forest=forest,
        read=read.astype(np.int64),
        vision=(
            pack_vision(computed, merge, device, limits.patches if limits else None)
            if computed
            else None
        ),
        visual_index=_indices(index, device),
        visual_rows=torch.from_numpy(visual_rows).to(device),
        windows=cut_windows(forest, limits) if limits else (),
    )
    return Packed(
        batch,
        own_rows.astype(np.int64),
        plan,
        tuple(slice(int(starts[i]), int(starts[i + 1])) for i in plan.keep),
        tuple(computed),
        tuple(m.digest for m in known),
    )


def _forest(plan: Plan, lengths: Sequence[int]) -> Forest:
    there = [r.length for r in plan.resident]
    parents = [r.parent for r in plan.resident] + [s.parent for s in plan.segments]
    return Forest(
        cu_q=np.cumsum([0, *([0] * len(there)), *lengths]).astype(np.int32),
        cu_k=np.cumsum([0, *there, *lengths]).astype(np.int32),
        parent=np.array(parents, dtype=np.int32),
    )


def _indices(parts: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    whole = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return torch.from_numpy(whole).to(device)


class _Media:
    """The pictures and videos of a batch, and where their visual tokens are in its rows."""

    def __init__(self, share: bool, ready: Collection[bytes]) -> None:
        self._share = share
        self._ready = ready
        self._media: list[Patches] = []
        self._first: list[int] = []
        self._known: dict[bytes | int, int] = {}
        self._count = 0

    def rows(self, prompt: Prompt, inside: slice) -> NDArray[np.int64]:
        """A row for each of the pads ``inside`` of ``prompt``, in the order in which media were
        first seen. Media without any such pad are left out."""
        parts, used = [], 0
        for patches in prompt.media:
            own = slice(max(inside.start - used, 0), min(inside.stop - used, patches.num_tokens))
            used += patches.num_tokens
            if own.start >= own.stop:
                continue
            named = self._share or (self._ready and patches.digest in self._ready)
            key: bytes | int = patches.digest if named else id(patches)
            if key not in self._known:
                self._known[key] = self._count
                self._media.append(patches)
                self._first.append(self._count)
                self._count += patches.num_tokens
            parts.append(self._known[key] + np.arange(own.start, own.stop, dtype=np.int64))
        return np.concatenate(parts)

    def ordered(self) -> tuple[list[Patches], list[Patches], NDArray[np.int64]]:
        """The media that are ready, the others in the order of a :class:`VisionBatch`, and where
        each row has moved."""
        ready = [bool(self._ready) and m.digest in self._ready for m in self._media]
        order = sorted(
            range(len(self._media)), key=lambda i: (not ready[i], self._media[i].is_video)
        )
        moved = np.empty(self._count, dtype=np.int64)
        place = 0
        for i in order:
            count = self._media[i].num_tokens
            moved[self._first[i] : self._first[i] + count] = place + np.arange(count)
            place += count
        known = sum(ready)
        media = [self._media[i] for i in order]
        return media[:known], media[known:], moved
