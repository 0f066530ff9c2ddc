"""The one way to the model: requests in, futures out.

Host threads decode pictures and tokenise, ahead of the model; prompts then wait in the scheduler;
one thread takes batches from it and runs them piece by piece. Between two pieces it looks for
something more urgent, and runs that first.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, InvalidStateError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import _C
from .errors import BackendError, DeadlineError, InputError, QueueFull
from .host import HostPool
from .metrics import Metrics
from .model import Model
from .prompt import Prompt
from .request import DEFAULT_TERMS, Answer, Job, Pending, Terms, Usage
from .runner import Ready, Runner
from .scheduler import LEVELS, Budget, Planned, Scheduler
from .turns import turns_of

# Prepared pixels that may wait for the model; beyond it the host threads pause. One patch of a
# still is 768 bytes, so this is about 200 MB.
_MAX_WAITING_PATCHES = 1 << 18
# A request of so much work lets others of its level pass that are this much smaller.
_LONG, _SHORTER = 4096, 16

_LATE = "not answered within its timeout: dropped"
_NON_FINITE = (
    "the model answered NaN or infinity for this input: with float16 weights load with "
    "dtype='bfloat16'; with others the checkpoint is damaged (run it on a plain text to see)"
)


class _NotWantedError(Exception):
    """Everybody who waited for this batch has gone."""


class Engine:
    """Runs requests through a model. Thread-safe; its threads start at the first request.

    Engines of one device take turns, a piece of a batch at a time.

    Args:
        runner: the model, and what runs batches through it.
        budget: the most one batch may hold.
        queue_work: waiting work, in tokens, from which on requests are refused.
        ageing: seconds by which a level of priority stands back behind the next.
        host_threads: threads that prepare requests; None means one for each usable core.
    """

    def __init__(
        self,
        runner: Runner,
        budget: Budget,
        *,
        queue_work: float = math.inf,
        ageing: float = 5.0,
        host_threads: int | None = None,
    ) -> None:
        self._runner = runner
        self._budget = budget
        self._queue_work = queue_work
        self._ageing = ageing
        self._host_threads = host_threads or _C.num_threads()
        self._closed = False
        self._reset()
        _after_fork(self)
        _ENGINES.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._scheduler = self._new_scheduler()
        self._open: set[Job] = set()
        self._host: HostPool[Job] | None = None
        self._thread: threading.Thread | None = None
        self._seconds = 0.0  # that batches took which ran between pieces of another
        self._turns = turns_of(str(self._runner.device))

    @property
    def model(self) -> Model:
        """The network."""
        return self._runner.model

    def _new_scheduler(self) -> Scheduler[Job]:
        rates = self._runner.rates
        return Scheduler(self._budget, rates, ageing=self._ageing, queue_work=self._queue_work)

    def submit(self, prepare: Callable[[], Prompt], terms: Terms = DEFAULT_TERMS) -> Pending:
        """Queue one request.

        Args:
            prepare: called once, in a host thread, to make the prompt; what it raises becomes
                the future's exception.
            terms: how it is to be treated.

        Raises:
            BackendError: the engine is closed.
            QueueFull: too much work waits.
        """
        job = Job(prepare, terms, LEVELS.index(terms.priority), Pending())
        job.future.on_cancel = _when_cancelled(self, job)
        with self._lock:
            if self._closed:
                raise BackendError("this model was closed: load it again to use it")
            try:
                self._scheduler.admit()
            except QueueFull:
                self._runner.counters.add(refused=1)
                raise
            if self._host is None:
                self._host = HostPool(self._host_threads, self._prepare, self._has_room)
                self._thread = threading.Thread(target=self._loop, name="qvlfast", daemon=True)
                self._thread.start()
            self._open.add(job)
            self._runner.counters.add(submitted=1)
            self._host.submit(job, job.level, terms.client)
        return job.future

    def metrics(self) -> Metrics:
        """Counters and gauges as they are now."""
        caches: dict[str, Any] = {**self._runner.counts}
        with self._lock:
            scheduler = self._scheduler
            values: dict[str, Any] = self._runner.counters.values()
            return Metrics(
                **values,
                preparing=scheduler.preparing,
                waiting=len(scheduler),
                waiting_work=scheduler.waiting_work,
                oldest_wait=scheduler.age(time.monotonic()),
                budget_tokens=scheduler.budget.tokens,
                arena_bytes=self._runner.arena_bytes,
                **caches,
            )

    def close(self) -> None:
        """Answer what was accepted, then stop. Calling it again does nothing."""
        with self._lock:
            host, thread = self._host, self._thread
            self.stop()
        for ending in (host, thread):
            if ending is not None:
                ending.join()

    def stop(self) -> None:
        """Accept nothing more, and let the threads end when everything is answered."""
        with self._lock:
            self._closed = True
            host, self._host, self._thread = self._host, None, None
            if host is not None:
                host.close()
            self._wake.notify_all()

    def abandon(self) -> None:
        """Fail what is not answered yet, and return when the threads have ended."""
        with self._lock:
            self._closed = True
            left = list(self._open)
            self._scheduler.drain()
        for job in left:
            job.future.unwanted = True
            self._fail(job, BackendError("this model was closed before it answered"))
        self.close()

    # In the host threads.

    def _has_room(self, level: int) -> bool:
        # What is urgent does not wait for the pictures of what is not.
        most = _MAX_WAITING_PATCHES * (2 if level == 0 else 1)
        return self._scheduler.waiting_patches < most

    def _prepare(self, job: Job) -> None:
        """Make a job's prompt and queue it; whatever happens, somebody answers for it."""
        try:
            ready = self._make_ready(job)
        except BaseException as error:
            ready = None
            self._fail(job, error)
        with self._lock:
            if ready is not None and not job.gone:
                job.ready = ready
                job.counted = False
                job.ticket = self._scheduler.push(
                    job,
                    ready.cost,
                    time.monotonic(),
                    level=job.level,
                    client=job.terms.client,
                    deadline=job.terms.deadline,
                    batch_tokens=job.terms.batch_tokens,
                )
                self._wake.notify_all()

    def _make_ready(self, job: Job) -> Ready | None:
        prepare, job.prepare = job.prepare, None
        if job.gone or prepare is None:
            return None
        start = time.perf_counter()
        if time.monotonic() >= job.terms.deadline:
            raise DeadlineError(_LATE)
        ready = self._runner.ready(prepare(), job.terms.vision_cache, job.terms.size)
        self._runner.counters.add_seconds("prepare", time.perf_counter() - start)
        return ready

    # In the engine's thread.

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: len(self._scheduler) or self._done())
                if not len(self._scheduler):
                    return
                start = time.monotonic()
                while (left := start + self._scheduler.lull() - time.monotonic()) > 0:
                    self._wake.wait(left)
            self._step()

    def _done(self) -> bool:
        return self._closed and not self._open

    def _step(self, above: int = len(LEVELS), most: float = math.inf) -> None:
        """Run one batch, if something waits that may. A waiting thread keeps nothing of the last
        one alive."""
        try:
            planned, running = self._take(above, most)
        except BaseException as error:
            # A bug of ours, outside the batches: whoever waits is told, and work goes on.
            self._start_anew(error)
            return
        if planned is None:
            return
        before, start = self._seconds, time.perf_counter()
        try:
            planned = self._answer_known(running, planned)
            self._run(planned.jobs, planned)
        except BaseException as error:
            for job in running:
                self._fail(job, error)
        took = time.perf_counter() - start
        own = took - (self._seconds - before)
        self._seconds = before + took
        if planned.jobs:  # otherwise there was no work, whose speed this could be
            with self._lock:
                self._scheduler.finished(planned, time.monotonic(), own)

    def _take(self, above: int, most: float) -> tuple[Planned[Job] | None, list[Job]]:
        """The next batch, and those of its jobs that are still wanted."""
        running = []
        with self._lock:
            now = time.monotonic()
            planned = self._scheduler.pop(now, above=above, most=most)
            expired = self._scheduler.expired(now)
            for job in planned.jobs if planned else ():
                if job.future.set_running_or_notify_cancel():
                    running.append(job)
                elif self._settle(job):
                    self._runner.counters.add(cancelled=1)
        for job in expired:
            self._fail(job, DeadlineError(_LATE))
        if planned is not None or expired:
            self._made_room()
        return planned, running

    def _answer_known(self, jobs: Sequence[Job], planned: Planned[Job]) -> Planned[Job]:
        """Answer what an earlier batch has; the batch that is left to run."""
        left = []
        for job in jobs:
            ready = job.ready
            if ready is None:
                continue
            value = self._runner.known(ready)
            if value is None:
                left.append((job, ready.cost))
            else:
                self._answer(job, value)
        with self._lock:
            if len(left) < len(planned.jobs):
                planned = self._scheduler.remainder(planned, left)
            most = self._scheduler.budget.tokens
        if left:
            self._runner.counters.add_batch(min(1.0, planned.tokens / most))
        return planned

    def _made_room(self) -> None:
        """Fewer pixels wait: host threads may go on."""
        host = self._host
        if host is not None:
            host.wake()

    def _start_anew(self, error: BaseException) -> None:
        with self._lock:
            lost = [j for j in self._open if j.ticket is not None and not j.future.running()]
            self._scheduler = self._new_scheduler()
            self._scheduler.preparing = sum(job.counted for job in self._open)
        self._made_room()
        for job in lost:
            self._fail(job, error)

    def _run(self, jobs: Sequence[Job], planned: Planned[Job], again: bool = True) -> None:
        """Run a batch; if it fails, halve it until the failing request stands alone."""
        if not jobs:
            return
        try:
            values = self._drive(jobs, planned)
        except _NotWantedError:
            for job in jobs:
                self._fail(job, CancelledError() if job.future.unwanted else DeadlineError(_LATE))
        except BaseException as error:
            out_of_memory = _is_memory_fault(error)
            if out_of_memory:
                self._runner.counters.add(memory_faults=1)
                self._runner.forget()
                with self._lock:
                    self._scheduler.shrink()
            if len(jobs) > 1:
                middle = len(jobs) // 2
                self._run(jobs[:middle], planned)
                self._run(jobs[middle:], planned)
            elif out_of_memory and again:
                self._run(jobs, planned, again=False)
            else:
                self._fail(jobs[0], error)
        else:
            for job, value in zip(jobs, values, strict=True):
                self._answer(job, value)

    def _drive(self, jobs: Sequence[Job], planned: Planned[Job]) -> list[NDArray[np.float32]]:
        """Run the pieces of a batch; in between, one batch of what may pass it."""
        above, most = planned.level, math.inf
        if len(jobs) == 1 and planned.work >= _LONG:
            above, most = planned.level + 1, planned.work / _SHORTER
        pieces = self._runner.run([job.ready for job in jobs if job.ready is not None])
        with contextlib.closing(pieces):
            while True:
                with self._turns.take(planned.level):
                    result = _next(pieces)
                if result is not None:
                    return result
                now = time.monotonic()
                if not any(job.wanted(now) for job in jobs):
                    raise _NotWantedError
                if len(self._scheduler):
                    self._step(above, most)

    # In any thread.

    def _answer(self, job: Job, value: NDArray[np.float32]) -> None:
        ready = job.ready
        if ready is None or not np.isfinite(value).all():
            self._fail(job, InputError("non_finite", _NON_FINITE))
            return
        if self._settle(job):
            self._runner.counters.add(answered=1)
            with contextlib.suppress(InvalidStateError):
                job.future.set_result(Answer(value, Usage.of(ready.prompt)))

    def _fail(self, job: Job, error: BaseException) -> None:
        if not self._settle(job):
            return
        if isinstance(error, DeadlineError):
            self._runner.counters.add(expired=1)
        elif isinstance(error, CancelledError):
            self._runner.counters.add(cancelled=1)
        else:
            self._runner.counters.add_error(error)
        with contextlib.suppress(InvalidStateError):
            job.future.set_exception(error)

    def _cancelled(self, job: Job) -> None:
        """A future was cancelled before it was in a batch."""
        with self._lock:
            if job.ticket is not None:
                self._scheduler.cancel(job.ticket)
            if self._settle(job):
                self._runner.counters.add(cancelled=1)
                job.future.set_running_or_notify_cancel()  # tells those who wait for it
        self._made_room()

    def _settle(self, job: Job) -> bool:
        """Let go of a job; whether it was still open."""
        with self._lock:
            if job.gone:
                return False
            job.gone = True
            if job.counted:
                job.counted = False
                self._scheduler.withdraw()
            job.future.on_cancel = None
            job.prepare = job.ready = None
            self._open.discard(job)
            if self._done():
                self._wake.notify_all()
            return True


def _next(
    pieces: Generator[None, None, list[NDArray[np.float32]]],
) -> list[NDArray[np.float32]] | None:
    """Run one piece; the result, if it was the last."""
    try:
        next(pieces)
    except StopIteration as stop:
        return stop.value
    return None


def _is_memory_fault(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's own allocator for the CPU has no class for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _when_cancelled(engine: Engine, job: Job) -> Callable[[], None]:
    """A future that somebody keeps does not keep the model."""
    reference = weakref.ref(engine)

    def tell() -> None:
        alive = reference()
        if alive is not None:
            alive._cancelled(job)

    return tell


def _after_fork(engine: Engine) -> None:
    """A forked child has none of its parent's threads, so its engine starts anew."""
    reference = weakref.ref(engine)

    def reset() -> None:
        alive = reference()
        if alive is not None:
            alive._runner.reset()
            alive._reset()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """A thread that is in C++ when the interpreter goes away takes the process down with it."""
    for engine in list(_ENGINES):
        engine.abandon()
