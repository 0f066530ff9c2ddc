"""Prompts that begin alike as a tree of segments, so that each beginning is computed once.

Attention is causal: the hidden states of a beginning do not depend on what follows it. Every
embedding request starts with the same template and instruction, and every document of a rerank
call with the same query, its pictures included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .prompt import Prompt

# A segment of its own costs about as much as computing this many tokens again.
_MIN_SAVED = 8


@dataclass(frozen=True)
class Segment:
    """The tokens ``start:stop`` of a prompt, which continue segment ``parent`` (−1: none)."""

    prompt: int
    start: int
    stop: int
    parent: int


@dataclass(frozen=True)
class Tree:
    """Segments, parents first, and for each prompt the segment that ends with its last token."""

    segments: tuple[Segment, ...]
    last: tuple[int, ...]


def content_keys(prompt: Prompt, numbers: dict[bytes, int]) -> NDArray[np.int64]:
    """A number for each token, ``[T]``, equal for equal tokens only: a pad's tells the picture
    and the place in it.

    Args:
        numbers: a number for each picture by its ``digest``; new ones are added.
    """
    keys = prompt.ids.astype(np.int64)
    used = 0
    for media in prompt.media:
        number = numbers.setdefault(media.digest, len(numbers))
        index = prompt.visual_index[used : used + media.num_tokens]
        keys[index] = -1 - ((number << 32) + np.arange(media.num_tokens, dtype=np.int64))
        used += media.num_tokens
    return keys


def no_sharing(lengths: Sequence[int]) -> Tree:
    """Each prompt a root of its own."""
    return Tree(
        tuple(Segment(i, 0, length, -1) for i, length in enumerate(lengths)),
        tuple(range(len(lengths))),
    )


def prefix_tree(keys: Sequence[NDArray[np.int64]]) -> Tree:
    """The tree of what prompts share.

    Args:
        keys: :func:`content_keys` of each prompt.
    """
    order = sorted(range(len(keys)), key=lambda i: keys[i].astype(">i8").tobytes())
    common = [0] + [_common(keys[a], keys[b]) for a, b in pairwise(order)]
    segments: list[Segment] = []
    last = [-1] * len(keys)

    def add(prompt: int, start: int, stop: int, parent: int) -> int:
        segments.append(Segment(prompt, start, stop, parent))
        return len(segments) - 1

    # A group is a range of `order` whose prompts are alike up to `depth`, computed by `parent`.
    groups = [(0, len(order), 0, -1)] if order else []
    while groups:
        first, stop, depth, parent = groups.pop()
        alike = min(common[first + 1 : stop], default=len(keys[order[first]]))
        if alike > depth and (
            stop - first == 1
            or (alike - depth) * (stop - first - 1) >= _MIN_SAVED
            or alike == len(keys[order[stop - 1]])  # all equal
        ):
            parent, depth = add(order[first], depth, alike, parent), alike
        start = first
        for i in range(first + 1, stop + 1):
            if i < stop and common[i] > alike:
                continue
            if len(keys[order[start]]) > depth:
                groups.append((start, i, depth, parent))
            else:
                for prompt in order[start:i]:
                    last[prompt] = parent
            start = i
    return Tree(tuple(segments), tuple(last))


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter
