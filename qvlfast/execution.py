"""A batch on its way through its model: piece by piece, and in halves after a failure."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import DeadlineError
from .lane import Planned
from .served import Job

LATE = "not answered within its timeout: dropped"

# A request of so much work lets others of its level pass that are this much smaller.
_LONG, _SHORTER = 4096, 16


class _NotWantedError(Exception):
    """Everybody who waited for this batch has gone."""


class Execution:
    """Runs batches for an engine, in its thread.

    Args:
        let_pass: called between two pieces with a level and an amount of work, as
            :meth:`qvlfast.scheduler.Scheduler.pop` takes them: what is below may run now.
        memory_ran_out: called with the batch for which it did, before that is tried again.
        answer: called with each job that has a result.
        fail: called with each that has none.
    """

    def __init__(
        self,
        let_pass: Callable[[int, float], None],
        memory_ran_out: Callable[[Planned[Job]], None],
        *,
        answer: Callable[[Job, NDArray[np.float32]], None],
        fail: Callable[[Job, BaseException], None],
    ) -> None:
        self._let_pass = let_pass
        self._memory_ran_out = memory_ran_out
        self._answer = answer
        self._fail = fail

    def run(self, jobs: Sequence[Job], planned: Planned[Job], again: bool = True) -> None:
        """Run some jobs of a batch; if it fails, halve it until the failing request stands alone.

        Args:
            again: one that stands alone and runs out of memory is tried once more.
        """
        if not jobs:
            return
        try:
            values = self._drive(jobs, planned)
        except _NotWantedError:
            for job in jobs:
                self._fail(job, CancelledError() if job.future.unwanted else DeadlineError(LATE))
        except BaseException as error:
            out_of_memory = is_memory_fault(error)
            if out_of_memory:
                jobs[0].served.runner.counters.add(memory_faults=1)
                self._memory_ran_out(planned)
            if len(jobs) > 1:
                middle = len(jobs) // 2
                self.run(jobs[:middle], planned)
                self.run(jobs[middle:], planned)
            elif out_of_memory and again:
                self.run(jobs, planned, again=False)
            else:
                self._fail(jobs[0], error)
        else:
            for job, value in zip(jobs, values, strict=True):
                self._answer(job, value)

    def _drive(self, jobs: Sequence[Job], planned: Planned[Job]) -> list[NDArray[np.float32]]:
        """Run the pieces of a batch; in between, one batch of what may pass it."""
        above, most = planned.level, math.inf
        if len(jobs) == 1 and planned.work >= _LONG:
            above, most = planned.level + 1, planned.operations / _SHORTER
        runner = jobs[0].served.runner
        pieces = runner.run([job.ready for job in jobs if job.ready is not None])
        with contextlib.closing(pieces):
            while True:
                result = _next(pieces)
                if result is not None:
                    return result
                now = time.monotonic()
                if not any(job.wanted(now) for job in jobs):
                    raise _NotWantedError
                self._let_pass(above, most)


def _next(
    pieces: Generator[None, None, list[NDArray[np.float32]]],
) -> list[NDArray[np.float32]] | None:
    """Run one piece; the result, if it was the last."""
    try:
        next(pieces)
    except StopIteration as stop:
        return stop.value
    return None


def is_memory_fault(error: BaseException) -> bool:
    """Whether a batch, or the loading of a model, failed for want of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's own allocator for the CPU has no class for it, nor has its mapping of files.
    texts = ("can't allocate memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
