"""Prompts that begin alike as a tree of segments, so that each beginning is computed once.

Attention is causal: the hidden states of a beginning do not depend on what follows it. Every
embedding request starts with the same template and instruction, and every document of a rerank
call with the same query, its pictures included.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .prompt import Prompt

# A segment of its own costs about as much as computing this many tokens again. (scheduler.py
# counts on it: _NOT_SHARED.)
MIN_SAVED = 8


class Number:
    """Stands for one picture in token keys, as long as somebody holds it."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: int) -> None:
        self.value = value


class Numbers:
    """A number for each picture by its ``digest``. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = itertools.count()
        self._known: weakref.WeakValueDictionary[bytes, Number] = weakref.WeakValueDictionary()

    def of(self, digest: bytes) -> Number:
        """The number of a picture, that of equal ones that are still around."""
        with self._lock:
            number = self._known.get(digest)
            if number is None:
                number = self._known[digest] = Number(next(self._next))
            return number


@dataclass(frozen=True, eq=False)
class Keys:
    """What is equal for equal tokens only.

    Attributes:
        tokens: int64 ``[T]``: the id, or for a pad the picture and the place in it.
        order: the same as bytes: their order brings common beginnings together.
        numbers: hold on to what ``tokens`` say about pictures.
    """

    tokens: NDArray[np.int64]
    order: bytes
    numbers: tuple[Number, ...] = ()

    @classmethod
    def of(cls, tokens: NDArray[np.int64], numbers: tuple[Number, ...] = ()) -> Keys:
        return cls(tokens, tokens.astype(">i8").tobytes(), numbers)

    @classmethod
    def of_prompt(cls, prompt: Prompt, numbers: Numbers) -> Keys:
        keys = prompt.ids.astype(np.int64)
        used, held = 0, []
        for media in prompt.media:
            number = numbers.of(media.digest)
            held.append(number)
            index = prompt.visual_index[used : used + media.num_tokens]
            places = np.arange(media.num_tokens, dtype=np.int64)
            keys[index] = -1 - ((number.value << 32) + places)
            used += media.num_tokens
        return cls.of(keys, tuple(held))

    def first(self, count: int) -> Keys:
        """Those of the first ``count`` tokens."""
        if count >= len(self.tokens):
            return self
        return Keys(self.tokens[:count].copy(), self.order[: 8 * count], self.numbers)

    def prefixes(self) -> tuple[tuple[int, int], ...]:
        """(hash, length) of beginnings, each about half as long again as the one before."""
        found, length = [], MIN_SAVED
        while length < len(self.tokens):
            found.append((hash(self.order[: 8 * length]), length))
            length += max(1, length // 2)
        found.append((hash(self.order), len(self.tokens)))
        return tuple(found)


@dataclass(frozen=True)
class Segment:
    """The tokens ``start:stop`` of a prompt, which continue segment ``parent`` (−1: none).

    ``sequences`` counts the different prompts that run through it.
    """

    prompt: int
    start: int
    stop: int
    parent: int
    sequences: int = 1


@dataclass(frozen=True)
class Tree:
    """Segments, parents first, and for each prompt the segment that ends with its last token."""

    segments: tuple[Segment, ...]
    last: tuple[int, ...]


def no_sharing(lengths: Sequence[int]) -> Tree:
    """Each prompt a root of its own."""
    return Tree(
        tuple(Segment(i, 0, length, -1) for i, length in enumerate(lengths)),
        tuple(range(len(lengths))),
    )


def prefix_tree(keys: Sequence[Keys], seen: Sequence[Keys] = ()) -> Tree:
    """The tree of what prompts share.

    Args:
        keys: of each prompt.
        seen: of prompts of earlier batches. They get no segments, but where a prompt leaves
            one of them its segment is cut, and they count in ``sequences``.
    """
    every = [*keys, *seen]
    order = sorted(range(len(every)), key=lambda i: every[i].order)
    common = [0] + [_common(every[a].tokens, every[b].tokens) for a, b in pairwise(order)]
    lengths = [len(every[i].tokens) for i in order]
    equal = [0] + [common[i] == lengths[i] == lengths[i - 1] for i in range(1, len(order))]
    own = [place for place, i in enumerate(order) if i < len(keys)]
    segments: list[Segment] = []
    last = [-1] * len(keys)

    # A group is a range of `order` whose prompts are alike up to `depth`, computed by `parent`.
    groups = [(0, len(order), 0, -1)] if order else []
    while groups:
        first, stop, depth, parent = groups.pop()
        inside = bisect.bisect_left(own, first)
        if inside == len(own) or own[inside] >= stop:
            continue  # all from earlier batches
        alike = min(common[first + 1 : stop], default=lengths[first])
        if alike > depth and (
            stop - first == 1
            or (alike - depth) * (stop - first - 1) >= MIN_SAVED
            or alike == lengths[stop - 1]  # all equal
        ):
            sequences = stop - first - sum(equal[first + 1 : stop])
            segments.append(Segment(order[own[inside]], depth, alike, parent, sequences))
            parent, depth = len(segments) - 1, alike
        start = first
        for i in range(first + 1, stop + 1):
            if i < stop and common[i] > alike:
                continue
            if lengths[start] > depth:
                groups.append((start, i, depth, parent))
            else:
                for prompt in order[start:i]:
                    if prompt < len(keys):
                        last[prompt] = parent
            start = i
    return Tree(tuple(segments), tuple(last))


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter
