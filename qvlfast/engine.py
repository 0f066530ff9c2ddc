"""The one way to the model: requests in, futures out.

Host work (decoding pictures, tokenising) runs in a pool of threads, ahead of the model; prompts
then wait in the scheduler; one thread takes batches from it and runs them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from . import _C
from .batch import pack
from .errors import BackendError, InputError
from .model import Model
from .prompt import Prompt
from .scheduler import Budget, Cost, Media, Scheduler

# Prepared pixels that may wait for the model; beyond it the host threads pause. One patch of a
# still is 768 bytes, so this is about 200 MB.
_MAX_WAITING_PATCHES = 1 << 18

_NON_FINITE = (
    "the model answered NaN or infinity for this input: with float16 weights load with "
    "dtype='bfloat16'; with others the checkpoint is damaged (run it on a plain text to see)"
)


@dataclass(frozen=True)
class Usage:
    """What one input cost.

    Attributes:
        tokens: decoder tokens, the template and visual ones included.
        visual_tokens: those of them that stand for pictures and videos.
        truncated_tokens: tokens of the caller's text that were cut to fit; 0 if none.
        video_reduced: a video was given fewer pixels than usual, to fit the length limit.
    """

    tokens: int
    visual_tokens: int
    truncated_tokens: int
    video_reduced: bool


@dataclass(frozen=True)
class Answer:
    """``value`` is ``[hidden_size]`` float32 from an embedder, ``[]`` from a reranker."""

    value: NDArray[np.float32]
    usage: Usage


@dataclass(eq=False)
class _Job:
    prepare: Callable[[], Prompt]
    future: Future[Answer]
    batch_tokens: int | None
    prompt: Prompt | None = None


def _usage(prompt: Prompt) -> Usage:
    return Usage(
        tokens=len(prompt.ids),
        visual_tokens=len(prompt.visual_index),
        truncated_tokens=prompt.truncated_tokens,
        video_reduced=any(m.reduced for m in prompt.media),
    )


class Engine:
    """Runs requests through a model. Thread-safe; its threads start at the first request.

    Args:
        model: the network.
        device: where its weights are.
        budget: the most one batch may hold.
        share_prefixes: compute what requests of a batch have in common once.
        host_threads: threads that prepare requests; None means one for each usable core.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        budget: Budget,
        *,
        share_prefixes: bool = True,
        host_threads: int | None = None,
    ) -> None:
        self.model = model
        self._device = device
        self._budget = budget
        self._share_prefixes = share_prefixes
        self._host_threads = host_threads or _C.num_threads()
        self._closed = False
        self._reset()
        _after_fork(self)
        _ENGINES.add(self)

    def _reset(self) -> None:
        self._start_lock = threading.Lock()
        self._wake = threading.Condition()
        self._scheduler: Scheduler[_Job] = Scheduler(self._budget)
        self._host: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(
        self, prepare: Callable[[], Prompt], batch_tokens: int | None = None
    ) -> Future[Answer]:
        """Queue one request.

        Args:
            prepare: called once, in a host thread, to make the prompt; what it raises becomes
                the future's exception.
            batch_tokens: a lower token budget for the batch that it will be in.

        Raises:
            BackendError: the engine is closed.
        """
        job = _Job(prepare, Future(), batch_tokens)
        with self._start_lock:
            if self._closed:
                raise BackendError("this model was closed: load it again to use it")
            if self._host is None:
                self._host = ThreadPoolExecutor(self._host_threads, "qvlfast-host")
                self._thread = threading.Thread(target=self._loop, name="qvlfast", daemon=True)
                self._thread.start()
            self._host.submit(self._prepare, job)
        return job.future

    def close(self) -> None:
        """Answer what was accepted, then stop. Calling it again does nothing."""
        thread = self._thread
        self.stop(wait=True)
        if thread is not None:
            thread.join()

    def stop(self, wait: bool = False) -> None:
        """Stop the threads once the queue is empty.

        Args:
            wait: first wait for requests that are still being prepared; without it there must
                be none.
        """
        with self._start_lock:
            self._closed = True
            host, self._host, self._thread = self._host, None, None
        if host is not None:
            host.shutdown(wait=wait)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def abandon(self) -> None:
        """Drop what waits, and return when the engine's thread has ended."""
        thread = self._thread
        with self._wake:
            self._scheduler.drain()
        self.stop()
        if thread is not None:
            thread.join()

    def _prepare(self, job: _Job) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._scheduler.waiting_patches < _MAX_WAITING_PATCHES)
        if job.future.cancelled():
            return
        try:
            job.prompt = job.prepare()
        except BaseException as error:
            _fail(job, error)
            return
        if self._share_prefixes:
            for media in job.prompt.media:
                _ = media.digest  # computed here, where it does not hold up the model
        parts = tuple(Media(object(), len(m.pixels), 0) for m in job.prompt.media)
        with self._wake:
            self._scheduler.admit()
            self._scheduler.push(
                job,
                Cost(len(job.prompt.ids), parts),
                time.monotonic(),
                batch_tokens=job.batch_tokens,
            )
            self._wake.notify_all()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: len(self._scheduler) or self._stopping)
                if not len(self._scheduler):
                    return
            self._step()

    def _step(self) -> None:
        """Run one batch. A waiting thread keeps nothing of the last one alive."""
        with self._wake:
            batch = self._scheduler.pop(time.monotonic())
            jobs = batch.jobs if batch else []
            self._wake.notify_all()
        running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if running:
            self._run(running)

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Run a batch; if it fails, halve it until the failing request stands alone."""
        prompts = [job.prompt for job in jobs if job.prompt is not None]
        try:
            merge = self.model.config.vision.spatial_merge_size
            packed = pack(prompts, merge, self._device, share=self._share_prefixes)
            values = self.model.forward(packed.batch).cpu().numpy()[packed.rows]
        except BaseException as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:
                middle = len(jobs) // 2
                self._run(jobs[:middle])
                self._run(jobs[middle:])
            return
        for job, prompt, value in zip(jobs, prompts, values, strict=True):
            if np.isfinite(value).all():
                job.future.set_result(Answer(value, _usage(prompt)))
            else:
                _fail(job, InputError("non_finite", _NON_FINITE))


def _fail(job: _Job, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
        job.future.set_exception(error)


def _after_fork(engine: Engine) -> None:
    """A forked child has none of its parent's threads, so its engine starts anew."""
    reference = weakref.ref(engine)

    def reset() -> None:
        alive = reference()
        if alive is not None:
            alive._reset()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """A thread that is in C++ when the interpreter goes away takes the process down with it."""
    for engine in list(_ENGINES):
        engine.abandon()
