"""Queues of several clients that take turns by the work they were given, not by their requests.

Start-time fair queueing: a client's turn comes at the virtual time when its earlier work is paid
for; the virtual time is that of the last turn. A client that comes back after a pause starts there,
so that it neither saves up turns nor loses any.
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

# Accounts that are only remembered are looked through when there are so many, and twice as many as
# were left the last time.
_FEW = 1024


@dataclass(eq=False)
class Account:
    """When a client's next turn is, and in how many queues it has something waiting."""

    turn: float
    queues: int = 0


class Ledger:
    """The accounts of clients, for one queue, or for several that a client may use.

    Attributes:
        time: the virtual one.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self._accounts: dict[Hashable, Account] = {}
        self._number = 0
        self._most = _FEW

    def number(self) -> int:
        """Where turns are equal, who entered first."""
        self._number += 1
        return self._number

    def enter(self, client: Hashable) -> Account:
        """A client has something in one more queue."""
        account = self._accounts.setdefault(client, Account(self.time))
        if not account.queues:
            account.turn = max(account.turn, self.time)
        account.queues += 1
        return account

    def leave(self, client: Hashable) -> None:
        """A client has nothing left in a queue; turns that it has had ahead are remembered."""
        self._accounts[client].queues -= 1
        if self._paid(client):
            del self._accounts[client]
        elif len(self._accounts) > self._most:
            self._accounts = {c: a for c, a in self._accounts.items() if not self._paid(c)}
            self._most = 2 * len(self._accounts) + _FEW

    def _paid(self, client: Hashable) -> bool:
        account = self._accounts[client]
        return not account.queues and account.turn <= self.time


@dataclass(eq=False)
class _Line(Generic[Item]):
    """What a client has waiting in a queue."""

    client: Hashable
    account: Account
    items: deque[Item] = field(default_factory=deque)


class FairQueue(Generic[Item]):
    """First in, first out for each client. Every call is O(log clients); not thread-safe.

    Args:
        ledger: shared by queues in which a client's turns are counted together.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self._lines: dict[Hashable, _Line[Item]] = {}
        # By turn. One that a client has taken in another queue since is noticed when it comes up:
        # its turn has only become later.
        self._turns: list[tuple[float, int, _Line[Item]]] = []
        self._aside: list[_Line[Item]] = []

    def push(self, client: Hashable, item: Item) -> None:
        """Put ``item`` last among those of ``client``."""
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = _Line(client, self._ledger.enter(client))
            self._queue(line)
        line.items.append(item)

    def peek(self) -> Item | None:
        """The item whose turn it is, or None when nothing waits that is not set aside."""
        while self._turns:
            turn, number, line = self._turns[0]
            while line.items and line.items[0].gone:
                line.items.popleft()
            if not line.items:
                heapq.heappop(self._turns)
                self._leave(line)
            elif turn < line.account.turn:
                heapq.heapreplace(self._turns, (line.account.turn, number, line))
            else:
                return line.items[0]
        return None

    def turn(self) -> tuple[float, int] | None:
        """When the turn of what :meth:`peek` shows is: the earlier of several queues is first."""
        return None if self.peek() is None else self._turns[0][:2]

    def take(self, work: float) -> Item:
        """Remove the item that :meth:`peek` showed and charge ``work`` to its client."""
        turn, _, line = heapq.heappop(self._turns)
        item = line.items.popleft()
        self._ledger.time = max(self._ledger.time, turn)
        line.account.turn += work
        if line.items:
            self._queue(line)
        else:
            self._leave(line)
        return item

    def set_aside(self) -> None:
        """Pass over the client whose turn it is until :meth:`restore`."""
        self._aside.append(heapq.heappop(self._turns)[2])

    def restore(self) -> None:
        """Let the clients that were set aside take part again."""
        for line in self._aside:
            self._queue(line)
        self._aside.clear()

    def _queue(self, line: _Line[Item]) -> None:
        heapq.heappush(self._turns, (line.account.turn, self._ledger.number(), line))

    def _leave(self, line: _Line[Item]) -> None:
        del self._lines[line.client]
        self._ledger.leave(line.client)
