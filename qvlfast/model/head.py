"""From the decoder's output to what a caller asked for: a vector or a score."""

from __future__ import annotations

from torch import Tensor

from ..config import TextConfig
from ..ops import Ops
from ..weights import ModelWeights
from .text import TextOutput


def head_forward(ops: Ops, weights: ModelWeights, config: TextConfig, output: TextOutput) -> Tensor:
    """Vectors ``[R, hidden_size]`` of an embedder (before any cut or scaling to unit length), or
    scores ``[R]`` of a reranker; float32."""
    norm, eps = weights.text.norm, config.norm_eps
    if weights.answer_rows is None:
        return ops.pool(output.hidden, norm, eps, read=output.read)
    return ops.score(output.hidden, norm, eps, weights.answer_rows, read=output.read)
