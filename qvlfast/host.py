"""Threads that prepare requests ahead of the model: the urgent first, clients in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from .fair import FairQueue, Waiting
from .scheduler import LEVELS

Job = TypeVar("Job", bound=Waiting)


class HostPool(Generic[Job]):
    """Daemon threads that start with the first job.

    Args:
        threads: how many.
        work: what is done to a job, in one of the threads; it raises nothing.
        may_start: whether there is room for what becomes of a job of this level.
    """

    def __init__(
        self, threads: int, work: Callable[[Job], None], may_start: Callable[[int], bool]
    ) -> None:
        self._work = work
        self._may_start = may_start
        self._changed = threading.Condition()
        self._queues: list[FairQueue[Job]] = [FairQueue() for _ in LEVELS]
        self._closing = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"qvlfast-host-{i}", daemon=True)
            for i in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # there are no more of them to be had
            self.close()
            raise

    def submit(self, job: Job, level: int, client: Hashable) -> None:
        """Queue a job."""
        with self._changed:
            self._queues[level].push(client, job)
            self._changed.notify()

    def wake(self) -> None:
        """Something may start that could not before."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Let the threads end once all jobs are done."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the threads to end, after :meth:`close`."""
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Do one job. A waiting thread keeps nothing of the last one alive."""
        with self._changed:
            self._changed.wait_for(self._something)
            job = self._take()
        if job is None:
            return False
        self._work(job)
        return True

    def _something(self) -> bool:
        if any(queue.peek() and self._may_start(i) for i, queue in enumerate(self._queues)):
            return True
        return self._closing and not any(queue.peek() for queue in self._queues)

    def _take(self) -> Job | None:
        for level, queue in enumerate(self._queues):
            if queue.peek() is not None and self._may_start(level):
                return queue.take(1.0)
        return None
