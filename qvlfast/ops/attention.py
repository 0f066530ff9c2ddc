"""Attention over a forest of segments.

Requests that begin alike share that beginning as a parent segment: its keys and values exist
once, and every child attends to them as if they were its own past.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Queries a mask is made for at once.
_CHUNK_ROWS = 512


@dataclass(frozen=True)
class Forest:
    """How packed tokens divide into segments, and which segment continues which.

    Segment s owns the keys ``cu_k[s]:cu_k[s+1]`` and the queries ``cu_q[s]:cu_q[s+1]``. Its
    queries are its own last tokens: as many as it has keys in a plain batch, none when it is
    *resident* (its keys and values were computed earlier). ``parent[s]`` is an earlier segment,
    or −1. A plain batch has no edges.

    Attributes:
        cu_q: ``[S + 1]`` int32, from 0, never falling.
        cu_k: ``[S + 1]`` int32, from 0, never falling.
        parent: ``[S]`` int32.
    """

    cu_q: NDArray[np.int32]
    cu_k: NDArray[np.int32]
    parent: NDArray[np.int32]

    def __post_init__(self) -> None:
        count = len(self.parent)
        if len(self.cu_q) != count + 1 or len(self.cu_k) != count + 1:
            raise ValueError(
                f"cu_q has {len(self.cu_q)} and cu_k {len(self.cu_k)} entries, "
                f"expected S + 1 = {count + 1}"
            )
        queries, keys = np.diff(self.cu_q), np.diff(self.cu_k)
        if self.cu_q[0] or self.cu_k[0] or (queries < 0).any() or (keys < queries).any():
            raise ValueError("cu_q and cu_k must start at 0, never fall, and leave keys >= queries")
        if (self.parent >= np.arange(count)).any() or (self.parent < -1).any():
            raise ValueError("a parent must be -1 or an earlier segment")

    @classmethod
    def plain(cls, lengths: list[int]) -> Forest:
        """Independent segments of the given lengths."""
        cu = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        return cls(cu, cu, np.full(len(lengths), -1, dtype=np.int32))

    def window(self, start: int, stop: int) -> Forest:
        """The forest in which only the queries ``start:stop`` ask, with the keys up to the last of
        them: the first ``cu_k[S]`` of the keys."""
        stops = np.clip(self.cu_q, start, stop)
        # Keys of the segment that `stop` lies in end there, and those behind it have none.
        segment = int(np.searchsorted(self.cu_q, stop, side="left")) - 1
        most = int(self.cu_k[segment + 1]) - (int(self.cu_q[segment + 1]) - stop)
        return Forest((stops - start).astype(np.int32), np.minimum(self.cu_k, most), self.parent)

    def visible(self) -> NDArray[np.int64]:
        """How many keys each query sees when attention is causal, ``[cu_q[S]]``."""
        ends = np.zeros(len(self.parent) + 1, dtype=np.int64)  # one more for those without parent
        keys = np.diff(self.cu_k)
        for segment, parent in enumerate(self.parent):
            ends[segment] = ends[parent] + keys[segment]
        queries = np.diff(self.cu_q)
        last = np.repeat(ends[:-1], queries)
        return last - np.repeat(self.cu_q[1:], queries) + np.arange(self.cu_q[-1]) + 1

    def chain(self, segment: int) -> list[int]:
        """The ancestors of ``segment`` from the root down, then itself."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = int(self.parent[segment])
        return found[::-1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    *,
    causal: bool,
    scale: float,
    read: NDArray[np.int64] | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, each token over its ancestors' tokens and its own segment's.

    Args:
        q: ``[cu_q[S], Hq, D]``, or ``[R, Hq, D]`` with ``read``.
        k, v: ``[cu_k[S], Hk, D]``; Hq is a multiple of Hk, query head i uses key head
            i // (Hq / Hk).
        causal: within its own segment a token sees itself and the tokens before it; otherwise
            the whole segment. It sees all of its ancestors either way.
        read: ``[R]`` rising indices into the queries' tokens: only these are wanted.

    Returns:
        The shape and dtype of ``q``.
    """
    wide = torch.float32 if q.device.type == "cpu" else q.dtype
    out = torch.empty_like(q)
    for segment in range(len(forest.parent)):
        first, last = int(forest.cu_q[segment]), int(forest.cu_q[segment + 1])
        if read is None:
            row, stop = first, last
            place = np.arange(last - first)
        else:
            row, stop = (int(i) for i in np.searchsorted(read, (first, last)))
            place = read[row:stop] - first
        if row == stop:
            continue
        spans = [slice(int(forest.cu_k[s]), int(forest.cu_k[s + 1])) for s in forest.chain(segment)]
        keys = torch.cat([k[span] for span in spans]).to(wide).transpose(0, 1)
        values = torch.cat([v[span] for span in spans]).to(wide).transpose(0, 1)
        total = keys.shape[1]
        if not causal:
            out[row:stop] = _attend(q[row:stop], keys, values, scale)
            continue
        # Keys are in the order of the sequence and queries are its last tokens, so what a query
        # sees is a prefix of the keys.
        visible = place + (total - (last - first)) + 1
        if visible[0] == 1 and visible[-1] == total == stop - row:
            out[row:stop] = _attend(q[row:stop], keys, values, scale, is_causal=True)
            continue
        for start in range(0, stop - row, _CHUNK_ROWS):
            seen = torch.from_numpy(visible[start : start + _CHUNK_ROWS]).to(q.device)
            most = int(visible[: start + _CHUNK_ROWS][-1])
            rows = slice(row + start, row + start + len(seen))
            mask = torch.arange(most, device=q.device) < seen[:, None]
            out[rows] = _attend(q[rows], keys[:, :most], values[:, :most], scale, mask=mask)
    return out


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """One segment's attention; keys and values ``[Hk, Lk, D]``, the rest as in :func:`attention`.

    torch computes it block by block, so no square of scores exists.
    """
    attended = F.scaled_dot_product_attention(
        q.to(keys.dtype).transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).to(q.dtype)
