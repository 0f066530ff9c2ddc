"""Queues of several clients that take turns by the work they were given, not by their requests.

Start-time fair queueing: a client's turn comes at the virtual time when its earlier work is paid
for; the queue's own virtual time is that of the last turn. A client that comes back after a pause
starts there, so that it neither saves up turns nor loses any.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What can wait here. One that is ``gone`` is passed over and dropped when its turn comes."""

    gone: bool


Item = TypeVar("Item", bound=Waiting)


@dataclass(eq=False)
class _Client(Generic[Item]):
    name: Hashable
    turn: float
    items: deque[Item] = field(default_factory=deque)


class FairQueue(Generic[Item]):
    """First in, first out for each client. Every call is O(log clients); not thread-safe."""

    def __init__(self) -> None:
        self._time = 0.0
        self._number = 0
        self._active: dict[Hashable, _Client[Item]] = {}
        self._turns: list[tuple[float, int, _Client[Item]]] = []
        self._aside: list[_Client[Item]] = []
        # Turns of clients that have nothing waiting, where still in the future.
        self._owed: dict[Hashable, float] = {}

    def push(self, client: Hashable, item: Item) -> None:
        """Put ``item`` last among those of ``client``."""
        known = self._active.get(client)
        if known is None:
            known = _Client(client, max(self._time, self._owed.pop(client, 0.0)))
            self._active[client] = known
            self._enter(known)
        known.items.append(item)

    def peek(self) -> Item | None:
        """The item whose turn it is, or None when nothing waits that is not set aside."""
        while self._turns:
            client = self._turns[0][2]
            while client.items and client.items[0].gone:
                client.items.popleft()
            if client.items:
                return client.items[0]
            heapq.heappop(self._turns)
            self._leave(client)
        return None

    def take(self, work: float) -> Item:
        """Remove the item that :meth:`peek` showed and charge ``work`` to its client."""
        turn, _, client = heapq.heappop(self._turns)
        item = client.items.popleft()
        self._time = max(self._time, turn)
        client.turn += work
        if client.items:
            self._enter(client)
        else:
            self._leave(client)
        return item

    def set_aside(self) -> None:
        """Pass over the client whose turn it is until :meth:`restore`."""
        self._aside.append(heapq.heappop(self._turns)[2])

    def restore(self) -> None:
        """Let the clients that were set aside take part again."""
        for client in self._aside:
            self._enter(client)
        self._aside.clear()

    def _enter(self, client: _Client[Item]) -> None:
        self._number += 1
        heapq.heappush(self._turns, (client.turn, self._number, client))

    def _leave(self, client: _Client[Item]) -> None:
        del self._active[client.name]
        if client.turn <= self._time:
            return
        self._owed[client.name] = client.turn
        if len(self._owed) > 2 * len(self._active) + 1024:
            self._owed = {n: turn for n, turn in self._owed.items() if turn > self._time}
