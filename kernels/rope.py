"""Rotary position embeddings of both towers, and the norm of heads that goes before it."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPES,
    RefusalError,
    RowConfig,
    inline,
    launch,
    narrow,
    require_device,
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)


@lru_cache(maxsize=16)
def _mrope_frequencies(
    head_dim: int, theta: float, section: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Frequency and axis (0 time, 1 row, 2 column) of each of ``head_dim`` / 2 columns.

    The powers come from the host: an error of one bit in a frequency grows with the position.
    """
    index = torch.arange(head_dim // 2)
    frequency = 1.0 / theta ** (2 * index.float() / head_dim)
    axis = torch.zeros(head_dim // 2, dtype=torch.int32)
    axis[(index % 3 == 1) & (index < 3 * section[1])] = 1
    axis[(index % 3 == 2) & (index < 3 * section[2])] = 2
    return frequency.to(device), axis.to(device)


@lru_cache(maxsize=16)
def _vision_frequencies(head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for the vision tower: a quarter of the head by row (0), a quarter by column (1)."""
    index = torch.arange(head_dim // 4)
    frequency = 1.0 / theta ** (2 * index.float() / (head_dim // 2))
    axis = torch.arange(2, dtype=torch.int32).repeat_interleave(len(index))
    return frequency.repeat(2).to(device), axis.to(device)


@inline
def sine_cosine(b_angle):
    """sin and cos of float32 angles of any size, within 1.5e-7.

    A quarter of a turn at a time is taken off in float64, which is exact enough and cheap here;
    what is left, up to π/4, goes into the two polynomials of the Cephes library's sinf and cosf.
    The compiler's own sine carries a path for large angles that works in local memory.
    """
    b_quarters = b_angle.to(tl.float64) * 0.6366197723675814
    b_whole = tl.floor(b_quarters + 0.5)
    b_r = ((b_quarters - b_whole) * 1.5707963267948966).to(tl.float32)
    b_z = b_r * b_r
    b_s = ((-1.9515295891e-4 * b_z + 8.3321608736e-3) * b_z - 1.6666654611e-1) * b_z * b_r + b_r
    b_c = (2.443315711809948e-5 * b_z - 1.388731625493765e-3) * b_z + 4.166664568298827e-2
    b_c = b_c * b_z * b_z - 0.5 * b_z + 1.0
    i_quarter = b_whole.to(tl.int32) & 3
    b_sin = tl.where((i_quarter & 1) == 1, b_c, b_s)
    b_cos = tl.where((i_quarter & 1) == 1, b_s, b_c)
    b_sin = tl.where(i_quarter >= 2, -b_sin, b_sin)
    b_cos = tl.where((i_quarter == 1) | (i_quarter == 2), -b_cos, b_cos)
    return b_sin, b_cos


@triton.jit(do_not_specialize=["T"])
def tables_kernel(
    p_positions,
    p_frequency,
    p_axis,
    p_cos,
    p_sin,
    T,
    C,
    stride_axis,
    stride_t,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT tokens of both tables ``[T, C]``."""
    # [BT, 1]
    o_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    m_c = o_c < C
    # [BT, BC]
    m = (o_t < T) & m_c
    # [1, BC]
    b_frequency = tl.load(p_frequency + o_c, mask=m_c, other=0.0)
    b_axis = tl.load(p_axis + o_c, mask=m_c, other=0)
    # [BT, BC]
    b_position = tl.load(p_positions + b_axis * stride_axis + o_t * stride_t, mask=m, other=0)
    b_angle = b_position.to(tl.float32) * b_frequency
    b_sin, b_cos = sine_cosine(b_angle)
    tl.store(p_cos + o_t * C + o_c, b_cos, mask=m)
    tl.store(p_sin + o_t * C + o_c, b_sin, mask=m)


def _tables(
    op: str, positions: Tensor, frequency: Tensor, axis: Tensor, config: RowConfig | None
) -> tuple[Tensor, Tensor]:
    require_device(op, positions)
    if positions.dtype not in (torch.int32, torch.int64):
        raise RefusalError(f"{op}: positions are {positions.dtype}, not int32 or int64")
    tokens, columns = positions.shape[1], len(frequency)
    cos = torch.empty((tokens, columns), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    config = config or row_config(target_of(positions.device), columns)
    launch(
        op,
        tables_kernel,
        triton.cdiv(tokens, config.rows),
        positions,
        frequency,
        axis,
        cos,
        sin,
        tokens,
        columns,
        positions.stride(0),
        positions.stride(1),
        config=config,
        BT=config.rows,
        BC=config.columns,
    )
    return cos, sin


def mrope_tables(
    positions: Tensor,
    head_dim: int,
    theta: float,
    section: tuple[int, int, int],
    *,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """cos, sin ``[T, head_dim / 2]`` float32 of the decoder's interleaved three-axis rope.

    Args:
        positions: ``[3, T]`` int32 or int64: time, row, column.
        section: the number of frequencies of each axis.
    """
    frequency, axis = _mrope_frequencies(head_dim, theta, tuple(section), positions.device)
    return _tables("mrope_tables", positions, frequency, axis, config)


def vision_rope_tables(
    positions: Tensor, head_dim: int, theta: float, *, config: RowConfig | None = None
) -> tuple[Tensor, Tensor]:
    """cos, sin ``[N, head_dim / 2]`` float32 of the vision tower's rope.

    Args:
        positions: ``[2, N]`` int32 or int64: row and column of each patch.
    """
    frequency, axis = _vision_frequencies(head_dim, theta, positions.device)
    return _tables("vision_rope_tables", positions, frequency, axis, config)


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_y,
    T,
    stride_t,
    stride_h,
    stride_y_t,
    stride_y_h,
    eps,
    H: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT heads, one after the other over tokens and heads, each as its two halves.

    With ``p_weight`` each head is first divided by its root mean square and multiplied by it.
    """
    # [BT, 1], counting heads of all tokens
    o_row = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    m_c = o_c < HALF
    # [BT, BC]
    m = (o_row < T * H) & m_c
    # [BT, 1]
    o_t = o_row // H
    # [BT, BC]
    o_h = o_row % H
    p_first = p_x + o_t * stride_t + o_h * stride_h + o_c
    b_first = widen(tl.load(p_first, mask=m, other=0.0))
    b_second = widen(tl.load(p_first + HALF, mask=m, other=0.0))
    if p_weight is not None:
        # [BT, 1]
        b_sum = tl.sum(b_first * b_first + b_second * b_second, axis=1, keep_dims=True)
        b_scale = 1.0 / tl.sqrt(b_sum / (2 * HALF) + eps)
        b_first *= b_scale * widen(tl.load(p_weight + o_c, mask=m_c, other=0.0))
        b_second *= b_scale * widen(tl.load(p_weight + HALF + o_c, mask=m_c, other=0.0))
    # [BT, BC]
    b_cos = tl.load(p_cos + o_t * HALF + o_c, mask=m, other=0.0)
    b_sin = tl.load(p_sin + o_t * HALF + o_c, mask=m, other=0.0)
    # The same thread reads and writes a value, so y may be x.
    p_out = p_y + o_t * stride_y_t + o_h * stride_y_h + o_c
    tl.store(p_out, narrow(b_first * b_cos - b_second * b_sin, DTYPE), mask=m)
    tl.store(p_out + HALF, narrow(b_second * b_cos + b_first * b_sin, DTYPE), mask=m)


def _rotate(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    config: RowConfig | None,
    out: Tensor | None,
) -> Tensor:
    require_floats(op, x=x)
    tokens, heads, dim = x.shape
    require_device(op, x, cos, sin, *([] if weight is None else [weight]))
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, dim // 2) or table.dtype != torch.float32:
            raise RefusalError(
                f"{op}: {name} is {tuple(table.shape)} {table.dtype}, "
                f"not [T, D / 2] = ({tokens}, {dim // 2}) float32"
            )
    if dim % 2 or not (cos.is_contiguous() and sin.is_contiguous()):
        raise RefusalError(f"{op}: a head of {dim} values, or tables that are not contiguous")
    if weight is not None and (weight.shape != (dim,) or not weight.is_contiguous()):
        raise RefusalError(f"{op}: weight is {tuple(weight.shape)} for heads of {dim}")
    require_unit_stride(op, x=x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    config = config or row_config(target_of(x.device), dim // 2)
    launch(
        op,
        rope_kernel,
        triton.cdiv(tokens * heads, config.rows),
        x,
        weight,
        cos,
        sin,
        out,
        tokens,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        eps,
        config=config,
        H=heads,
        HALF=dim // 2,
        DTYPE=TRITON_DTYPES[x.dtype],
        BT=config.rows,
        BC=config.columns,
    )
    return out


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    config: RowConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate halves of every head of every token.

    Args:
        x: ``[T, H, D]``; tokens and heads may be apart.
        cos, sin: ``[T, D / 2]`` float32.
        out: ``x``, for the result to take its place.

    Returns:
        ``[T, H, D]``, contiguous, in the dtype of ``x``; or ``out``.
    """
    return _rotate("rope", x, None, cos, sin, 0.0, config, out)


def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    config: RowConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm of each head with ``weight`` ``[D]``, then :func:`rope`, in one pass."""
    return _rotate("norm_rope", x, weight, cos, sin, eps, config, out)
