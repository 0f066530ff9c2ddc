"""What waits for one model: its requests in the queue, and what a batch of them may hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .cost import Budget, Cost, Rates
from .errors import QueueFull
from .fair import FairQueue, Ledger

# Batches without a memory fault after which a shrunken budget is doubled.
_CLEAN = 64

Job = TypeVar("Job")


@dataclass(eq=False)
class Ticket(Generic[Job]):
    """A request in the queue; ``gone`` once it was taken, cancelled or too late."""

    job: Job | None
    cost: Cost
    lane: Lane[Job]
    work: float
    patches: int
    level: int
    arrival: float
    deadline: float
    batch_tokens: int
    gone: bool = False


@dataclass(eq=False)
class Planned(Generic[Job]):
    """A batch: its jobs in order, and what they are predicted to cost together."""

    lane: Lane[Job]
    level: int
    jobs: list[Job] = field(default_factory=list)
    tokens: int = 0
    patches: int = 0
    work: float = 0.0

    @property
    def operations(self) -> float:
        """The work in a unit that is the same for all models."""
        return self.work * self.lane.rates.unit


class Lane(Generic[Job]):
    """The part of a :class:`qvlfast.scheduler.Scheduler` that one model has to itself.

    Args:
        ledgers: of each level, in which the turns of its clients are counted for all lanes.
        budget: the most one batch may hold.
        rates: what the model's work is made of.
        queue_work: waiting work from which on new requests are refused.

    Attributes:
        queues: those that wait, by level.
        arrivals: the same, and some that are gone, in the order of their coming.
        waiting, waiting_patches, waiting_work: how many they are, and what they will cost.
        preparing: requests that were admitted and are not here yet.
        speed: work a second, as measured; 0 before the first batch.
    """

    def __init__(
        self, ledgers: Sequence[Ledger], budget: Budget, rates: Rates, queue_work: float
    ) -> None:
        self.budget = self.full_budget = budget
        self.rates = rates
        self._queue_work = queue_work
        self.queues: list[FairQueue[Ticket[Job]]] = [FairQueue(ledger) for ledger in ledgers]
        self.arrivals: list[deque[Ticket[Job]]] = [deque() for _ in ledgers]
        self.waiting = 0
        self.waiting_patches = 0
        self.waiting_work = 0.0
        self.preparing = 0
        self.speed = 0.0
        self._mean_work = 0.0
        self._clean = 0

    def admit(self, in_any_case: bool = False) -> None:
        """Count a request that is being prepared, until it is queued or :meth:`withdraw`.

        Args:
            in_any_case: whatever waits.

        Raises:
            QueueFull: what waits, and what is being prepared if it costs as much as requests
                have so far, is at the limit.
        """
        predicted = self.waiting_work + self.preparing * self._mean_work
        if predicted >= self._queue_work and not in_any_case:
            excess = predicted + self._mean_work - self._queue_work
            raise QueueFull(excess / self.speed if self.speed else 1.0, predicted)
        self.preparing += 1

    def withdraw(self) -> None:
        """A request that was admitted does not come: it was cancelled, or could not be read."""
        self.preparing -= 1

    def enter(self, ticket: Ticket[Job]) -> None:
        """A request that was admitted is here, and waits."""
        self.preparing -= 1
        self._mean_work = _towards(self._mean_work, ticket.work, 0.05)
        self.arrivals[ticket.level].append(ticket)
        self.waiting += 1
        self.waiting_patches += ticket.patches
        self.waiting_work += ticket.work
        most = 2 * self.waiting + 1024
        if len(self.arrivals[ticket.level]) > most:  # some that left out of turn are still there
            self.arrivals[ticket.level] = deque(
                t for t in self.arrivals[ticket.level] if not t.gone
            )

    def leave(self, ticket: Ticket[Job]) -> None:
        """A request waits no longer, for whatever reason."""
        self.waiting -= 1
        self.waiting_patches -= ticket.patches
        # Sums of floats drift; an empty queue is the place to forget that.
        self.waiting_work = self.waiting_work - ticket.work if self.waiting else 0.0

    def oldest(self, level: int) -> Ticket[Job] | None:
        """Of a level, the one that has been waiting longest."""
        line = self.arrivals[level]
        while line and line[0].gone:
            line.popleft()
        return line[0] if line else None

    def age(self, now: float) -> float:
        """Seconds that the oldest request has been waiting; 0 if there is none."""
        heads = (self.oldest(level) for level in range(len(self.arrivals)))
        return max((now - ticket.arrival for ticket in heads if ticket is not None), default=0.0)

    def ran(self, work: float, seconds: float) -> None:
        """A batch is done."""
        if seconds > 0:
            self.speed = _towards(self.speed, work / seconds, 0.2)
        self._clean += 1
        if self._clean >= _CLEAN and self.budget != self.full_budget:
            self._scale(2.0)

    def shrink(self) -> None:
        """Halve the budget, after memory ran out; it grows again with time."""
        self._scale(0.5)

    def _scale(self, factor: float) -> None:
        self._clean = 0
        self.budget = self.budget.scaled(factor, self.full_budget)


def _towards(mean: float, value: float, step: float) -> float:
    """A running mean, which the first value starts."""
    return mean + step * (value - mean) if mean else value
