"""From the decoder's output to what a caller asked for: a vector or a score."""

from __future__ import annotations

from torch import Tensor

from ..config import TextConfig
from ..ops import Ops
from ..weights import ModelWeights


def head_forward(ops: Ops, weights: ModelWeights, config: TextConfig, hidden: Tensor) -> Tensor:
    """Vectors ``[R, hidden_size]`` of an embedder (before any cut or scaling to unit length), or
    scores ``[R]`` of a reranker; float32."""
    pooled = ops.pool(hidden, weights.text.norm, config.norm_eps)
    if weights.answer_rows is None:
        return pooled
    return ops.score(pooled, weights.answer_rows)
