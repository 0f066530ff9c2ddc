"""Which waiting requests form the next batch: by predicted cost, urgency, fairness and deadline.

Pure Python and no clock of its own: whoever calls says what time it is.

All models of a device share a queue. A request has a *level* of urgency and a client. A batch is of
one model and one level: the level whose claim, the time since when it has been waiting, is oldest
after each below the first was set back by ``ageing`` seconds. So the urgent come first, and a level
that has work is passed over no longer than that. Within a level clients take turns by work
(:mod:`qvlfast.fair`), whichever models they use; the one whose turn it is decides on the model, and
the requests of a client to a model keep their order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Sequence
from typing import Generic

from .cost import Budget, Cost, Rates
from .fair import Ledger
from .lane import Job, Lane, Planned, Ticket

LEVELS = ("interactive", "normal", "bulk")

# Clients whose next request does not fit that are passed over for one batch.
_MOST_PASSED_OVER = 8
# A beginning that others of the batch have is not computed again, except for so many tokens at
# most: see sharing.MIN_SAVED.
_NOT_SHARED = 7

# For requests that are being prepared an idle engine waits as long as this part of the time that
# those which are there will take, or up to so many seconds; and so long while no speed is known.
_LULL, _LONGEST_LULL, _FIRST_LULL = 0.1, 0.05, 0.01

_NOTHING = Cost(0)


class Scheduler(Generic[Job]):
    """A queue of jobs with costs. Not thread-safe: the engine holds its lock around every call.

    Args:
        ageing: seconds by which a level stands back behind the next more urgent one.
    """

    def __init__(self, *, ageing: float = 5.0) -> None:
        self._ageing = ageing
        self._ledgers = [Ledger() for _ in LEVELS]
        self._lanes: list[Lane[Job]] = []
        self._served = [-math.inf] * len(LEVELS)
        self._deadlines: list[tuple[float, int, Ticket[Job]]] = []
        self._number = 0  # breaks ties in the heap
        self._expired: list[Job] = []

    def __len__(self) -> int:
        return sum(lane.waiting for lane in self._lanes)

    @property
    def waiting_patches(self) -> int:
        """Of all that waits."""
        return sum(lane.waiting_patches for lane in self._lanes)

    def add_lane(
        self, budget: Budget, rates: Rates | None = None, *, queue_work: float = math.inf
    ) -> Lane[Job]:
        """For one more model; see :class:`qvlfast.lane.Lane`."""
        lane: Lane[Job] = Lane(self._ledgers, budget, rates or Rates(), queue_work)
        self._lanes.append(lane)
        return lane

    def remove_lane(self, lane: Lane[Job]) -> None:
        """Of a model for which nothing waits and nothing will come."""
        self._lanes.remove(lane)

    def push(
        self,
        lane: Lane[Job],
        job: Job,
        cost: Cost,
        now: float,
        *,
        level: int = 1,
        client: Hashable = None,
        deadline: float = math.inf,
        batch_tokens: int | None = None,
    ) -> Ticket[Job]:
        """Queue a job that its lane admitted.

        Args:
            level: index into :data:`LEVELS`.
            client: whose turn it takes.
            deadline: when it is no longer wanted.
            batch_tokens: a lower token budget for the batch that it will be in.
        """
        work, limit = cost.work(lane.rates), batch_tokens or lane.full_budget.tokens
        ticket = Ticket(job, cost, lane, work, cost.patches, level, now, deadline, limit)
        lane.queues[level].push(client, ticket)
        lane.enter(ticket)
        if deadline < math.inf:
            self._number += 1
            heapq.heappush(self._deadlines, (deadline, self._number, ticket))
            if len(self._deadlines) > 2 * len(self) + 1024:
                self._deadlines = [entry for entry in self._deadlines if not entry[2].gone]
                heapq.heapify(self._deadlines)
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

    def lull(self) -> float:
        """Seconds for which it is worth waiting for requests that are being prepared: those of one
        call come one by one, and share more in one batch."""
        level = self._choose(len(LEVELS))
        if level is None or any(lane.oldest(0) is not None for lane in self._lanes):
            return 0.0  # nothing waits, or something urgent
        lane = self._in_turn(level)[0]
        if not lane.preparing or lane.waiting_work >= lane.budget.tokens:
            return 0.0
        if not lane.speed:
            return _FIRST_LULL
        return min(_LULL * lane.waiting_work / lane.speed, _LONGEST_LULL)

    def pop(
        self, now: float, *, above: int = len(LEVELS), most: float = math.inf
    ) -> Planned[Job] | None:
        """Take the next batch off the queue.

        Args:
            above: only levels more urgent than this one.
            most: only so much work, as :attr:`Planned.operations`.

        Returns:
            None if nothing waits that these allow.
        """
        self._expire(now)
        level = self._choose(above)
        if level is None:
            return None
        for lane in self._in_turn(level):
            batch = self._fill(lane, level, most)
            if batch.jobs:
                self._served[level] = now
                return batch
        return None

    def remainder(self, batch: Planned[Job], left: Sequence[tuple[Job, Cost]]) -> Planned[Job]:
        """A batch of which only these jobs are left, and what they cost on their own."""
        forming = _Forming(batch.lane, batch.level)
        for job, cost in left:
            forming.put(job, cost, *forming.needs(cost))
        return forming.batch

    def finished(self, batch: Planned[Job], now: float, seconds: float) -> None:
        """Note that a batch is done: ``seconds`` it took, those of others in between left out."""
        self._served[batch.level] = now
        batch.lane.ran(batch.work, seconds)

    def _fill(self, lane: Lane[Job], level: int, most: float) -> Planned[Job]:
        """A batch of what fits it, in turn."""
        queue, unit = lane.queues[level], lane.rates.unit
        forming = _Forming(lane, level)
        passed_over = 0
        while (ticket := queue.peek()) is not None:
            if not forming.fits(ticket, most / unit):
                if passed_over == _MOST_PASSED_OVER:
                    break
                passed_over += 1
                queue.set_aside()
                continue
            queue.take(forming.add(ticket) * unit)
            self._remove(ticket)
        queue.restore()
        return forming.batch

    def _in_turn(self, level: int) -> list[Lane[Job]]:
        """The lanes in which something of a level waits, that of the client in turn first."""
        turns = [(lane.queues[level].turn(), lane) for lane in self._lanes]
        waiting = [(turn, lane) for turn, lane in turns if turn is not None]
        return [lane for _, lane in sorted(waiting, key=lambda entry: entry[0])]

    def _choose(self, above: int) -> int | None:
        chosen, first = None, math.inf
        for level in range(min(above, len(LEVELS))):
            heads = [t.arrival for lane in self._lanes if (t := lane.oldest(level)) is not None]
            if heads:
                claim = max(min(heads), self._served[level]) + level * self._ageing
                if claim < first:
                    chosen, first = level, claim
        return chosen

    def _expire(self, now: float) -> None:
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].gone):
            ticket = heapq.heappop(self._deadlines)[2]
            if ticket.job is not None:
                self._expired.append(ticket.job)
                self._remove(ticket)

    def _remove(self, ticket: Ticket[Job]) -> None:
        ticket.gone, ticket.job, ticket.cost = True, None, _NOTHING
        ticket.lane.leave(ticket)


class _Forming(Generic[Job]):
    """A batch being filled, and what is known to be in it."""

    def __init__(self, lane: Lane[Job], level: int) -> None:
        self._rates = lane.rates
        self._budget = lane.budget
        self._prefixes: set[int] = set()
        self._media: set[Hashable] = set()
        self._limit = lane.budget.tokens
        self._extra = (0, 0, 0.0)
        self.batch: Planned[Job] = Planned(lane, level)

    def fits(self, ticket: Ticket[Job], most: float) -> bool:
        """Whether there is room for it; anything has room in an empty batch."""
        batch, budget = self.batch, self._budget
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
        work = self._rates.text(cost.tokens, known) + sum(map(self._rates.media, new))
        return cost.tokens - known, sum(m.patches for m in new), work

    def put(self, job: Job, cost: Cost, tokens: int, patches: int, work: float) -> None:
        """Put in a request that adds this."""
        self.batch.jobs.append(job)
        self.batch.tokens += tokens
        self.batch.patches += patches
        self.batch.work += work
        self._prefixes.update(h for h, _ in cost.prefixes)
        self._media.update(m.key for m in cost.media)
