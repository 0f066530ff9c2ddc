"""From the decoder's output to what a caller asked for: a vector or a score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Cut
from ..config import TextConfig
from ..ops import Ops
from ..weights import ModelWeights


def head_forward(
    ops: Ops,
    weights: ModelWeights,
    config: TextConfig,
    hidden: Tensor,
    read: Tensor | None,
    cuts: Sequence[Cut],
) -> tuple[Tensor, ...]:
    """Vectors of an embedder, ``[N, hidden_size]`` or ``[N, size]``, or scores ``[N]`` of a
    reranker, for each cut; float32.

    Args:
        hidden: ``[T, hidden_size]``, before the final norm.
        read: ``[R]`` int64, the rows of ``hidden`` that were read; None: all of them.
    """
    norm, eps = weights.text.norm, config.norm_eps
    count = len(hidden) if read is None else len(read)
    made = []
    for cut in cuts:
        rows = read
        if len(cut.reads) < count:
            own = torch.from_numpy(cut.reads).to(hidden.device)
            rows = own if read is None else read[own]
        if weights.answer_rows is None:
            made.append(ops.pool(hidden, norm, eps, read=rows, size=cut.size))
        else:
            made.append(ops.score(hidden, norm, eps, weights.answer_rows, read=rows))
    return tuple(made)
