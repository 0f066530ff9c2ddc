"""The one way to the models of a device: requests in, futures out.

Host threads decode pictures and tokenise, ahead of the models; prompts then wait in the scheduler;
one thread takes batches from it and runs them piece by piece. Between two pieces it looks for
something more urgent, of whichever model, and runs that first.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, InvalidStateError
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import _C
from .cost import Budget
from .errors import BackendError, DeadlineError, InputError, QueueFull
from .execution import LATE, Execution
from .host import HostPool
from .lane import Planned
from .metrics import Metrics
from .prompt import Prompt
from .request import DEFAULT_TERMS, Answer, Pending, Terms, Usage
from .runner import Ready, Runner
from .scheduler import LEVELS, Scheduler
from .served import Job, Served

# Prepared pixels that may wait for the models; beyond it the host threads pause. One patch of a
# still is 768 bytes, so this is about 200 MB.
_MAX_WAITING_PATCHES = 1 << 18

# An idle engine looks this often whether a model was dropped: see Engine.drop.
_IDLE_SECONDS = 0.5

_NON_FINITE = (
    "the model answered NaN or infinity for this input, or zeros alone: with float16 weights load "
    "with dtype='bfloat16'; with others the checkpoint is damaged (run it on a plain text to see)"
)


class Engine:
    """Runs requests through the models of one device. Thread-safe.

    Its threads start at the first request, and end when the last of its models was closed.

    Args:
        ageing: seconds by which a level of priority stands back behind the next.
        host_threads: threads that prepare requests; None means one for each usable core.
    """

    def __init__(self, *, ageing: float = 5.0, host_threads: int | None = None) -> None:
        self._ageing = ageing
        self._host_threads = host_threads or _C.num_threads()
        self._execution = Execution(
            self._let_pass, self._memory_ran_out, answer=self._answer, fail=self._fail
        )
        self._models: set[Served] = set()  # that accept requests, or have some that are open
        self._reset()
        _ENGINES.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._scheduler: Scheduler[Job] = Scheduler(ageing=self._ageing)
        self._host: HostPool[Job] | None = None
        self._thread: threading.Thread | None = None
        self._dropped: queue.SimpleQueue[Served] = queue.SimpleQueue()
        self._seconds = 0.0  # that batches took which ran between pieces of another

    def serve(self, runner: Runner, budget: Budget, *, queue_work: float = math.inf) -> Served:
        """One more model, until :meth:`stop`.

        Args:
            runner: the model, and what runs batches through it.
            budget: the most one batch may hold.
            queue_work: waiting work, in tokens, from which on requests are refused.
        """
        with self._lock:
            self._let_go_of_dropped()
            served = Served(runner, budget, queue_work)
            self._models.add(served)
            self._give_lane(served)
        return served

    def _give_lane(self, served: Served) -> None:
        served.lane = self._scheduler.add_lane(
            served.budget, served.runner.rates, queue_work=served.queue_work
        )
        served.lane.preparing = sum(job.counted for job in served.open)

    def submit(
        self,
        served: Served,
        prepare: Callable[[], Prompt],
        terms: Terms = DEFAULT_TERMS,
        *,
        in_any_case: bool = False,
    ) -> Pending:
        """Queue one request.

        Args:
            served: which model it is for.
            prepare: called once, in a host thread, to make the prompt; what it raises becomes
                the future's exception.
            terms: how it is to be treated.
            in_any_case: however much work waits.

        Raises:
            BackendError: the model was closed, or a thread cannot be started.
            QueueFull: too much work waits for it.
        """
        job = Job(served, prepare, terms, LEVELS.index(terms.priority), Pending())
        job.future.on_cancel = partial(self._cancelled, job)
        try:
            with self._lock:
                self._admit(job, in_any_case)
        except BaseException:  # Ctrl-C in the middle of it, too
            self._settle(job)
            raise
        return job.future

    def _admit(self, job: Job, in_any_case: bool) -> None:
        """Take a request in. Under the lock."""
        served, counters = job.served, job.served.runner.counters
        self._let_go_of_dropped()
        if served.closed:
            raise BackendError("this model was closed: load it again to use it")
        try:
            served.lane.admit(in_any_case)
        except QueueFull:
            counters.add(refused=1)
            raise
        job.counted = True
        served.open.add(job)
        host = self._host or self._start()
        host.submit(job, job.level, job.terms.client)
        counters.add(submitted=1)

    def _start(self) -> HostPool[Job]:
        """Start the threads. Under the lock."""
        host = None
        thread = threading.Thread(target=self._loop, name="qvlfast", daemon=True)
        try:
            host = HostPool(self._host_threads, self._prepare, self._has_room)
            thread.start()
        except (RuntimeError, MemoryError) as error:
            if host is not None:
                host.close()
            raise BackendError(
                f"a thread cannot be started ({error}): raise this process's limits on memory and "
                "processes (ulimit -v, -u), or let fewer of them run"
            ) from error
        self._host, self._thread = host, thread
        return host

    def metrics(self, served: Served) -> Metrics:
        """Counters and gauges of a model as they are now."""
        runner = served.runner
        caches: dict[str, Any] = {**runner.counts}
        with self._lock:
            lane = served.lane
            values: dict[str, Any] = runner.counters.values()
            return Metrics(
                **values,
                preparing=lane.preparing,
                waiting=lane.waiting,
                waiting_work=lane.waiting_work,
                oldest_wait=lane.age(time.monotonic()),
                budget_tokens=lane.budget.tokens,
                arena_bytes=runner.arena_bytes,
                **caches,
            )

    def stop(self, served: Served) -> None:
        """Accept nothing more for a model; what was accepted is answered."""
        with self._lock:
            served.closed = True
            self._let_go(served)

    def drop(self, served: Served) -> None:
        """:meth:`stop` for a finalizer. That may run in any thread in the middle of anything, under
        this engine's lock and others, so it waits for none: the engine's thread does the rest."""
        self._dropped.put(served)
        if self._thread is None and self._lock.acquire(blocking=False):
            try:
                self._let_go_of_dropped()
            finally:
                self._lock.release()

    def close(self, served: Served) -> None:
        """:meth:`stop`, and return when everything is answered. Calling it again does nothing."""
        with self._lock:
            self.stop(served)
            self._changed.wait_for(lambda: not served.open)
        self._join()

    def abandon(self) -> None:
        """Close all models, fail what is not answered yet, and return when the threads have
        ended."""
        with self._lock:
            models = list(self._models)
            left = [job for served in models for job in served.open]
            for served in models:
                self.stop(served)
        for job in left:
            job.future.unwanted = True
            self._fail(job, BackendError("this model was closed before it answered"))
        self._join()

    def _let_go(self, served: Served) -> None:
        """Forget a model that was closed, once nothing of it is open. Under the lock."""
        if served.closed and not served.open and served in self._models:
            self._models.discard(served)
            self._scheduler.remove_lane(served.lane)
        self._changed.notify_all()

    def _let_go_of_dropped(self) -> None:
        """Under the lock."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.stop(self._dropped.get_nowait())

    def _join(self) -> None:
        """Wait for the threads, if they have no more models to run."""
        with self._lock:
            host, thread = self._host, self._thread
            if host is None or thread is None:
                return
            self._changed.wait_for(lambda: self._models or self._thread is not thread)
            if self._thread is thread:
                return
        host.join()
        thread.join()

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
                    job.served.lane,
                    job,
                    ready.cost,
                    time.monotonic(),
                    level=job.level,
                    client=job.terms.client,
                    deadline=job.terms.deadline,
                    batch_tokens=job.terms.batch_tokens,
                )
                self._changed.notify_all()

    def _make_ready(self, job: Job) -> Ready | None:
        prepare, job.prepare = job.prepare, None
        if job.gone or prepare is None:
            return None
        start = time.perf_counter()
        if time.monotonic() >= job.terms.deadline:
            raise DeadlineError(LATE)
        runner = job.served.runner
        ready = runner.ready(prepare(), job.terms.vision_cache, job.terms.size)
        runner.counters.add_seconds("prepare", time.perf_counter() - start)
        return ready

    # In the engine's thread.

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: len(self._scheduler) or not self._models, _IDLE_SECONDS
                )
                self._let_go_of_dropped()
                if not self._models:
                    self._end()
                    return
                if not len(self._scheduler):
                    continue
                start = time.monotonic()
                while (left := start + self._scheduler.lull() - time.monotonic()) > 0:
                    self._changed.wait(left)
            self._step()

    def _end(self) -> None:
        """The threads end; the next request starts others. Under the lock."""
        if self._host is not None:
            self._host.close()
        self._host = self._thread = None
        self._changed.notify_all()

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
            self._execution.run(planned.jobs, planned)
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
                    job.served.runner.counters.add(cancelled=1)
        for job in expired:
            self._fail(job, DeadlineError(LATE))
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
            value = job.served.runner.known(ready)
            if value is None:
                left.append((job, ready.cost))
            else:
                self._answer(job, value)
        with self._lock:
            if len(left) < len(planned.jobs):
                planned = self._scheduler.remainder(planned, left)
            most = planned.lane.budget.tokens
        if left:
            counters = planned.jobs[0].served.runner.counters
            counters.add_batch(min(1.0, planned.tokens / most))
        return planned

    def _made_room(self) -> None:
        """Fewer pixels wait: host threads may go on."""
        host = self._host
        if host is not None:
            host.wake()

    def _start_anew(self, error: BaseException) -> None:
        with self._lock:
            jobs = [job for served in self._models for job in served.open]
            lost = [job for job in jobs if job.ticket is not None and not job.future.running()]
            self._scheduler = Scheduler(ageing=self._ageing)
            for served in self._models:
                self._give_lane(served)
        self._made_room()
        for job in lost:
            self._fail(job, error)

    def _memory_ran_out(self, planned: Planned[Job]) -> None:
        """Drop what all models keep, since they share the device; this one's batches are smaller
        from now on."""
        with self._lock:
            planned.lane.shrink()
            runners = [served.runner for served in self._models]
        for runner in runners:
            runner.forget()

    def _let_pass(self, above: int, most: float) -> None:
        """Between two pieces: run one batch that may pass, if any waits."""
        if len(self._scheduler):
            self._step(above, most)

    # In any thread.

    def _answer(self, job: Job, value: NDArray[np.float32]) -> None:
        ready = job.ready
        # An infinite value that a cut leaves out makes the norm's other values zero.
        vanished = value.ndim > 0 and not value.any()
        if ready is None or vanished or not np.isfinite(value).all():
            self._fail(job, InputError("non_finite", _NON_FINITE))
            return
        if self._settle(job):
            job.served.runner.counters.add(answered=1)
            with contextlib.suppress(InvalidStateError):
                job.future.set_result(Answer(value, Usage.of(ready.prompt)))

    def _fail(self, job: Job, error: BaseException) -> None:
        if not self._settle(job):
            return
        counters = job.served.runner.counters
        if isinstance(error, DeadlineError):
            counters.add(expired=1)
        elif isinstance(error, CancelledError):
            counters.add(cancelled=1)
        else:
            counters.add_error(error)
        with contextlib.suppress(InvalidStateError):
            job.future.set_exception(error)

    def _cancelled(self, job: Job) -> None:
        """A future was cancelled before it was in a batch."""
        if self._settle(job):
            job.served.runner.counters.add(cancelled=1)
            job.future.set_running_or_notify_cancel()  # tells those who wait for it
        self._made_room()

    def _settle(self, job: Job) -> bool:
        """Let go of a job; whether it was still open."""
        served = job.served
        with self._lock:
            if job.gone:
                return False
            job.gone = True
            if job.counted:
                job.counted = False
                served.lane.withdraw()
            if job.ticket is not None:
                self._scheduler.cancel(job.ticket)
            job.future.on_cancel = None
            job.prepare = job.ready = None
            served.open.discard(job)
            if not served.open:
                self._let_go(served)
            return True

    def _after_fork(self) -> None:
        """A forked child has none of its parent's threads, so its engine starts anew."""
        self._reset()
        with self._lock:
            for served in list(self._models):
                served.runner.reset()
                served.open.clear()
                self._give_lane(served)
                self._let_go(served)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()
_SHARED: dict[str, Engine] = {}


def engine_of(device: torch.device) -> Engine:
    """The engine of a device in this process."""
    name = str(device)
    if device.type == "cuda" and device.index is None:
        name = f"cuda:{torch.cuda.current_device()}"
    engine = _SHARED.get(name)
    return _SHARED.setdefault(name, Engine()) if engine is None else engine


def _after_fork() -> None:
    for engine in list(_ENGINES):
        engine._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _end_threads() -> None:
    """A thread that is in C++ when the interpreter goes away takes the process down with it."""
    for engine in list(_ENGINES):
        engine.abandon()
