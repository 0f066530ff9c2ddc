"""What is asked of an engine, how it is to be treated, and what comes back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from .arguments import whole
from .prompt import Prompt
from .scheduler import LEVELS


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

    @classmethod
    def of(cls, prompt: Prompt) -> Usage:
        return cls(
            tokens=len(prompt.ids),
            visual_tokens=len(prompt.visual_index),
            truncated_tokens=prompt.truncated_tokens,
            video_reduced=any(m.reduced for m in prompt.media),
        )


@dataclass(frozen=True)
class Answer:
    """``value`` is ``[size]`` float32 from an embedder, ``[]`` from a reranker."""

    value: NDArray[np.float32]
    usage: Usage


@dataclass(frozen=True)
class Terms:
    """How a request is to be treated.

    Attributes:
        priority: ``interactive``, ``normal`` or ``bulk``.
        client: who asks: those of one level take turns.
        deadline: when the answer is no longer wanted, on the clock of ``time.monotonic``.
        batch_tokens: a lower token budget for the batch that it will be in; None: the engine's.
        vision_cache: its pictures, and the answer if it has any, may be kept and found again.
        size: of its vector, which is then of unit length; None: whole, as the final norm leaves it.
    """

    priority: str = "normal"
    client: Hashable = None
    deadline: float = math.inf
    batch_tokens: int | None = None
    vision_cache: bool = True
    size: int | None = None

    def __post_init__(self) -> None:
        if self.priority not in LEVELS:
            raise ValueError(f"priority is {self.priority!r}: use one of {', '.join(LEVELS)}")
        if self.batch_tokens is not None:
            whole("batch_tokens", self.batch_tokens)

    @classmethod
    def make(
        cls,
        *,
        priority: str,
        client: Hashable,
        timeout: float | None,
        batch_tokens: int | None,
        vision_cache: bool,
        size: int | None = None,
    ) -> Terms:
        """From the arguments of a call, which has ``timeout`` seconds from now."""
        if timeout is not None and not (isinstance(timeout, Real) and timeout > 0):
            raise ValueError(f"timeout is {timeout!r}: use seconds above 0, or None")
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            hash(client)
        except TypeError:
            raise TypeError(f"client is {client!r}: use something hashable, or None") from None
        # A call that does not say for whom it asks is a client of its own.
        owner = object() if client is None else client
        return cls(priority, owner, deadline, batch_tokens, vision_cache, size)


DEFAULT_TERMS = Terms()


class Pending(Future[Answer]):
    """The future of a request. Its ``cancel`` returns False once the request is in a batch, as
    that of any future; but a batch nobody wants any more is given up at the next piece."""

    def __init__(self) -> None:
        super().__init__()
        self.unwanted = False
        self.on_cancel: Callable[[], None] | None = None

    def cancel(self) -> bool:
        self.unwanted = True
        cancelled = super().cancel()
        told = self.on_cancel
        if cancelled and told is not None:
            told()
        return cancelled
