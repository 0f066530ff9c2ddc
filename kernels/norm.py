"""RMSNorm and LayerNorm over the last axis, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPES,
    RefusalError,
    RowConfig,
    launch,
    narrow,
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)


@triton.jit(do_not_specialize=["T"])
def norm_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    T,
    C,
    stride_x,
    eps,
    CENTRED: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT rows, whole. CENTRED: LayerNorm, with a bias; otherwise RMSNorm."""
    # [BT, 1]
    o_t = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    m_c = o_c < C
    # [BT, BC]
    m = (o_t < T) & m_c
    # [BT, BC]
    b_x = widen(tl.load(p_x + o_t.to(tl.int64) * stride_x + o_c, mask=m, other=0.0))
    # [1, BC]
    b_weight = widen(tl.load(p_weight + o_c, mask=m_c, other=0.0))
    if CENTRED:
        # Two passes over registers: the mean of squares less the squared mean would cancel.
        b_mean = tl.sum(b_x, axis=1, keep_dims=True) / C
        b_x = tl.where(m, b_x - b_mean, 0.0)
    # [BT, 1]
    b_var = tl.sum(b_x * b_x, axis=1, keep_dims=True) / C
    b_y = b_x * (1.0 / tl.sqrt(b_var + eps)) * b_weight
    if CENTRED:
        b_y += widen(tl.load(p_bias + o_c, mask=m_c, other=0.0))
    tl.store(p_y + o_t.to(tl.int64) * C + o_c, narrow(b_y, DTYPE), mask=m)


def normalise(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    config: RowConfig | None = None,
) -> Tensor:
    """RMSNorm without ``bias``, LayerNorm with it; the result in ``dtype``.

    Args:
        x: ``[..., C]``.
        weight, bias: ``[C]``, any float dtype.

    Raises:
        RefusalError: sizes differ, or the operands are not floats.
    """
    require_floats(op, x=x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        require_floats(op, **{name: vector})
        if vector.shape != x.shape[-1:] or not vector.is_contiguous():
            raise RefusalError(f"{op}: {name} {tuple(vector.shape)} for rows of {x.shape[-1]}")
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    require_unit_stride(op, x=rows)
    config = config or row_config(target_of(x.device), rows.shape[1])
    launch(
        op,
        norm_kernel,
        triton.cdiv(len(rows), config.rows),
        rows,
        weight,
        weight if bias is None else bias,
        out,
        len(rows),
        rows.shape[1],
        rows.stride(0),
        eps,
        config=config,
        CENTRED=bias is not None,
        DTYPE=TRITON_DTYPES[dtype],
        BT=config.rows,
        BC=config.columns,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, config: RowConfig | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight; the shape and dtype of ``x`` ``[..., C]``."""
    return normalise("rms_norm", x, weight, None, eps, x.dtype, config)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, config: RowConfig | None = None
) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias; the shape and dtype of ``x`` ``[..., C]``."""
    return normalise("layer_norm", x, weight, bias, eps, x.dtype, config)
