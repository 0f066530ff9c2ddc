"""A loaded model ready for requests: what :class:`Embedder` and :class:`Reranker` share."""

from __future__ import annotations

import asyncio
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .arguments import whole
from .checkpoint import Checkpoint, locate, warn_of_another_kind
from .config import ModelConfig, load_config, load_pixel_config
from .cost import Budget
from .dispatch import check_backend, choose_device, choose_ops
from .engine import Engine, engine_of
from .errors import BackendError, QueueFull
from .graphs import graphs_for
from .inputs import Item, check_text
from .media import MediaPolicy
from .memory import ArenaPlan
from .metrics import Metrics
from .model import Model
from .pixels import Patches, PixelLimits
from .prompt import Prompt, Prompter
from .quant import Quantization
from .quant.stored import find_stored
from .request import DEFAULT_TERMS, Answer, Pending, Terms, Usage
from .runner import Runner, Sharing
from .served import Served
from .stand_in import Setup
from .video import item_patches
from .weights import load_weights, own_shapes, stored_dtype

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Requests of one call that are under way at once: enough to fill batches, few enough that an
# endless input stays in bounded memory.
_WINDOW = 256

# In place of max_length: a prompt that is made only to be measured is never too long.
UNLIMITED = 1 << 30
EMPTY = Item(texts=("",))


OnError = Literal["raise", "return"]
Priority = Literal["interactive", "normal", "bulk"]


class TruncationWarning(UserWarning):
    """Some inputs of a call were longer than ``max_length`` and were cut."""


@dataclass(frozen=True)
class InputOptions:
    """How inputs become prompts; see ``from_pretrained`` for what they mean."""

    max_length: int
    truncate: bool
    limits: PixelLimits
    policy: MediaPolicy

    @classmethod
    def make(
        cls,
        *,
        max_length: int,
        truncate: bool,
        min_pixels: int,
        max_pixels: int,
        total_pixels: int,
        fps: float,
        max_frames: int,
        allow_media_domains: Sequence[str],
    ) -> InputOptions:
        """Check the arguments of ``from_pretrained`` and group them."""
        max_length = whole("max_length", max_length)
        if isinstance(allow_media_domains, str):
            raise ValueError(
                f"allow_media_domains is the string {allow_media_domains!r}: use a list of hosts"
            )
        frames = whole("max_frames", max_frames, least=2)
        limits = PixelLimits(min_pixels, max_pixels, total_pixels, fps, frames)
        policy = MediaPolicy(allow_media_domains=tuple(allow_media_domains))
        return cls(max_length, truncate, limits, policy)


@dataclass(frozen=True)
class Encoded:
    """Results with everything known about them.

    Attributes:
        vectors: ``[N, D]`` vectors, or ``[N]`` scores of a reranker; those of failed items are
            NaN, or zero in integer types.
        usage: tokens and truncation of each item; None for a failed one.
        errors: the exception of each failed item, by index.
        scales: ``[N]`` float32 for ``int8`` and ``uint8`` vectors, else None.
    """

    vectors: Any
    usage: list[Usage | None]
    errors: dict[int, Exception] = field(default_factory=dict)
    scales: NDArray[np.float32] | None = None


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")


def check_instruction(value: object) -> None:
    """Raise InputError unless it is None or a text."""
    if value is not None:
        check_text(value, "the instruction")


def check_runtime(runtime: object, kind: str) -> Runtime:
    """Raise TypeError unless a class was made by its ``from_pretrained``."""
    if not isinstance(runtime, Runtime):
        raise TypeError(f"{kind}({runtime!r}): use {kind}.from_pretrained(...) to load a model")
    return runtime


def warn_if_truncated(usage: Sequence[Usage | None], stacklevel: int = 3) -> None:
    """Warn once about all items of a call that lost text."""
    short = [i for i, u in enumerate(usage) if u is not None and u.truncated_tokens]
    if short:
        warnings.warn(
            f"{len(short)} of {len(usage)} inputs were longer than max_length and lost text from "
            f"their end (the first is item {short[0]}): truncate=False makes it an error, and "
            "details=True, where a call has it, says how much",
            TruncationWarning,
            stacklevel=stacklevel,
        )


def warn_of_truncation(index: int) -> None:
    """Warn, from a generator, of the first of its items that lost text."""
    warnings.warn(
        f"item {index} was longer than max_length and lost text from its end; others after it may, "
        "too: truncate=False makes it an error, and details=True says how much",
        TruncationWarning,
        stacklevel=3,
    )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """``auto`` → None (the dtype of the checkpoint), names and torch dtypes → torch dtypes."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")


class Runtime:
    """Configuration and prompts of one checkpoint, and the engine that serves its model."""

    def __init__(
        self,
        config: ModelConfig,
        prompter: Prompter,
        engine: Engine,
        served: Served,
        options: InputOptions,
    ) -> None:
        self.config = config
        self.prompter = prompter
        self.engine = engine
        self.served = served
        self.options = options
        # The engine keeps the model alive. Requests hold on to this object, so when it is dropped
        # without close() none is left, and the model can go.
        weakref.finalize(self, engine.drop, served).atexit = False

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        options: InputOptions,
        *,
        reranker: bool,
        device: str | torch.device,
        dtype: str | torch.dtype,
        backend: str,
        quantization: str | Quantization | None,
        batch_tokens: int,
        batch_patches: int,
        share_prefixes: bool,
        cache_bytes: int,
        vision_cache_bytes: int,
        queue_tokens: int | None,
        deterministic: bool,
        cuda_graphs: bool,
        revision: str | None,
        local_files_only: bool,
    ) -> Runtime:
        """Load a checkpoint; the arguments are those of ``from_pretrained``."""
        torch_device = choose_device(device)
        torch_dtype = parse_dtype(dtype)
        plan = Quantization.parse(quantization)
        batch_tokens = whole("batch_tokens", batch_tokens)
        # Long prompts and large pictures cost more than their tokens: a batch of them is smaller.
        budget = Budget(batch_tokens, whole("batch_patches", batch_patches), 2.0 * batch_tokens)
        sharing = Sharing(share_prefixes, cache_bytes, vision_cache_bytes)
        queue_work = math.inf if queue_tokens is None else whole("queue_tokens", queue_tokens)
        check_backend(backend)
        folder = locate(model, revision=revision, local_files_only=local_files_only)
        warn_of_another_kind(model, "reranker" if reranker else "embedder")
        config = load_config(folder)
        checkpoint = Checkpoint(folder)
        torch_dtype = torch_dtype or stored_dtype(checkpoint)
        ops = choose_ops(backend, torch_device, torch_dtype, plan)
        if deterministic and ops.name != "native":
            raise BackendError(
                f"backend {ops.name!r} does not promise equal bits: deterministic=True needs "
                "backend='native', in float32 or bfloat16"
            )
        prompter = Prompter(folder, config)
        answer_ids = (prompter.token_id("yes"), prompter.token_id("no")) if reranker else None
        weights = load_weights(
            checkpoint,
            config,
            load_pixel_config(folder),
            ops,
            dtype=torch_dtype,
            device=torch_device,
            answer_ids=answer_ids,
            quantization=plan,
        )
        network = Model(config, weights, ops)
        graphs = None
        if cuda_graphs:
            graphs = graphs_for(network.hidden, torch_device, ops.name, batch_tokens)
        arena = None
        if ops.allocating:
            stored = find_stored(checkpoint, own_shapes(checkpoint, config))
            setup = Setup.loaded(torch_dtype, ops.name, ops.keeps, stored, plan)
            arena = ArenaPlan.measure(config, setup)
        runner = Runner(network, torch_device, sharing, graphs, arena)
        engine = engine_of(torch_device)
        served = engine.serve(runner, budget, queue_work=queue_work)
        return cls(config, prompter, engine, served, options)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a loaded model cannot be pickled or copied: call from_pretrained in each process"
        )

    @property
    def model(self) -> Model:
        """The network."""
        return self.served.runner.model

    def metrics(self) -> Metrics:
        """Of this model; see :class:`Metrics`."""
        return self.engine.metrics(self.served)

    def close(self) -> None:
        """Answer what was accepted, and accept nothing more."""
        self.engine.close(self.served)

    def load_media(self, item: Item, rest: Callable[[], Prompt]) -> list[Patches]:
        """Decode and cut the videos, then the images, of an input.

        Args:
            rest: makes the prompt without this input's media and text; a long video is fitted
                into what that leaves of ``max_length``. Reading stops where even all of that is
                not enough.
        """
        options = self.options
        budget = options.max_length - (len(rest().ids) if item.videos else 0)
        return item_patches(item, self.config.vision, options.limits, options.policy, budget)

    def run(
        self,
        requests: Iterable[Callable[[], Prompt]],
        *,
        total: int | None = None,
        show_progress: bool | None = False,
        terms: Terms = DEFAULT_TERMS,
    ) -> Iterator[Answer | Exception]:
        """Answer requests in their order, a bounded number of them under way at once.

        An item that fails yields its exception. Where the engine's queue is full, the call has one
        request there and waits for that. If the caller stops early, by an exception or Ctrl-C too,
        what is under way is given up.

        Args:
            show_progress: None shows a bar on a terminal once the work takes over two seconds.
        """
        pending: deque[Pending] = deque()
        bar = _Bar(
            total=total,
            disable=None if show_progress is None else not show_progress,
            delay=2 if show_progress is None else 0,
            unit="item",
        )
        try:
            for prepare in requests:
                while (future := self._try(prepare, terms, alone=not pending)) is None:
                    outcome = _outcome(pending[0])
                    pending.popleft()
                    yield outcome
                    bar.update()
                pending.append(future)
                if len(pending) >= _WINDOW:
                    outcome = _outcome(pending[0])
                    pending.popleft()
                    yield outcome
                    bar.update()
            while pending:
                outcome = _outcome(pending[0])
                pending.popleft()
                yield outcome
                bar.update()
        finally:
            for future in pending:
                future.cancel()
            bar.close()

    async def run_async(
        self, requests: Iterable[Callable[[], Prompt]], *, terms: Terms = DEFAULT_TERMS
    ) -> AsyncGenerator[Answer | Exception, None]:
        """:meth:`run` for a coroutine: other tasks go on while it waits."""
        pending: deque[Pending] = deque()
        try:
            for prepare in requests:
                while (future := self._try(prepare, terms, alone=not pending)) is None:
                    outcome = await _outcome_async(pending[0])
                    pending.popleft()
                    yield outcome
                pending.append(future)
                if len(pending) >= _WINDOW:
                    outcome = await _outcome_async(pending[0])
                    pending.popleft()
                    yield outcome
            while pending:
                outcome = await _outcome_async(pending[0])
                pending.popleft()
                yield outcome
        finally:
            for future in pending:
                future.cancel()

    def _try(self, prepare: Callable[[], Prompt], terms: Terms, alone: bool) -> Pending | None:
        """None where the queue is full, and the call has other requests in it."""
        try:
            return self.engine.submit(self.served, prepare, terms, in_any_case=alone)
        except QueueFull:
            return None


class _Bar(tqdm):
    monitor_interval = 0  # no thread that watches over bars


async def _outcome_async(future: Pending) -> Answer | Exception:
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(_see)
    await asyncio.wait([waiting])
    return _outcome(future)


def _see(future: asyncio.Future[Answer]) -> None:
    """Otherwise asyncio logs that nobody looked at an exception, also after a cancellation."""
    if not future.cancelled():
        future.exception()


def _outcome(future: Pending) -> Answer | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Exception):
        return error
    raise error
