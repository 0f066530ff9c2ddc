"""Float rows by weights of 4 bits: what is rounded is the weight alone.

value · multiplier is a whole number up to 126, which bfloat16, float16 and float32 hold exactly. So
the weight is widened to the dtype of the rows without any rounding, in registers, a block at a
time, multiplied in the matrix unit as floats are, and the float32 sum meets the channel's scale at
the end. The same kernel serves any number of rows. For many, widening the weight once instead would
spare instructions beside the matrix unit's, and take memory of four times the packed weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .common import (
    TRITON_DTYPES,
    New,
    RefusalError,
    dot,
    inline,
    launch,
    narrow,
    require_device,
    require_floats,
    require_unit_stride,
    target_of,
)
from .configs import GemmConfig, gemm_config
from .epilogue import add_parts, check_epilogue, check_place, finish, place, rescale
from .gemm_int4 import Int4Packed


@inline
def load_multipliers(p_multiplier, stride, i_run, o_n, m_n):
    """Those of a run's two groups, ``[BN]`` uint8 each."""
    p_groups = p_multiplier + 2 * i_run * stride + o_n
    return tl.load(p_groups, mask=m_n, other=0), tl.load(p_groups + stride, mask=m_n, other=0)


@inline
def widened(b_w, b_first, b_second, DTYPE: tl.constexpr):
    """value · multiplier in DTYPE, of the low and of the high halves of bytes ``[BK, BN]``.

    Under the exponent of 2¹⁹ a byte reads as 2¹⁹ + high + low / 16: no integer is converted for it,
    which some GPUs do at an eighth of the rate of additions. Everything up to the products, which
    are below 2²⁴, is exact in float32, whether a product is fused with what follows it or not.

    Args:
        b_first, b_second: multipliers of the low and of the high halves, ``[BN]`` uint8.
    """
    # [1, BN]
    b_first, b_second = b_first.to(tl.float32)[None, :], b_second.to(tl.float32)[None, :]
    # [BK, BN]
    b_bits = b_w.to(tl.int32) | 0x49000000
    b_top = (b_bits & 0x490000F0).to(tl.float32, bitcast=True)
    b_below = b_bits.to(tl.float32, bitcast=True) - b_top
    b_low = b_below * (16.0 * b_first) - 8.0 * b_first
    b_high = b_top * b_second - 524296.0 * b_second
    return narrow(b_low, DTYPE), narrow(b_high, DTYPE)


@inline
def multiply_halves(b_low, b_high, b_w, b_first, b_second, b_acc, b_rest, DTYPE: tl.constexpr):
    """b_acc and b_rest, each with a product more: x ``[BM, BK]`` of a group by one half of the
    bytes ``[BK, BN]``.

    Two sums, since the compiler has each warp widen all of the weight where one product goes into
    the next.
    """
    b_1, b_2 = widened(b_w, b_first, b_second, DTYPE)
    return dot(b_low, b_1, b_acc), dot(b_high, b_2, b_rest)


@triton.jit(do_not_specialize=["M"])
def gemm_int4_float_kernel(
    p_x,
    p_packed,
    p_multiplier,
    p_w_scale,
    p_bias,
    p_residual,
    p_y,
    M,
    N,
    K,
    stride_x,
    stride_packed,
    stride_multiplier,
    stride_residual,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: a BM × BN block of y, or its sum over a part of K, as in ``gemm_kernel``.

    A step takes BK bytes of a run, of which GROUP is a multiple: inputs of two groups, GROUP apart.
    """
    i_m, i_n = place(tl.program_id(0) // SPLIT, M, N, BM, BN)
    # [BM], [BN], [BK]
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    n_steps = tl.cdiv(K, 2 * GROUP) * (GROUP // BK)
    n_part = tl.cdiv(n_steps, SPLIT)
    i_split = tl.program_id(0) % SPLIT
    # [BM, BK], [BK, BN]
    p_x_block = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_w_block = p_packed + o_n.to(tl.int64)[None, :] * stride_packed + o_k[:, None]
    p_up_block = p_packed + (o_n + N).to(tl.int64)[None, :] * stride_packed + o_k[:, None]
    # [BM, BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.float32)
    b_rest = tl.zeros((BM, BN), dtype=tl.float32)
    if GATED:
        b_up = tl.zeros((BM, BN), dtype=tl.float32)
        b_up_rest = tl.zeros((BM, BN), dtype=tl.float32)
    i_start, i_end = i_split * n_part, tl.minimum(n_steps, (i_split + 1) * n_part)
    # [BN]: loaded a step ahead; single bytes are too narrow for asynchronous copies
    i_run = tl.minimum(i_start, n_steps - 1) // (GROUP // BK)
    b_1, b_2 = load_multipliers(p_multiplier, stride_multiplier, i_run, o_n, m_n)
    if GATED:
        b_3, b_4 = load_multipliers(p_multiplier + N, stride_multiplier, i_run, o_n, m_n)
    for i_step in range(i_start, i_end):
        # The first input of the bytes' low halves.
        i_k = i_step // (GROUP // BK) * GROUP + i_step * BK
        # [BM, BK]: the weight is padded to whole runs, x is not
        m_low, m_high = o_k < K - i_k, o_k < K - i_k - GROUP
        b_low = tl.load(p_x_block + i_k, mask=m_m[:, None] & m_low[None, :], other=0.0)
        b_high = tl.load(p_x_block + i_k + GROUP, mask=m_m[:, None] & m_high[None, :], other=0.0)
        # [BK, BN]
        b_w = tl.load(p_w_block + i_step * BK, mask=m_n[None, :], other=0)
        # [BN]
        i_run = tl.minimum(i_step + 1, n_steps - 1) // (GROUP // BK)
        b_next_1, b_next_2 = load_multipliers(p_multiplier, stride_multiplier, i_run, o_n, m_n)
        b_acc, b_rest = multiply_halves(b_low, b_high, b_w, b_1, b_2, b_acc, b_rest, DTYPE)
        b_1, b_2 = b_next_1, b_next_2
        if GATED:
            b_w = tl.load(p_up_block + i_step * BK, mask=m_n[None, :], other=0)
            b_next_3, b_next_4 = load_multipliers(
                p_multiplier + N, stride_multiplier, i_run, o_n, m_n
            )
            b_up, b_up_rest = multiply_halves(b_low, b_high, b_w, b_3, b_4, b_up, b_up_rest, DTYPE)
            b_3, b_4 = b_next_3, b_next_4
    b_acc += b_rest
    if GATED:
        b_up += b_up_rest
    if SPLIT > 1:
        p_part = p_y + (i_split.to(tl.int64) * M + o_m[:, None]) * N + o_n[None, :]
        tl.store(p_part, b_acc, mask=m_m[:, None] & m_n[None, :])
    else:
        b_y = rescale(b_acc, None, p_w_scale, o_n, m_n)
        if GATED:
            b_y = activate(b_y, "silu") * rescale(b_up, None, p_w_scale + N, o_n, m_n)
        finish(b_y, o_m, o_n, M, N, p_bias, p_residual, stride_residual, p_y, ACTIVATION, DTYPE)


def linear_int4_float(
    x: Tensor,
    weight: Int4Packed,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: GemmConfig | None = None,
    out: Tensor | None = None,
    new: New = torch.empty,
) -> Tensor:
    """:func:`.gemm.linear` by a 4-bit weight, which is multiplied exactly.

    Args:
        x: ``[M, inputs]``, float32, float16 or bfloat16; rows may be apart.
        bias, activation, residual, gated, out, new: as there.

    Returns:
        ``[M, N]``, or ``[M, N / 2]`` if ``gated``, in the dtype of ``x``.

    Raises:
        RefusalError: shapes do not fit, or a dtype is another.
    """
    op = "gated_linear_int4_float" if gated else "linear_int4_float"
    rows, k = weight.shape
    require_floats(op, x=x)
    if x.dim() != 2 or x.shape[1] != k:
        raise RefusalError(f"{op}: x {tuple(x.shape)}, not [M, {k}]")
    if gated and rows % 2:
        raise RefusalError(f"{op}: {rows} weight rows are not as many for gate as for up")
    require_unit_stride(op, x=x)
    m, n = len(x), rows // 2 if gated else rows
    check_epilogue(op, (m, n), x.dtype, bias, activation, residual, gated)
    check_place(op, out, residual)
    extra = [t for t in (bias, residual) if t is not None]
    require_device(op, x, weight.packed, weight.multiplier, weight.scale, *extra)
    plain = x.dtype == torch.float32
    if config is None:
        config = gemm_config(
            "float32" if plain else "int4_float",
            target_of(x.device),
            m,
            n,
            k,
            activation=activation,
            gated=gated,
            residual=residual is not None,
        )
        # A step has twice k inputs; those of the plain units are in registers.
        config = replace(config, k=config.k // 2 if plain else config.k)
    config = replace(config, k=min(config.k, weight.group))
    out = new((m, n), dtype=x.dtype, device=x.device) if out is None else out
    parts = out
    if config.split > 1:
        parts = torch.empty((config.split, m, n), dtype=torch.float32, device=x.device)
    launch(
        op,
        gemm_int4_float_kernel,
        triton.cdiv(m, config.m) * triton.cdiv(n, config.n) * config.split,
        x,
        weight.packed,
        weight.multiplier,
        weight.scale,
        bias,
        residual,
        parts,
        m,
        n,
        k,
        x.stride(0),
        weight.packed.stride(0),
        weight.multiplier.stride(0),
        0 if residual is None else residual.stride(0),
        config=config,
        GATED=gated,
        ACTIVATION=activation,
        DTYPE=TRITON_DTYPES[x.dtype],
        SPLIT=config.split,
        GROUP=weight.group,
        BM=config.m,
        BN=config.n,
        BK=config.k,
    )
    if config.split > 1:
        add_parts(parts, out, None, weight.scale, bias, activation, residual)
    return out
