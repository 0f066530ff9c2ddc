"""The whole forward pass: pixels and tokens in, vectors or scores out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..config import ModelConfig
from ..ops import Ops
from ..weights import ModelWeights
from .head import head_forward
from .text import text_forward
from .vision import vision_forward


class Model:
    """The network: weights, and the ops that run it. Stateless, so calls may run at once."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Vectors ``[R, hidden_size]`` or scores ``[R]`` of ``batch.read``, float32."""
        visual: Tensor | None = None
        deepstack: list[Tensor] = []
        if batch.vision is not None:
            visual, deepstack = vision_forward(
                self.ops, self.weights.vision, self.config.vision, batch.vision
            )
            visual = visual[batch.visual_rows]
            deepstack = [level[batch.visual_rows] for level in deepstack]
        output = text_forward(
            self.ops, self.weights.text, self.config.text, batch, visual, deepstack
        )
        return head_forward(self.ops, self.weights, self.config.text, output)
