"""Which waiting requests form the next batch.

First in, first out, under a budget of tokens and of patches. A request over the budget on its own
still runs, alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Job = TypeVar("Job")


@dataclass(frozen=True)
class Budget:
    """The most one batch may hold.

    Attributes:
        tokens: decoder tokens, visual ones included.
        patches: vision tower patches (four to a visual token).
    """

    tokens: int = 16_384
    patches: int = 16_384

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.patches < 1:
            raise ValueError(f"a batch budget must be positive, got {self}")


@dataclass(frozen=True)
class _Waiting(Generic[Job]):
    job: Job
    tokens: int
    patches: int
    batch_tokens: int


class Scheduler(Generic[Job]):
    """A queue of jobs with costs. Not thread-safe: the engine holds its lock around every call."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waiting: deque[_Waiting[Job]] = deque()
        self.waiting_patches = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, job: Job, *, tokens: int, patches: int, batch_tokens: int | None = None) -> None:
        """Queue ``job``, which costs ``tokens`` decoder tokens and ``patches`` patches.

        ``batch_tokens`` lowers the token budget of the batch that it will be in.
        """
        limit = min(batch_tokens or self.budget.tokens, self.budget.tokens)
        self._waiting.append(_Waiting(job, tokens, patches, limit))
        self.waiting_patches += patches

    def pop_batch(self) -> list[Job]:
        """Take the next batch off the queue: empty only if nothing waits."""
        batch: list[Job] = []
        tokens = patches = 0
        limit = self.budget.tokens
        while self._waiting:
            head = self._waiting[0]
            tokens += head.tokens
            patches += head.patches
            limit = min(limit, head.batch_tokens)
            if batch and (tokens > limit or patches > self.budget.patches):
                break
            self._waiting.popleft()
            self.waiting_patches -= head.patches
            batch.append(head.job)
        return batch
