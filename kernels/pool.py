"""From the decoder's last hidden states to vectors and scores, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import sigmoid
from .common import (
    RefusalError,
    RowConfig,
    launch,
    require_device,
    require_unit_stride,
    row_config,
    target_of,
)
from .norm import normalise


def pool(x: Tensor, weight: Tensor, eps: float, *, config: RowConfig | None = None) -> Tensor:
    """The final RMSNorm of ``x`` ``[R, C]``, kept in float32."""
    return normalise("pool", x, weight, None, eps, torch.float32, config)


@triton.jit(do_not_specialize=["R"])
def score_kernel(
    p_x, p_answers, p_y, R, C, stride_x, stride_answers, BT: tl.constexpr, BC: tl.constexpr
):
    """One program: BT scores."""
    # [BT]
    o_r = tl.program_id(0) * BT + tl.arange(0, BT)
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    m_c = o_c < C
    # [1, BC]
    b_yes = tl.load(p_answers + o_c, mask=m_c, other=0.0)
    b_no = tl.load(p_answers + stride_answers + o_c, mask=m_c, other=0.0)
    # [BT, BC]
    p_rows = p_x + o_r.to(tl.int64)[:, None] * stride_x + o_c
    b_x = tl.load(p_rows, mask=(o_r < R)[:, None] & m_c, other=0.0)
    # [BT]
    b_logit = tl.sum(b_x * (b_yes - b_no), axis=1)
    tl.store(p_y + o_r, sigmoid(b_logit), mask=o_r < R)


def score(pooled: Tensor, answer_rows: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """sigmoid(h · (yes − no)).

    Args:
        pooled: ``[R, C]`` float32.
        answer_rows: ``[2, C]`` float32, the head's rows of ``yes`` and ``no``.

    Returns:
        ``[R]`` float32.
    """
    require_device("score", pooled, answer_rows)
    if pooled.dtype != torch.float32 or answer_rows.dtype != torch.float32:
        raise RefusalError(f"score: {pooled.dtype} by {answer_rows.dtype}, both must be float32")
    if pooled.dim() != 2 or answer_rows.shape != (2, pooled.shape[1]):
        raise RefusalError(
            f"score: pooled {tuple(pooled.shape)}, answers {tuple(answer_rows.shape)}"
        )
    require_unit_stride("score", pooled=pooled, answer_rows=answer_rows)
    out = torch.empty(len(pooled), dtype=torch.float32, device=pooled.device)
    config = config or row_config(target_of(pooled.device), pooled.shape[1])
    launch(
        "score",
        score_kernel,
        triton.cdiv(len(pooled), config.rows),
        pooled,
        answer_rows,
        out,
        len(pooled),
        pooled.shape[1],
        pooled.stride(0),
        answer_rows.stride(0),
        config=config,
        BT=config.rows,
        BC=config.columns,
    )
    return out
