"""A model that an engine serves, and the requests to it that are on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .cost import Budget
from .lane import Lane, Ticket
from .prompt import Prompt
from .request import Pending, Terms
from .runner import Ready, Runner


@dataclass(eq=False)
class Served:
    """One of the models of an engine.

    Attributes:
        runner: the model, and what runs batches through it.
        budget: the most one batch may hold.
        queue_work: waiting work, in tokens, from which on requests are refused.
        lane: its part of the engine's queue.
        open: requests that are not answered yet.
        closed: no more requests are accepted.
    """

    runner: Runner
    budget: Budget
    queue_work: float
    lane: Lane[Job] = field(init=False)
    open: set[Job] = field(default_factory=set)
    closed: bool = False


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        served: the model that it is for.
        prepare: makes its prompt; None once that was asked for.
        level: its priority as an index into :data:`qvlfast.scheduler.LEVELS`.
        ready: its prompt, while it waits for the model.
        ticket: its place in the queue.
        counted: by its lane, as being prepared.
        gone: answered, failed or cancelled.
    """

    served: Served
    prepare: Callable[[], Prompt] | None
    terms: Terms
    level: int
    future: Pending
    ready: Ready | None = None
    ticket: Ticket[Job] | None = None
    counted: bool = False
    gone: bool = False

    def wanted(self, now: float) -> bool:
        """Whether anybody still waits for it."""
        return not self.future.unwanted and now < self.terms.deadline
