"""Which waiting requests form the next batch: by predicted cost, urgency, fairness and deadline.

Pure Python and no clock of its own: whoever calls says what time it is.

A request has a *level* of urgency and a client. A batch is of one level: the one whose claim, the
time since when it has been waiting, is oldest after each level below the first was set back by
``ageing`` seconds. So the urgent come first, and a level that has work is passed over no longer
than that. Within a level clients take turns by work (:mod:`qvlfast.fair`), and the requests of a
client keep their order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from .errors import QueueFull
from .fair import FairQueue

LEVELS = ("interactive", "normal", "bulk")

# Clients whose next request does not fit that are passed over for one batch.
_MOST_PASSED_OVER = 8
# A beginning that others of the batch have is not computed again, except for so many tokens at
# most: see sharing.MIN_SAVED.
_NOT_SHARED = 7
# Batches without a memory fault after which a shrunken budget is doubled.
_CLEAN = 64

# For requests that are being prepared an idle engine waits as long as this part of the time that
# those which are there will take, or up to so many seconds; and so long while no speed is known.
_LULL, _LONGEST_LULL, _FIRST_LULL = 0.1, 0.05, 0.01

Job = TypeVar("Job")


@dataclass(frozen=True)
class Budget:
    """The most one batch may hold, as predicted. A request over it on its own runs alone.

    Attributes:
        tokens: decoder tokens, visual ones included.
        patches: vision tower patches (four to a visual token).
        work: everything together, see :class:`Rates`.
    """

    tokens: int = 16_384
    patches: int = 16_384
    work: float = math.inf

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.patches < 1 or self.work <= 0:
            raise ValueError(f"a batch budget must be positive, got {self}")


@dataclass(frozen=True)
class Rates:
    """The unit of work is what the linears of the decoder cost for one token; this is the rest.

    Attributes:
        pair: a query and a key in the decoder's attention.
        patch: the linears of the vision tower for one patch.
        patch_pair: a query and a key in the tower's attention.
    """

    pair: float = 0.0
    patch: float = 0.0
    patch_pair: float = 0.0


@dataclass(frozen=True)
class Media:
    """One picture or video: equal ``key``, equal pixels."""

    key: Hashable
    patches: int
    frame: int  # patches of one frame: attention is within it


@dataclass(frozen=True)
class Cost:
    """What a request needs on its own.

    Attributes:
        tokens: of its prompt.
        media: its pictures and videos.
        prefixes: (hash, length) of some of its beginnings, the shortest first. A beginning that
            another request of the batch has as well is not counted again; without any, and
            without equal keys in ``media``, nothing is taken to be shared.
    """

    tokens: int
    media: tuple[Media, ...] = ()
    prefixes: tuple[tuple[int, int], ...] = ()


@dataclass(eq=False)
class Ticket(Generic[Job]):
    """A request in the queue; ``gone`` once it was taken, cancelled or too late."""

    job: Job | None
    cost: Cost
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

    level: int
    jobs: list[Job] = field(default_factory=list)
    tokens: int = 0
    patches: int = 0
    work: float = 0.0


_NOTHING = Cost(0)


class Scheduler(Generic[Job]):
    """A queue of jobs with costs. Not thread-safe: the engine holds its lock around every call.

    Args:
        budget: the most one batch may hold.
        rates: what work costs beside tokens.
        ageing: seconds by which a level stands back behind the next more urgent one.
        queue_work: waiting work from which on new requests are refused.
    """

    def __init__(
        self,
        budget: Budget,
        rates: Rates | None = None,
        *,
        ageing: float = 5.0,
        queue_work: float = math.inf,
    ) -> None:
        self.budget = self._full_budget = budget
        self._rates = rates or Rates()
        self._ageing = ageing
        self._queue_work = queue_work
        self._queues: list[FairQueue[Ticket[Job]]] = [FairQueue() for _ in LEVELS]
        self._arrivals: list[deque[Ticket[Job]]] = [deque() for _ in LEVELS]
        self._served = [-math.inf] * len(LEVELS)
        self._deadlines: list[tuple[float, int, Ticket[Job]]] = []
        self._number = 0  # breaks ties in the heap
        self._expired: list[Job] = []
        self._waiting = 0
        self.waiting_patches = 0
        self.waiting_work = 0.0
        self.preparing = 0
        self._mean_work = 0.0
        self._clean = 0
        self._rate = 0.0

    def __len__(self) -> int:
        return self._waiting

    def admit(self) -> None:
        """Count a request that is being prepared, until :meth:`push` or :meth:`withdraw`.

        Raises:
            QueueFull: what waits, and what is being prepared if it costs as much as requests
                have so far, is at the limit.
        """
        predicted = self.waiting_work + self.preparing * self._mean_work
        if predicted >= self._queue_work:
            excess = predicted + self._mean_work - self._queue_work
            raise QueueFull(excess / self._rate if self._rate else 1.0, predicted)
        self.preparing += 1

    def withdraw(self) -> None:
        """A request that was admitted does not come: it was cancelled, or could not be read."""
        self.preparing -= 1

    def push(
        self,
        job: Job,
        cost: Cost,
        now: float,
        *,
        level: int = 1,
        client: Hashable = None,
        deadline: float = math.inf,
        batch_tokens: int | None = None,
    ) -> Ticket[Job]:
        """Queue a job that was admitted.

        Args:
            level: index into :data:`LEVELS`.
            client: whose turn it takes.
            deadline: when it is no longer wanted.
            batch_tokens: a lower token budget for the batch that it will be in.
        """
        self.preparing -= 1
        patches = sum(m.patches for m in cost.media)
        work = self._work(cost.tokens, 0) + sum(map(self._media_work, cost.media))
        limit = batch_tokens or self._full_budget.tokens
        ticket = Ticket(job, cost, work, patches, level, now, deadline, limit)
        self._mean_work += 0.05 * (work - self._mean_work) if self._mean_work else work
        self._queues[level].push(client, ticket)
        self._arrivals[level].append(ticket)
        if deadline < math.inf:
            self._number += 1
            heapq.heappush(self._deadlines, (deadline, self._number, ticket))
        self._waiting += 1
        self._forget_the_gone(level)
        self.waiting_patches += patches
        self.waiting_work += work
        return ticket

    def cancel(self, ticket: Ticket[Job]) -> None:
        """Take a job out of the queue, if it is still there."""
        if not ticket.gone:
            self._remove(ticket)

    def expired(self, now: float) -> list[Job]:
        """Take out the jobs whose deadline has come; each is returned once."""
        self._expire(now)
        expired, self._expired = self._expired, []
        return expired

    def drain(self) -> list[Job]:
        """Take out every job."""
        jobs = [t.job for line in self._arrivals for t in line if t.job is not None]
        for line in self._arrivals:
            for ticket in line:
                self.cancel(ticket)
            line.clear()
        expired, self._expired = self._expired, []
        return jobs + expired

    def age(self, now: float) -> float:
        """Seconds that the oldest waiting job has been waiting; 0 if there is none."""
        heads = (self._oldest(level) for level in range(len(LEVELS)))
        return max((now - ticket.arrival for ticket in heads if ticket is not None), default=0.0)

    def lull(self) -> float:
        """Seconds for which it is worth waiting for requests that are being prepared: those of one
        call come one by one, and share more in one batch."""
        full = self.waiting_work >= self.budget.tokens
        if not self.preparing or full or self._oldest(0) is not None:
            return 0.0
        if not self._rate:
            return _FIRST_LULL
        return min(_LULL * self.waiting_work / self._rate, _LONGEST_LULL)

    def pop(
        self, now: float, *, above: int = len(LEVELS), most: float = math.inf
    ) -> Planned[Job] | None:
        """Take the next batch off the queue.

        Args:
            above: only levels more urgent than this one.
            most: only so much work.

        Returns:
            None if nothing waits that these allow.
        """
        self._expire(now)
        level = self._choose(above)
        if level is None:
            return None
        queue = self._queues[level]
        forming = _Forming[Job](self, level)
        passed_over = 0
        while (ticket := queue.peek()) is not None:
            if not forming.fits(ticket, most):
                if passed_over == _MOST_PASSED_OVER:
                    break
                passed_over += 1
                queue.set_aside()
                continue
            queue.take(forming.add(ticket))
            self._remove(ticket)
        queue.restore()
        if not forming.batch.jobs:
            return None
        self._served[level] = now
        return forming.batch

    def remainder(self, batch: Planned[Job], left: Sequence[tuple[Job, Cost]]) -> Planned[Job]:
        """A batch of which only these jobs are left, and what they cost on their own."""
        forming = _Forming[Job](self, batch.level)
        for job, cost in left:
            forming.put(job, cost, *forming.needs(cost))
        return forming.batch

    def finished(self, batch: Planned[Job], now: float, seconds: float) -> None:
        """Note that a batch is done: ``seconds`` it took, those of others in between left out."""
        self._served[batch.level] = now
        if seconds > 0:
            rate = batch.work / seconds
            self._rate += 0.2 * (rate - self._rate) if self._rate else rate
        self._clean += 1
        if self._clean >= _CLEAN and self.budget != self._full_budget:
            self._scale(2.0)

    def shrink(self) -> None:
        """Halve the budget, after memory ran out; it grows again with time."""
        self._scale(0.5)

    def _scale(self, factor: float) -> None:
        self._clean = 0
        full, budget = self._full_budget, self.budget
        self.budget = replace(
            budget,
            tokens=min(max(1, int(budget.tokens * factor)), full.tokens),
            patches=min(max(1, int(budget.patches * factor)), full.patches),
            work=min(budget.work * factor, full.work),
        )

    def _work(self, tokens: int, known: int) -> float:
        """Of a prompt whose first ``known`` tokens are computed anyway."""
        return tokens - known + self._rates.pair * (tokens**2 - known**2) / 2

    def _media_work(self, media: Media) -> float:
        return media.patches * (self._rates.patch + self._rates.patch_pair * media.frame)

    def _oldest(self, level: int) -> Ticket[Job] | None:
        line = self._arrivals[level]
        while line and line[0].gone:
            line.popleft()
        return line[0] if line else None

    def _choose(self, above: int) -> int | None:
        chosen, first = None, math.inf
        for level in range(min(above, len(LEVELS))):
            oldest = self._oldest(level)
            if oldest is None:
                continue
            claim = max(oldest.arrival, self._served[level]) + level * self._ageing
            if claim < first:
                chosen, first = level, claim
        return chosen

    def _expire(self, now: float) -> None:
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].gone):
            ticket = heapq.heappop(self._deadlines)[2]
            if ticket.job is not None:
                self._expired.append(ticket.job)
                self._remove(ticket)

    def _forget_the_gone(self, level: int) -> None:
        """Tickets that left out of turn stay in the lists; now and then those are made anew."""
        most = 2 * self._waiting + 1024
        if len(self._deadlines) > most:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].gone]
            heapq.heapify(self._deadlines)
        if len(self._arrivals[level]) > most:
            self._arrivals[level] = deque(t for t in self._arrivals[level] if not t.gone)

    def _remove(self, ticket: Ticket[Job]) -> None:
        ticket.gone, ticket.job, ticket.cost = True, None, _NOTHING
        self._waiting -= 1
        self.waiting_patches -= ticket.patches
        # Sums of floats drift; an empty queue is the place to forget that.
        self.waiting_work = self.waiting_work - ticket.work if self._waiting else 0.0


class _Forming(Generic[Job]):
    """A batch being filled, and what is known to be in it."""

    def __init__(self, scheduler: Scheduler[Job], level: int) -> None:
        self._scheduler = scheduler
        self._prefixes: set[int] = set()
        self._media: set[Hashable] = set()
        self._limit = scheduler.budget.tokens
        self._extra = (0, 0, 0.0)
        self.batch: Planned[Job] = Planned(level)

    def fits(self, ticket: Ticket[Job], most: float) -> bool:
        """Whether there is room for it; anything has room in an empty batch."""
        batch, budget = self.batch, self._scheduler.budget
        tokens, patches, work = self._extra = self.needs(ticket.cost)
        if batch.work + work > most:
            return False
        return not batch.jobs or (
            batch.tokens + tokens <= min(self._limit, ticket.batch_tokens)
            and batch.patches + patches <= budget.patches
            and batch.work + work <= budget.work
        )

    def add(self, ticket: Ticket[Job]) -> float:
        """Put in what :meth:`fits` was last asked about; returns the work that it adds."""
        if ticket.job is not None:
            self.put(ticket.job, ticket.cost, *self._extra)
        self._limit = min(self._limit, ticket.batch_tokens)
        return self._extra[2]

    def needs(self, cost: Cost) -> tuple[int, int, float]:
        """Tokens, patches and work that a request adds to the batch."""
        shared = next((n for h, n in reversed(cost.prefixes) if h in self._prefixes), 0)
        known = max(0, shared - _NOT_SHARED)
        new = {m.key: m for m in cost.media if m.key not in self._media}.values()
        work = self._scheduler._work(cost.tokens, known) + sum(
            map(self._scheduler._media_work, new)
        )
        return cost.tokens - known, sum(m.patches for m in new), work

    def put(self, job: Job, cost: Cost, tokens: int, patches: int, work: float) -> None:
        """Put in a request that adds this."""
        self.batch.jobs.append(job)
        self.batch.tokens += tokens
        self.batch.patches += patches
        self.batch.work += work
        self._prefixes.update(h for h, _ in cost.prefixes)
        self._media.update(m.key for m in cost.media)
