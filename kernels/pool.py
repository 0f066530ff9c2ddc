"""From the decoder's last hidden states to vectors and scores, in float32, one launch each."""

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
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)


@triton.jit(do_not_specialize=["R"])
def pool_kernel(
    p_x,
    p_read,
    p_weight,
    p_answers,
    p_y,
    R,
    C,
    SIZE,
    stride_x,
    stride_answers,
    eps,
    UNIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT read tokens, whole: their norm, then their vectors or their scores.

    UNIT: scaled to unit length over the first SIZE columns, which alone are stored.
    """
    # [BT]
    o_r = tl.program_id(0) * BT + tl.arange(0, BT)
    o_row = o_r.to(tl.int64)
    if p_read is not None:
        o_row = tl.load(p_read + o_r, mask=o_r < R, other=0).to(tl.int64)
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    m_c = o_c < C
    # [BT, BC]
    m = (o_r < R)[:, None] & m_c
    b_x = widen(tl.load(p_x + o_row[:, None] * stride_x + o_c, mask=m, other=0.0))
    # [BT, 1]
    b_var = tl.sum(b_x * b_x, axis=1, keep_dims=True) / C
    # [BT, BC]
    b_y = b_x * (1.0 / tl.sqrt(b_var + eps)) * widen(tl.load(p_weight + o_c, mask=m_c, other=0.0))
    if p_answers is not None:
        # [1, BC]
        b_yes = tl.load(p_answers + o_c, mask=m_c, other=0.0)
        b_no = tl.load(p_answers + stride_answers + o_c, mask=m_c, other=0.0)
        tl.store(p_y + o_r, sigmoid(tl.sum(b_y * (b_yes - b_no), axis=1)), mask=o_r < R)
    else:
        if UNIT:
            # [BT, 1]
            b_cut = tl.where(o_c < SIZE, b_y, 0.0)
            b_length = tl.sqrt(tl.sum(b_cut * b_cut, axis=1, keep_dims=True))
            b_y = b_y / tl.maximum(b_length, 1e-12)
        p_out = p_y + o_r.to(tl.int64)[:, None] * SIZE + o_c
        tl.store(p_out, b_y, mask=m & (o_c < SIZE))


def _pool(
    op: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    read: Tensor | None,
    answers: Tensor | None,
    size: int | None,
    config: RowConfig | None,
) -> Tensor:
    require_floats(op, x=x)
    require_floats(op, weight=weight)
    require_device(op, x, weight, *(t for t in (read, answers) if t is not None))
    if x.dim() != 2 or weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise RefusalError(f"{op}: weight {tuple(weight.shape)} for x {tuple(x.shape)}")
    require_unit_stride(op, x=x)
    columns = x.shape[1]
    if read is not None and (read.dim() != 1 or read.dtype not in (torch.int32, torch.int64)):
        raise RefusalError(
            f"{op}: read {tuple(read.shape)} is {read.dtype}, not int32 or int64 [R]"
        )
    if size is not None and not 1 <= size <= columns:
        raise RefusalError(f"{op}: size is {size}, rows have {columns} values")
    if answers is not None:
        if answers.shape != (2, columns) or answers.dtype != torch.float32:
            raise RefusalError(
                f"{op}: answers {tuple(answers.shape)} {answers.dtype}, not (2, {columns}) float32"
            )
        require_unit_stride(op, answers=answers)
    rows = len(x) if read is None else len(read)
    stored = columns if size is None else size
    shape = (rows, stored) if answers is None else (rows,)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    config = config or row_config(target_of(x.device), columns)
    launch(
        op,
        pool_kernel,
        triton.cdiv(rows, config.rows),
        x,
        None if read is None else read.contiguous(),
        weight,
        answers,
        out,
        rows,
        columns,
        stored,
        x.stride(0),
        0 if answers is None else answers.stride(0),
        eps,
        config=config,
        UNIT=size is not None,
        BT=config.rows,
        BC=config.columns,
    )
    return out


def pool(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    read: Tensor | None = None,
    size: int | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """The final RMSNorm of the read tokens, cut and scaled to unit length if ``size`` is given.

    Args:
        x: ``[T, C]``, float32, float16 or bfloat16; rows may be apart.
        weight: ``[C]`` in any float dtype.
        read: ``[R]`` int32 or int64 rows of ``x``; None for all of them.
        size: keep that many values of each.

    Returns:
        ``[R, C]`` or ``[R, size]`` float32.
    """
    return _pool("pool", x, weight, eps, read, None, size, config)


def score(
    x: Tensor,
    weight: Tensor,
    eps: float,
    answer_rows: Tensor,
    *,
    read: Tensor | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """sigmoid(h · (yes − no)) of the final RMSNorm h of the read tokens; ``[R]`` float32.

    Args:
        x, weight, read: as in :func:`pool`.
        answer_rows: ``[2, C]`` float32, the head's rows of ``yes`` and ``no``.
    """
    return _pool("score", x, weight, eps, read, answer_rows, None, config)
