"""Engines of one device take turns, so that two models do not fight over it."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count


class Turns:
    """Whose piece of work is next. Thread-safe.

    The one that has been waiting longest, after each level of priority was set back by ``ageing``
    seconds behind the one before: the rule of :class:`qvlfast.scheduler.Scheduler`, so that an
    urgent request to one model passes a bulk job of another, and nobody starves.

    Args:
        ageing: seconds for a level of priority.
        clock: in seconds.
    """

    def __init__(self, ageing: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._ageing = ageing
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []
        self._numbers = count()
        self._taken = False

    @contextmanager
    def take(self, level: int) -> Iterator[None]:
        """Wait for a turn, have it for the time of a ``with`` statement.

        Args:
            level: of priority, 0 is the most urgent.
        """
        with self._changed:
            place = (self._clock() + level * self._ageing, next(self._numbers))
            heapq.heappush(self._waiting, place)
            self._changed.wait_for(lambda: not self._taken and self._waiting[0] == place)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


_KNOWN: dict[str, Turns] = {}


def turns_of(device: str) -> Turns:
    """The turns of a device, such as ``cpu`` or ``cuda:0``, in this process."""
    return _KNOWN.setdefault(device, Turns())


if hasattr(os, "register_at_fork"):
    # A forked child has none of the threads that might hold a turn.
    os.register_at_fork(after_in_child=_KNOWN.clear)
