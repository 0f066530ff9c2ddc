"""Counters of an engine: what waits, what was computed and saved, where the time went."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from .cache import CacheCounts

STAGES = ("prepare", "vision", "text")


@dataclass(frozen=True)
class Metrics:
    """A snapshot; counts run from the start, times are in seconds, work is in decoder tokens.

    Attributes:
        submitted, answered, failed, cancelled, expired, refused: requests. ``refused`` ones met
            a full queue and are not among the submitted.
        errors: failed requests by code of an :class:`qvlfast.InputError`, else by type.
        preparing: requests that are decoded and tokenised now, or wait for it.
        waiting: requests that wait for the model.
        waiting_work: what they will cost, attention and pictures included.
        oldest_wait: seconds that the oldest of them has been waiting.
        batches: forward passes; what is answered from the cache is in none.
        batch_fill: their predicted tokens as a part of the budget, on average.
        budget_tokens: tokens of a batch at most, now; lower after memory ran out.
        memory_faults: batches that ran out of memory.
        tokens, tokens_computed: of all prompts, and what went through the decoder.
        tokens_cached: of those not computed, found in a cache, as a beginning or with the answer;
            the others were shared within their batch.
        patches, patches_computed: the same for pictures and videos.
        arena_bytes: that blocks for activations have now.
        arena_spilled: bytes of activations for which such a block was too small, and the heap gave;
            more than 0 is a fault in the plan of memory, and costs nothing else.
        prefix_cache, vision_cache, answer_cache: see :class:`qvlfast.cache.CacheCounts`.
        stage_seconds: time in ``prepare`` (all host threads together), ``vision``, ``text``.
        keys_seconds: the part of ``prepare`` that was hashing for shared beginnings.
    """

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    preparing: int = 0
    waiting: int = 0
    waiting_work: float = 0.0
    oldest_wait: float = 0.0
    batches: int = 0
    batch_fill: float = 0.0
    budget_tokens: int = 0
    memory_faults: int = 0
    tokens: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    patches: int = 0
    patches_computed: int = 0
    arena_bytes: int = 0
    arena_spilled: int = 0
    prefix_cache: CacheCounts = field(default_factory=CacheCounts)
    vision_cache: CacheCounts = field(default_factory=CacheCounts)
    answer_cache: CacheCounts = field(default_factory=CacheCounts)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    keys_seconds: float = 0.0


class Counters:
    """What a :class:`Metrics` is taken from. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys((*STAGES, "keys", "fill"), 0.0)

    def add(self, **counts: int) -> None:
        """Add to counts, named as in :class:`Metrics`."""
        with self._lock:
            self._counts.update(counts)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time of a stage, or of ``keys``."""
        with self._lock:
            self._seconds[stage] += seconds

    def add_error(self, error: BaseException) -> None:
        """Count a failed request."""
        name = str(getattr(error, "code", type(error).__name__))
        with self._lock:
            self._counts["failed"] += 1
            self._errors[name] += 1

    def add_batch(self, fill: float) -> None:
        """Count a batch that was filled to this part of the budget."""
        with self._lock:
            self._counts["batches"] += 1
            self._seconds["fill"] += fill

    def values(self) -> dict[str, object]:
        """The fields of :class:`Metrics` that are counted here."""
        with self._lock:
            seconds = dict(self._seconds)
            fill, keys = seconds.pop("fill"), seconds.pop("keys")
            return {
                **self._counts,
                "errors": dict(self._errors),
                "batch_fill": fill / max(1, self._counts["batches"]),
                "stage_seconds": seconds,
                "keys_seconds": keys,
            }
