"""The whole forward pass: pixels and tokens in, vectors or scores out.

It runs in pieces. Both stages are generators that yield after each, so that who drives them can
do something more urgent in between; ``drain`` runs one to its end.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..arena import HEAP, Memory
from ..batch import Batch, Cut, VisionBatch
from ..cache import KeysValues
from ..config import ModelConfig
from ..ops import Ops
from ..weights import ModelWeights
from .head import head_forward
from .text import text_forward
from .vision import vision_forward

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """
    Attributes:
        values: for each cut its vectors ``[N, size]`` or scores ``[N]``, float32.
        kept: for each span asked for, keys and values of every layer.
    """

    values: tuple[Tensor, ...]
    kept: tuple[tuple[KeysValues, ...], ...]


class Model:
    """The network: weights, and the ops that run it. Stateless, so calls may run at once."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops

    @torch.inference_mode()
    def vision(
        self, batch: VisionBatch, *, memory: Memory = HEAP
    ) -> Generator[None, None, list[Tensor]]:
        """Visual tokens and the levels of deepstack, ``[V, hidden_size]`` each.

        Args:
            memory: for what is in between; the results are on the heap.
        """
        ops = self.ops.on(memory)
        return (yield from vision_forward(ops, self.weights.vision, self.config.vision, batch))

    @torch.inference_mode()
    def text(
        self,
        batch: Batch,
        levels: Sequence[Tensor] = (),
        resident: Sequence[Sequence[KeysValues]] = (),
        keep: Sequence[slice] = (),
        *,
        cuts: Sequence[Cut],
        memory: Memory = HEAP,
    ) -> Generator[None, None, Output]:
        """Vectors or scores of ``batch.read``.

        Args:
            levels: of :meth:`vision`, or empty; ``batch.visual_rows`` says which rows go where.
            resident, keep: see :func:`qvlfast.model.text.text_forward`.
            cuts: which of them are wanted in which form.
            memory: for what is in between; the results are on the heap.
        """
        rows = [level[batch.visual_rows] for level in levels]
        output = yield from text_forward(
            self.ops.on(memory),
            self.weights.text,
            self.config.text,
            batch,
            rows[0] if rows else None,
            rows[1:],
            resident,
            keep,
        )
        return Output(self._head(output.hidden, output.read, cuts), output.kept)

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """``[R, hidden_size]``: the read tokens of a batch of text before the final norm."""
        pieces = text_forward(self.ops, self.weights.text, self.config.text, batch)
        output = drain(pieces)
        return output.hidden if output.read is None else output.hidden[output.read]

    @torch.inference_mode()
    def head(self, hidden: Tensor, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
        """What :meth:`text` gives of ``hidden``, which is that of :meth:`hidden`."""
        return self._head(hidden, None, cuts)

    def forward(self, batch: Batch, *, memory: Memory = HEAP) -> Tensor:
        """Both stages at once: whole vectors, or scores, of ``batch.read``."""
        levels = []
        if batch.vision is not None:
            with memory.scope():
                levels = drain(self.vision(batch.vision, memory=memory))
        whole = Cut(None, np.arange(len(batch.read)))
        with memory.scope():
            return drain(self.text(batch, levels, cuts=[whole], memory=memory)).values[0]

    def _head(self, hidden: Tensor, read: Tensor | None, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
        return head_forward(self.ops, self.weights, self.config.text, hidden, read, cuts)


def drain(pieces: Generator[None, None, T]) -> T:
    """Run all pieces; returns what the generator returns."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value
