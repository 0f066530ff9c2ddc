"""What is kept from batch to batch under a budget of bytes: beginnings of prompts, pictures, and
answers.

All three are exact: a beginning is found by its tokens and its pictures' pixels, a picture by a
cryptographic hash of its pixels, an answer by one of the whole prompt. None is thread-safe: the
engine's thread alone uses them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sharing import Keys, Number

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``[tokens, num_kv_heads, head_dim]``."""

# Prompts of earlier batches that a new one is compared with, how many each batch adds, and how
# much of each is remembered.
_SEEN, _SEEN_OF_BATCH, _SEEN_TOKENS = 32, 4, 4096
# The part of a budget that entries used once only cannot take from those used again.
_PROTECTED = 0.8
# What Python and numpy take for an entry beside the answer's own bytes: for a score that is nearly
# all of it. Measured, rounded.
_ANSWER_OVERHEAD = 256

Value = TypeVar("Value", Tensor, NDArray[np.float32])


@dataclass
class CacheCounts:
    """How a cache does.

    Attributes:
        hits, misses: look-ups, one for each picture of a batch or each prompt.
        evictions: entries dropped for want of room.
        bytes: held now.
        entries: held now.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes: int = 0
    entries: int = 0


@dataclass(eq=False)
class Node:
    """Tokens from ``start`` on of all prompts that begin like ``parent``'s and then so."""

    start: int
    tokens: NDArray[np.int64]
    layers: Sequence[KeysValues]
    parent: Node | None
    numbers: tuple[Number, ...]
    used: int
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def bytes(self) -> int:
        return self.tokens.nbytes + sum(k.nbytes + v.nbytes for k, v in self.layers)

    def part(self, start: int, stop: int) -> Sequence[KeysValues]:
        """Keys and values of some of its tokens, without copying them."""
        if (start, stop) == (self.start, self.stop):
            return self.layers
        rows = slice(start - self.start, stop - self.start)
        return [(k[rows], v[rows]) for k, v in self.layers]


class PrefixCache:
    """A tree of beginnings with their keys and values; the least recently used leaf goes first.

    A beginning is worth keeping once two different prompts had it, in one batch or in several:
    for that the cache remembers some prompts of the last batches.

    Args:
        budget: bytes; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.counts = CacheCounts()
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._root: dict[int, Node] = {}
        self._nodes: dict[Node, None] = {}
        self._uses = 0
        self._seen: deque[Keys] = deque(maxlen=_SEEN)
        self.counts.bytes = self.counts.entries = 0

    @property
    def seen(self) -> Sequence[Keys]:
        """Prompts of earlier batches, for :func:`qvlfast.sharing.prefix_tree`."""
        return tuple(self._seen)

    def remember(self, prompts: Sequence[Keys]) -> None:
        """Note prompts that are computed now."""
        held = {keys.order for keys in self._seen}
        for keys in prompts[:_SEEN_OF_BATCH]:
            short = keys.first(_SEEN_TOKENS)
            if short.order not in held:
                self._seen.append(short)

    def match(self, keys: Keys) -> tuple[list[Node], int]:
        """The longest known beginning: its nodes from the root down, and its length. The last
        node may be longer than that."""
        chain: list[Node] = []
        depth, children, tokens = 0, self._root, keys.tokens
        while depth < len(tokens) and (node := children.get(int(tokens[depth]))) is not None:
            ahead = tokens[depth : depth + len(node.tokens)]
            different = np.flatnonzero(node.tokens[: len(ahead)] != ahead)
            alike = int(different[0]) if len(different) else len(ahead)
            chain.append(node)
            depth += alike
            if alike < len(node.tokens):
                break
            children = node.children
        return chain, depth

    def use(self, chain: Sequence[Node]) -> None:
        """Count a look-up, and its nodes as used."""
        if chain:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
        self._touch(chain)

    def insert(self, keys: Keys, start: int, stop: int, layers: Sequence[KeysValues]) -> None:
        """Keep the tokens ``start:stop`` of a prompt, if there is room, and if what comes before
        them is still here."""
        chain, depth = self.match(keys)
        if depth < start or depth >= stop:
            return
        if depth > start:  # another batch has brought some of them meanwhile
            layers = [(k[depth - start :].clone(), v[depth - start :].clone()) for k, v in layers]
        if chain and chain[-1].stop > depth:
            chain[-1] = self._split(chain[-1], depth)
        self._touch(chain)
        parent = chain[-1] if chain else None
        tokens = keys.tokens[depth:stop].copy()
        node = Node(depth, tokens, layers, parent, keys.numbers, self._uses)
        if self._make_room(node.bytes, chain):
            self._add(node)

    def _touch(self, chain: Sequence[Node]) -> None:
        self._uses += 1
        for node in chain:
            node.used = self._uses

    def _make_room(self, wanted: int, chain: Sequence[Node]) -> bool:
        if wanted + sum(node.bytes for node in chain) > self.budget:
            return False
        while self.counts.bytes + wanted > self.budget:
            # Ancestors are used whenever a descendant is, and the chain was used just now.
            leaves = (node for node in self._nodes if not node.children)
            self._remove(min(leaves, key=lambda node: node.used))
            self.counts.evictions += 1
        return True

    def _split(self, node: Node, depth: int) -> Node:
        """Cut a node in two, both copied, so that one may go without the other; returns the
        first."""
        cut = depth - node.start
        halves = [
            [(k[rows].clone(), v[rows].clone()) for k, v in node.layers]
            for rows in (slice(0, cut), slice(cut, None))
        ]
        self._remove(node)
        head, tail = node.tokens[:cut].copy(), node.tokens[cut:].copy()
        first = Node(node.start, head, halves[0], node.parent, node.numbers, node.used)
        second = Node(depth, tail, halves[1], first, node.numbers, node.used, node.children)
        for child in second.children.values():
            child.parent = second
        self._add(first)
        self._add(second)
        return first

    def _siblings(self, node: Node) -> dict[int, Node]:
        return self._root if node.parent is None else node.parent.children

    def _add(self, node: Node) -> None:
        self._siblings(node)[int(node.tokens[0])] = node
        self._nodes[node] = None
        self.counts.bytes += node.bytes
        self.counts.entries += 1

    def _remove(self, node: Node) -> None:
        del self._siblings(node)[int(node.tokens[0])]
        del self._nodes[node]
        self.counts.bytes -= node.bytes
        self.counts.entries -= 1


class _DigestCache(Generic[Value]):
    """Values by digest. The least recently used goes first; one that was used again outlives those
    used once, so that a long run of what never comes back does not drive it out.

    Args:
        budget: bytes; 0 keeps nothing.
        overhead: bytes that an entry takes beside its value.
    """

    def __init__(self, budget: int, overhead: int = 0) -> None:
        self.budget = budget
        self.counts = CacheCounts()
        self._overhead = overhead
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._once: OrderedDict[bytes, Value] = OrderedDict()
        self._again: OrderedDict[bytes, Value] = OrderedDict()
        self._protected = 0
        self.counts.bytes = self.counts.entries = 0

    def _find(self, digest: bytes) -> Value | None:
        """Look one up, and count that."""
        if digest in self._again:
            self._again.move_to_end(digest)
            found = self._again[digest]
        elif digest in self._once:
            found = self._again[digest] = self._once.pop(digest)
            self._protected += self._size(found)
            while self._protected > _PROTECTED * self.budget and len(self._again) > 1:
                oldest, value = self._again.popitem(last=False)
                self._protected -= self._size(value)
                self._once[oldest] = value
        else:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        return found

    def _keep(self, digest: bytes, nbytes: int, make: Callable[[], Value]) -> None:
        """Keep what ``make`` returns, of ``nbytes``, if it fits the budget and is not there."""
        wanted = nbytes + self._overhead
        if wanted > self.budget or digest in self._once or digest in self._again:
            return
        while self.counts.bytes + wanted > self.budget:
            line = self._once or self._again
            _, gone = line.popitem(last=False)
            if line is self._again:
                self._protected -= self._size(gone)
            self.counts.bytes -= self._size(gone)
            self.counts.entries -= 1
            self.counts.evictions += 1
        self._once[digest] = make()
        self.counts.bytes += wanted
        self.counts.entries += 1

    def _size(self, value: Value) -> int:
        return value.nbytes + self._overhead


class VisionCache(_DigestCache[Tensor]):
    """What the vision tower made of pictures and videos, by :attr:`qvlfast.pixels.Patches.digest`.

    Args:
        budget: bytes; 0 keeps nothing.
    """

    def get(self, digest: bytes) -> Tensor | None:
        """``[1 + deepstack levels, tokens, hidden_size]``, or None."""
        return self._find(digest)

    def put(self, digest: bytes, levels: Sequence[Tensor]) -> None:
        """Keep the rows of one picture, copied, if they fit the budget."""
        nbytes = sum(level.nbytes for level in levels)
        self._keep(digest, nbytes, lambda: torch.stack(list(levels)))


class AnswerCache(_DigestCache[NDArray[np.float32]]):
    """What the model answered, by :attr:`qvlfast.prompt.Prompt.digest` and size: vectors or scores.

    Args:
        budget: bytes; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        super().__init__(budget, _ANSWER_OVERHEAD)

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """``[size]`` or ``[]``, the caller's own; or None."""
        found = self._find(digest)
        return None if found is None else found.copy()

    def put(self, digest: bytes, value: NDArray[np.float32]) -> None:
        """Keep an answer, copied, if it fits the budget. One that is not finite is an error of its
        request, and not kept."""
        if np.isfinite(value).all():
            self._keep(digest, value.nbytes, lambda: np.array(value))
