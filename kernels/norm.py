"""RMSNorm and LayerNorm over the last axis, in float32; int8 or e4m3 out in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPES,
    New,
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
from .quantise import new_rows, quantise_block, require_form


@triton.jit(do_not_specialize=["T"])
def norm_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    p_scale,
    T,
    C,
    stride_x,
    eps,
    CENTRED: tl.constexpr,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT rows, whole. CENTRED: LayerNorm, with a bias; otherwise RMSNorm.

    With a FORM the result is quantised, one scale a row.
    """
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
    p_out = p_y + o_t.to(tl.int64) * C + o_c
    if FORM == "float":
        tl.store(p_out, narrow(b_y, DTYPE), mask=m)
    else:
        # Rounded first, as if it had been stored in between: the same bits either way.
        b_values, b_scale = quantise_block(widen(narrow(b_y, DTYPE)), FORM)
        tl.store(p_out, b_values, mask=m)
        # [BT]
        o_row = tl.program_id(0) * BT + tl.arange(0, BT)
        tl.store(p_scale + o_row, b_scale, mask=o_row < T)


def normalise(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rows: str = "float",
    config: RowConfig | None = None,
    new: New = torch.empty,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm without ``bias``, LayerNorm with it.

    Args:
        x: ``[..., C]``, or ``[T, C]`` if the result is to be quantised.
        weight, bias: ``[C]``, any float dtype.
        rows: ``float`` for the dtype of ``x``; ``int8`` or ``fp8`` for values and scales.

    Raises:
        RefusalError: sizes differ, the operands are not floats, or the device has no e4m3.
    """
    require_floats(op, x=x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        require_floats(op, **{name: vector})
        if vector.shape != x.shape[-1:] or not vector.is_contiguous():
            raise RefusalError(f"{op}: {name} {tuple(vector.shape)} for rows of {x.shape[-1]}")
    flat = x.reshape(-1, x.shape[-1])
    require_unit_stride(op, x=flat)
    if rows == "float":
        out, scale = new(x.shape, dtype=x.dtype, device=x.device), None
    else:
        require_form(op, rows, x.device)
        out, scale = new_rows(tuple(flat.shape), rows, x.device, new)
    config = config or row_config(target_of(x.device), flat.shape[1])
    launch(
        op,
        norm_kernel,
        triton.cdiv(len(flat), config.rows),
        flat,
        weight,
        bias,
        out,
        scale,
        len(flat),
        flat.shape[1],
        flat.stride(0),
        eps,
        config=config,
        CENTRED=bias is not None,
        FORM=rows,
        DTYPE=TRITON_DTYPES[x.dtype],
        BT=config.rows,
        BC=config.columns,
    )
    return out if scale is None else (out, scale)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rows: str = "float",
    *,
    config: RowConfig | None = None,
    new: New = torch.empty,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) · weight; see :func:`normalise`."""
    return normalise("rms_norm", x, weight, None, eps, rows, config, new)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rows: str = "float",
    *,
    config: RowConfig | None = None,
    new: New = torch.empty,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x − mean) / sqrt(var + eps) · weight + bias; see :func:`normalise`."""
    return normalise("layer_norm", x, weight, bias, eps, rows, config, new)
