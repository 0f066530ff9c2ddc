"""A loaded model ready for requests: what :class:`Embedder` and :class:`Reranker` share."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .checkpoint import Checkpoint, locate
from .config import ModelConfig, load_config, load_pixel_config
from .dispatch import check_backend, choose_device, choose_ops
from .engine import Answer, Engine, Usage
from .inputs import Item
from .media import MediaPolicy
from .model import Model
from .pixels import Patches, PixelLimits
from .prompt import Prompt, Prompter
from .quant import Quantization
from .scheduler import Budget
from .video import item_patches
from .weights import load_weights, stored_dtype

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
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: use a positive number of tokens")
        if isinstance(allow_media_domains, str):
            raise ValueError(
                f"allow_media_domains is the string {allow_media_domains!r}: use a list of hosts"
            )
        limits = PixelLimits(min_pixels, max_pixels, total_pixels, fps, max_frames)
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


def warn_if_truncated(usage: Sequence[Usage | None], stacklevel: int = 3) -> None:
    """Warn once about all items of a call that lost text."""
    short = [i for i, u in enumerate(usage) if u is not None and u.truncated_tokens]
    if short:
        warnings.warn(
            f"{len(short)} of {len(usage)} inputs were longer than max_length and lost text from "
            f"their end (the first is item {short[0]}); details=True says how much, "
            "truncate=False makes it an error",
            TruncationWarning,
            stacklevel=stacklevel,
        )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """``auto`` → None (the dtype of the checkpoint), names and torch dtypes → torch dtypes."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")


class Runtime:
    """Configuration, prompts and engine of one checkpoint."""

    def __init__(
        self, config: ModelConfig, prompter: Prompter, engine: Engine, options: InputOptions
    ) -> None:
        self.config = config
        self.prompter = prompter
        self.engine = engine
        self.options = options
        # The engine's thread keeps the model alive. Requests hold on to this object, so when it is
        # dropped without close() none is left, and the thread can end.
        weakref.finalize(self, engine.stop).atexit = False

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
        revision: str | None,
        local_files_only: bool,
    ) -> Runtime:
        """Load a checkpoint; the arguments are those of ``from_pretrained``."""
        torch_device = choose_device(device)
        torch_dtype = parse_dtype(dtype)
        plan = Quantization.parse(quantization)
        budget = Budget(batch_tokens, batch_patches)
        check_backend(backend)
        folder = locate(model, revision=revision, local_files_only=local_files_only)
        config = load_config(folder)
        checkpoint = Checkpoint(folder)
        torch_dtype = torch_dtype or stored_dtype(checkpoint)
        ops = choose_ops(backend, torch_device, torch_dtype, plan.format if plan else None)
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
        engine = Engine(network, torch_device, budget, share_prefixes=share_prefixes)
        return cls(config, prompter, engine, options)

    def load_media(self, item: Item, rest: Callable[[], Prompt]) -> list[Patches]:
        """Decode and cut the videos, then the images, of an input.

        Args:
            rest: makes the prompt without this input's media and text; a long video is fitted
                into what that leaves of ``max_length``.
        """
        options = self.options
        budget = options.max_length - len(rest().ids) if item.videos else None
        return item_patches(item, self.config.vision, options.limits, options.policy, budget)

    def run(
        self,
        requests: Iterable[Callable[[], Prompt]],
        *,
        total: int | None = None,
        show_progress: bool | None = False,
        batch_tokens: int | None = None,
    ) -> Iterator[Answer | Exception]:
        """Answer requests in their order, a bounded number of them under way at once.

        An item that fails yields its exception. If the caller stops early, by an exception or
        Ctrl-C too, what has not started is cancelled.

        Args:
            show_progress: None shows a bar on a terminal once the work takes over two seconds.
        """
        pending: deque[Future[Answer]] = deque()
        bar = _Bar(
            total=total,
            disable=None if show_progress is None else not show_progress,
            delay=2 if show_progress is None else 0,
            unit="item",
        )
        try:
            for prepare in requests:
                pending.append(self.engine.submit(prepare, batch_tokens))
                if len(pending) >= _WINDOW:
                    yield _outcome(pending.popleft())
                    bar.update()
            while pending:
                yield _outcome(pending.popleft())
                bar.update()
        finally:
            for future in pending:
                future.cancel()
            bar.close()


class _Bar(tqdm):
    monitor_interval = 0  # no thread that watches over bars


def _outcome(future: Future[Answer]) -> Answer | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Exception):
        return error
    raise error
