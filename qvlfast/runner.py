"""Runs batches of prompts through a model, with what they share computed once and what is known
from earlier batches not at all."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arena import HEAP, Arena, Memory
from .arguments import whole
from .batch import Cut, Packed, pack, piece_limits
from .cache import AnswerCache, CacheCounts, PrefixCache, VisionCache
from .config import ModelConfig
from .cost import Cost, Media, Rates
from .graphs import Graphs, fit
from .memory import ArenaPlan
from .metrics import Counters
from .model import Model
from .pixels import Patches
from .plan import plan_shared
from .prompt import Prompt
from .sharing import Keys, Numbers

# The part of the budget for beginnings that answers have instead: 32 of 512 MiB, enough for about
# 4,000 vectors of the 2B model.
_ANSWERS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Sharing:
    """What is computed once only.

    Attributes:
        prefixes: common beginnings, equal prompts and equal pictures within a batch.
        cache_bytes: for beginnings and answers across batches; needs ``prefixes``.
        vision_cache_bytes: for pictures across batches.
    """

    prefixes: bool = True
    cache_bytes: int = 0
    vision_cache_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "vision_cache_bytes"):
            whole(name, getattr(self, name), least=0)


@dataclass(frozen=True, eq=False)
class Ready:
    """A prompt with what the host threads found out about it.

    Attributes:
        keys: None where nothing is shared.
        cost: what it takes on its own, and what of that others may have.
        cached_vision: its pictures may come from the cache, and be put there.
        size: of its vector; see :class:`qvlfast.batch.Cut`.
        digest: what its answer is kept under; None where it is not.
    """

    prompt: Prompt
    keys: Keys | None
    cost: Cost
    cached_vision: bool = True
    size: int | None = None
    digest: bytes | None = None


def work_rates(config: ModelConfig) -> Rates:
    """What attention, the tower and the decoder's linears cost, by multiplications."""
    text, vision = config.text, config.vision
    heads = (text.num_heads + text.num_kv_heads) * text.head_dim
    layer = text.hidden_size * (2 * heads + 3 * text.intermediate_size)
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    decoder = layer * text.num_layers
    return Rates(
        pair=2 * text.num_heads * text.head_dim / layer,
        patch=block * vision.depth / decoder,
        patch_pair=2 * vision.hidden_size * vision.depth / decoder,
        unit=float(decoder),
    )


class Runner:
    """One model and its caches. :meth:`ready` is for any thread, the rest for one alone.

    Args:
        graphs: for batches of text that fit them, which then share nothing; None: for none.
        plan: of the memory that a batch's activations are put in; None: they come from the heap.

    Attributes:
        rates: what a batch's work is predicted with.
        counters: of what was computed; the engine adds its own.
        device: where the model is.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        sharing: Sharing,
        graphs: Graphs | None = None,
        plan: ArenaPlan | None = None,
    ) -> None:
        self.model = model
        self.rates = work_rates(model.config)
        self.device = device
        self._sharing = sharing
        self._graphs = graphs
        self._plan = plan
        self._limits = piece_limits(device.type)
        self.reset()

    def reset(self) -> None:
        """Start with empty caches, and locks that nobody holds."""
        self.counters = Counters()
        self._numbers = Numbers()
        self._arenas: list[Arena] = []  # that no batch is using
        self._blocks: weakref.WeakSet[Arena] = weakref.WeakSet()
        budget = self._sharing.cache_bytes if self._sharing.prefixes else 0
        self._answers = AnswerCache(budget // _ANSWERS)
        self._prefixes = PrefixCache(budget - self._answers.budget)
        self._vision = VisionCache(self._sharing.vision_cache_bytes)

    @property
    def arena_bytes(self) -> int:
        """Of the blocks for activations."""
        return sum(arena.size for arena in list(self._blocks))

    def forget(self) -> None:
        """Drop what the caches hold, the graphs, and memory that no batch is using."""
        self._arenas.clear()
        self._prefixes.clear()
        self._vision.clear()
        self._answers.clear()
        if self._graphs is not None:
            self._graphs.forget()

    @property
    def counts(self) -> dict[str, CacheCounts]:
        """Of each cache, named as in :class:`qvlfast.Metrics`."""
        return {
            "prefix_cache": replace(self._prefixes.counts),
            "vision_cache": replace(self._vision.counts),
            "answer_cache": replace(self._answers.counts),
        }

    def ready(self, prompt: Prompt, cached_vision: bool = True, size: int | None = None) -> Ready:
        """Find out what a prompt may share, and what it costs."""
        start = time.perf_counter()
        share = self._sharing.prefixes
        keys = Keys.of_prompt(prompt, self._numbers) if share else None
        named = share or (cached_vision and self._vision.budget > 0)
        media = tuple(
            Media(m.digest if named else object(), len(m.pixels), m.grid[1] * m.grid[2])
            for m in prompt.media
        )
        cost = Cost(len(prompt.ids), media, keys.prefixes() if keys else ())
        # Of pictures that are not to be kept, what was made of them is not kept either.
        kept = self._answers.budget > 0 and (cached_vision or not prompt.media)
        digest = b"%d " % (size or 0) + prompt.digest if kept else None
        self.counters.add_seconds("keys", time.perf_counter() - start)
        return Ready(prompt, keys, cost, cached_vision, size, digest)

    def known(self, ready: Ready) -> NDArray[np.float32] | None:
        """The answer to an equal prompt of an earlier batch: ``[size]`` or ``[]``."""
        found = None if ready.digest is None else self._answers.get(ready.digest)
        if found is not None:
            self._count([ready], cached=ready.cost.tokens)
        return found

    def run(self, batch: Sequence[Ready]) -> Generator[None, None, list[NDArray[np.float32]]]:
        """A vector ``[size]``, or a score ``[]``, for each; yields between pieces of the work."""
        if self._graphs is not None and _fits(batch, self._graphs):
            return self._replay(batch, self._graphs)
        known = self._known_pictures(batch)
        packed = self._pack(batch, known)
        with self._room(packed) as memory:
            return (yield from self._compute(batch, packed, known, memory))

    @contextmanager
    def _room(self, packed: Packed) -> Iterator[Memory]:
        """Memory for a pass, all of it there before it begins. A batch that runs between two pieces
        of another has its own."""
        if self._plan is None:
            yield HEAP
            return
        resident = sum(segment.length for segment in packed.plan.resident)
        arena = self._arenas.pop() if self._arenas else Arena(self.device)
        self._blocks.add(arena)
        arena.reserve(self._plan.size(packed.batch, resident))
        try:
            yield arena
        finally:
            if arena.spilled:
                self.counters.add(arena_spilled=arena.spilled)
            self._arenas.append(arena)

    def _compute(
        self,
        batch: Sequence[Ready],
        packed: Packed,
        known: dict[bytes, Tensor],
        memory: Memory,
    ) -> Generator[None, None, list[NDArray[np.float32]]]:
        kept: list[Tensor] = [known[digest] for digest in packed.ready]
        if packed.batch.vision is not None:
            vision = self.model.vision(packed.batch.vision, memory=memory)
            with memory.scope():
                computed = yield from self._timed("vision", vision)
            self._keep_pictures(batch, packed.media, computed)
        else:
            computed = []
        levels = _levels(kept, computed)
        places = _places(batch, packed.rows)
        text = self.model.text(
            packed.batch,
            levels,
            [r.layers for r in packed.plan.resident],
            packed.spans,
            cuts=[place.cut for place in places],
            memory=memory,
        )
        with memory.scope():
            output = yield from self._timed("text", text)
        for index, layers in zip(packed.plan.keep, output.kept, strict=True):
            segment = packed.plan.segments[index]
            keys = batch[segment.prompt].keys
            if keys is not None:
                self._prefixes.insert(keys, segment.start, segment.stop, layers)
        self._count(
            batch,
            computed=len(packed.batch.ids),
            cached=sum(r.length for r in packed.plan.resident),
            patches=sum(len(m.pixels) for m in packed.media) if packed.batch.vision else 0,
        )
        return self._keep_answers(batch, _spread(output.values, places))

    def _replay(self, batch: Sequence[Ready], graphs: Graphs) -> list[NDArray[np.float32]]:
        """:meth:`run` in one piece, of prompts that fit a graph."""
        packed = pack(
            [ready.prompt for ready in batch],
            self.model.config.vision.spatial_merge_size,
            self.device,
        )
        places = _places(batch, packed.rows)
        start = time.perf_counter()
        values = self.model.head(graphs(packed.batch), [place.cut for place in places])
        self.counters.add_seconds("text", time.perf_counter() - start)
        self._count(batch, computed=len(packed.batch.ids))
        return self._keep_answers(batch, _spread(values, places))

    def _keep_answers(
        self, batch: Sequence[Ready], values: list[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        for ready, value in zip(batch, values, strict=True):
            if ready.digest is not None:
                self._answers.put(ready.digest, value)
        return values

    def _pack(self, batch: Sequence[Ready], known: dict[bytes, Tensor]) -> Packed:
        keys = [ready.keys for ready in batch if ready.keys is not None]
        plan = None
        if self._sharing.prefixes:
            plan = plan_shared(keys, self._prefixes if self._sharing.cache_bytes else None)
        return pack(
            [ready.prompt for ready in batch],
            self.model.config.vision.spatial_merge_size,
            self.device,
            share=self._sharing.prefixes,
            plan=plan,
            limits=self._limits,
            ready=known,
        )

    def _known_pictures(self, batch: Sequence[Ready]) -> dict[bytes, Tensor]:
        if not self._vision.budget:
            return {}
        found = {}
        for digest in {m.digest for r in batch if r.cached_vision for m in r.prompt.media}:
            levels = self._vision.get(digest)
            if levels is not None:
                found[digest] = levels
        return found

    def _keep_pictures(
        self, batch: Sequence[Ready], media: Sequence[Patches], levels: Sequence[Tensor]
    ) -> None:
        if not self._vision.budget:
            return
        wanted = {m.digest for r in batch if r.cached_vision for m in r.prompt.media}
        start = 0
        for patches in media:
            stop = start + patches.num_tokens
            if patches.digest in wanted:
                self._vision.put(patches.digest, [level[start:stop] for level in levels])
            start = stop

    def _timed(self, stage: str, pieces: Generator[None, None, T]) -> Generator[None, None, T]:
        """The same pieces; only the time within them is counted."""
        while True:
            start = time.perf_counter()
            try:
                next(pieces)
            except StopIteration as stop:
                return stop.value
            finally:
                self.counters.add_seconds(stage, time.perf_counter() - start)
            yield

    def _count(
        self, batch: Sequence[Ready], computed: int = 0, cached: int = 0, patches: int = 0
    ) -> None:
        self.counters.add(
            tokens=sum(ready.cost.tokens for ready in batch),
            tokens_computed=computed,
            tokens_cached=cached,
            patches=sum(m.patches for ready in batch for m in ready.cost.media),
            patches_computed=patches,
        )


@dataclass(frozen=True)
class _Place:
    """Where the prompts are that want vectors of one size.

    Attributes:
        prompts: their indices in the batch.
        rows: of each of them in what ``cut`` gives.
    """

    cut: Cut
    prompts: list[int]
    rows: NDArray[np.intp]


def _places(batch: Sequence[Ready], reads: NDArray[np.int64]) -> list[_Place]:
    """For each size; ``reads`` has which of the batch's reads is each prompt's own."""
    places = []
    for size in dict.fromkeys(ready.size for ready in batch):
        prompts = [i for i, ready in enumerate(batch) if ready.size == size]
        own, rows = np.unique(reads[prompts], return_inverse=True)
        places.append(_Place(Cut(size, own), prompts, rows))
    return places


def _spread(values: Sequence[Tensor], places: Sequence[_Place]) -> list[NDArray[np.float32]]:
    """What the cuts gave, in the order of the prompts."""
    found: dict[int, NDArray[np.float32]] = {}
    for tensor, place in zip(values, places, strict=True):
        rows = tensor.cpu().numpy()
        found |= {i: rows[row] for i, row in zip(place.prompts, place.rows, strict=True)}
    return [found[i] for i in range(len(found))]


def _fits(batch: Sequence[Ready], graphs: Graphs) -> bool:
    if any(ready.prompt.media for ready in batch):
        return False
    lengths = [len(ready.prompt.ids) for ready in batch]
    return fit(lengths, graphs.buckets).bucket is not None


def _levels(kept: Sequence[Tensor], computed: Sequence[Tensor]) -> list[Tensor]:
    """Visual rows, those from the cache first, for each level."""
    if not kept:
        return list(computed)
    count = kept[0].shape[0]
    return [
        torch.cat([*(rows[level] for rows in kept), *([computed[level]] if computed else [])])
        for level in range(count)
    ]
