"""Which tokens of a batch are computed, which are there already, and what continues what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cache import KeysValues, Node, PrefixCache
from .sharing import Keys, Segment, Tree, no_sharing, prefix_tree


@dataclass(frozen=True)
class Resident:
    """A beginning, or a part of one, whose keys and values are there: a segment without queries.

    Attributes:
        length: tokens.
        parent: a resident segment before it, or −1.
        layers: keys and values of each layer.
    """

    length: int
    parent: int
    layers: Sequence[KeysValues]


@dataclass(frozen=True)
class Plan:
    """A forest: the resident segments, then those that are computed, parents first.

    Attributes:
        resident: segments ``0 … len(resident) − 1``.
        segments: the others; ``parent`` counts both.
        last: for each prompt the segment that ends with its last token, as an index into
            ``segments``.
        keep: indices into ``segments`` of those worth keeping for later batches.
    """

    resident: tuple[Resident, ...]
    segments: tuple[Segment, ...]
    last: tuple[int, ...]
    keep: tuple[int, ...] = ()


def plan_alone(lengths: Sequence[int]) -> Plan:
    """Nothing shared, nothing cached."""
    tree = no_sharing(lengths)
    return Plan((), tree.segments, tree.last)


def plan_shared(keys: Sequence[Keys], cache: PrefixCache | None = None) -> Plan:
    """Every beginning once, and none that the cache has."""
    if cache is None:
        tree = prefix_tree(keys)
        return Plan((), tree.segments, tree.last)
    tree = prefix_tree(keys, cache.seen)
    made = _Planner(keys, tree, cache).make()
    cache.remember(keys)
    return made


class _Planner:
    """Takes what the cache has out of a tree of prompts."""

    def __init__(self, keys: Sequence[Keys], tree: Tree, cache: PrefixCache) -> None:
        self._lengths = [len(k.tokens) for k in keys]
        self._tree = tree
        self._known: list[tuple[list[Node], int]] = []
        for k in keys:
            chain, depth = cache.match(k)
            cache.use(chain)
            self._known.append((chain, depth))
        # Where resident segments have to end, for each node.
        self._ends: dict[Node, set[int]] = {}
        # Computed segments, with the length of the resident beginning they continue, or None and
        # the computed segment that they do.
        self._computed: list[tuple[Segment, int | None]] = []

    def make(self) -> Plan:
        tree = self._tree
        place: list[int] = []  # of each segment of the tree among the computed ones; −1: resident
        for segment in tree.segments:
            depth = self._known[segment.prompt][1]
            if segment.stop <= depth:
                place.append(-1)
                continue
            start = max(segment.start, depth)
            before = place[segment.parent] if segment.parent >= 0 else -1
            place.append(self._compute(replace(segment, start=start), before))
        last, alone = [], {}
        for prompt, tip in enumerate(tree.last):
            if place[tip] < 0 and tip not in alone:
                # All of it is there, but not the last token's output.
                end = self._lengths[prompt]
                alone[tip] = self._compute(Segment(prompt, end - 1, end, -1), -1)
            last.append(place[tip] if place[tip] >= 0 else alone[tip])
        resident, ending = self._resident()
        segments = []
        for segment, after in self._computed:
            parent = -1
            if after is None:
                parent = segment.parent + len(resident)
            elif after:
                parent = ending[self._node(segment.prompt, after), after]
            segments.append(replace(segment, parent=parent))
        keep = tuple(i for i, s in enumerate(segments) if s.sequences > 1)
        return Plan(tuple(resident), tuple(segments), tuple(last), keep)

    def _compute(self, segment: Segment, before: int) -> int:
        """Compute a segment that continues the computed one ``before``, or what is resident."""
        start = None if before >= 0 else segment.start
        if start:
            self._need(segment.prompt, start)
        self._computed.append((replace(segment, parent=before), start))
        return len(self._computed) - 1

    def _need(self, prompt: int, end: int) -> None:
        for node in self._known[prompt][0]:
            if node.start < end:
                self._ends.setdefault(node, set()).add(min(end, node.stop))

    def _node(self, prompt: int, end: int) -> Node:
        """The node in which the first ``end`` tokens of a prompt end."""
        return next(node for node in self._known[prompt][0] if node.stop >= end)

    def _resident(self) -> tuple[list[Resident], dict[tuple[Node, int], int]]:
        """The resident segments, and which of them ends where."""
        resident: list[Resident] = []
        ending: dict[tuple[Node, int], int] = {}
        for node in sorted(self._ends, key=lambda n: n.start):
            parent = -1 if node.parent is None else ending[node.parent, node.start]
            start = node.start
            for end in sorted(self._ends[node]):
                resident.append(Resident(end - start, parent, node.part(start, end)))
                parent = ending[node, end] = len(resident) - 1
                start = end
        return resident, ending
