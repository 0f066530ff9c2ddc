"""int8 rows by weights of 4 bits: for few rows, where reading the weight is what takes time.

A weight is value · multiplier of its group of inputs · scale of its channel, with values −7 … 7
and whole multipliers. A program multiplies the int8 rows by the values, one group at a time, and
the group's int32 sums by its multipliers: the same integers, exactly, as if the weight had been
widened to int8 before, for a handful of multiplications a group in place of one a weight.

For more rows the weight is widened to int8 once, and multiplied as such: bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .common import (
    TRITON_DTYPES,
    New,
    RefusalError,
    inline,
    launch,
    require_device,
    require_unit_stride,
    target_of,
)
from .configs import INT4_ROWS, GemmConfig, gemm_config
from .epilogue import add_parts, check_epilogue, check_place, finish, place, rescale
from .gemm import linear_quantised, multiply

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Int4Packed:
    """A weight ``[N, inputs]`` as the kernel reads it. K is ``inputs`` rounded up to 2 · group.

    Attributes:
        packed: ``[N, K / 2]`` uint8: byte j of the c-th run of ``group`` bytes holds input j of
            group 2c, plus 8, in its low half, and of group 2c + 1 in its high half, so that both
            halves meet neighbours in x.
        multiplier: ``[K / group, N]`` uint8.
        scale: ``[N]`` float32.
    """

    packed: Tensor
    multiplier: Tensor
    scale: Tensor
    inputs: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, inputs)."""
        return len(self.packed), self.inputs


def pack_int4(parts: Sequence[tuple[Tensor, Tensor, Tensor]], group: int) -> Int4Packed:
    """Pack weights whose outputs follow one another.

    Args:
        parts: values ``[Ni, inputs]`` int8 in −7 … 7, multipliers ``[Ni, inputs / group]`` uint8,
            rounded up, and scales ``[Ni]`` float32 of each.
        group: 32, 64 or 128.

    Raises:
        RefusalError: another group.
    """
    if group not in GROUPS:
        raise RefusalError(f"pack_int4: groups of {group} inputs, not 32, 64 or 128")
    values = torch.cat([part[0] for part in parts])
    multiplier = torch.cat([part[1] for part in parts])
    n, inputs = values.shape
    missing = -inputs % (2 * group)
    runs = (inputs + missing) // (2 * group)
    nibbles = F.pad(values + 8, (0, missing), value=8).to(torch.uint8).view(n, runs, 2, group)
    packed = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(n, runs * group)
    multiplier = F.pad(multiplier, (0, 2 * runs - multiplier.shape[1])).T.contiguous()
    return Int4Packed(packed, multiplier, torch.cat([p[2] for p in parts]), inputs, group)


@inline
def low_half(b_w):
    """int8 of the low halves."""
    return (b_w & 15).to(tl.int8) - 8


@inline
def high_half(b_w):
    """int8 of the high halves."""
    return (b_w >> 4).to(tl.int8) - 8


@inline
def multiply_groups(b_low, b_high, b_w, p_multiplier, stride, m_n, b_acc, BK: tl.constexpr):
    """b_acc + two groups of x ``[BM, BK]`` · bytes ``[BK, BN]`` · their multipliers ``[BN]``."""
    b_first = tl.load(p_multiplier, mask=m_n, other=0).to(tl.int32)
    b_second = tl.load(p_multiplier + stride, mask=m_n, other=0).to(tl.int32)
    b_zero = tl.zeros(b_acc.shape, dtype=tl.int32)
    b_acc += multiply(b_low, low_half(b_w), b_zero, "int8", BK) * b_first[None, :]
    b_acc += multiply(b_high, high_half(b_w), b_zero, "int8", BK) * b_second[None, :]
    return b_acc


@triton.jit(do_not_specialize=["M"])
def gemm_int4_kernel(
    p_x,
    p_packed,
    p_multiplier,
    p_x_scale,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: a BM × BN block of y, or its sum over a part of K, as in ``gemm_kernel``.

    BK inputs are a group; a step takes two of them.
    """
    i_m, i_n = place(tl.program_id(0) // SPLIT, M, N, BM, BN)
    # [BM], [BN], [BK]
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    n_runs = tl.cdiv(K, 2 * BK)
    n_part = tl.cdiv(n_runs, SPLIT)
    i_split = tl.program_id(0) % SPLIT
    # [BM, BK], [BK, BN]
    p_x_block = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_w_block = p_packed + o_n.to(tl.int64)[None, :] * stride_packed + o_k[:, None]
    p_up_block = p_packed + (o_n + N).to(tl.int64)[None, :] * stride_packed + o_k[:, None]
    # [BM, BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.int32)
    if GATED:
        b_up = tl.zeros((BM, BN), dtype=tl.int32)
    for i_run in range(i_split * n_part, tl.minimum(n_runs, (i_split + 1) * n_part)):
        i_k = i_run * 2 * BK
        # [BM, BK]: the weight is padded to whole runs, x is not
        m_low, m_high = o_k < K - i_k, o_k < K - i_k - BK
        b_low = tl.load(p_x_block + i_k, mask=m_m[:, None] & m_low[None, :], other=0)
        b_high = tl.load(p_x_block + i_k + BK, mask=m_m[:, None] & m_high[None, :], other=0)
        # [BK, BN]
        b_w = tl.load(p_w_block + i_run * BK, mask=m_n[None, :], other=0)
        # [BN]
        p_groups = p_multiplier + 2 * i_run * stride_multiplier + o_n
        b_acc = multiply_groups(b_low, b_high, b_w, p_groups, stride_multiplier, m_n, b_acc, BK)
        if GATED:
            b_w = tl.load(p_up_block + i_run * BK, mask=m_n[None, :], other=0)
            b_up = multiply_groups(
                b_low, b_high, b_w, p_groups + N, stride_multiplier, m_n, b_up, BK
            )
    if SPLIT > 1:
        p_part = p_y + (i_split.to(tl.int64) * M + o_m[:, None]) * N + o_n[None, :]
        tl.store(p_part, b_acc, mask=m_m[:, None] & m_n[None, :])
    else:
        # [BM]
        b_x_scale = tl.load(p_x_scale + o_m, mask=m_m, other=0.0)
        b_y = rescale(b_acc, b_x_scale, p_w_scale, o_n, m_n)
        if GATED:
            b_y = activate(b_y, "silu") * rescale(b_up, b_x_scale, p_w_scale + N, o_n, m_n)
        finish(b_y, o_m, o_n, M, N, p_bias, p_residual, stride_residual, p_y, ACTIVATION, DTYPE)


@triton.jit
def widen_kernel(
    p_packed,
    p_multiplier,
    p_y,
    N,
    K,
    stride_packed,
    stride_multiplier,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: two groups of BN rows, as int8."""
    n_runs = tl.cdiv(K, 2 * BK)
    i_n, i_run = tl.program_id(0) // n_runs, tl.program_id(0) % n_runs
    # [BN, 1], [1, BK]
    o_n = (i_n * BN + tl.arange(0, BN))[:, None]
    o_k = tl.arange(0, BK)[None, :]
    m_n = o_n < N
    # [BN, BK]
    p_bytes = p_packed + o_n.to(tl.int64) * stride_packed + i_run * BK + o_k
    b_w = tl.load(p_bytes, mask=m_n, other=0)
    # [BN, 1]: 7 · 18 is the most
    p_groups = p_multiplier + 2 * i_run * stride_multiplier + o_n
    b_first = tl.load(p_groups, mask=m_n, other=0).to(tl.int8)
    b_second = tl.load(p_groups + stride_multiplier, mask=m_n, other=0).to(tl.int8)
    o_input = i_run * 2 * BK + o_k
    p_out = p_y + o_n.to(tl.int64) * K + o_input
    tl.store(p_out, low_half(b_w) * b_first, mask=m_n & (o_input < K))
    tl.store(p_out + BK, high_half(b_w) * b_second, mask=m_n & (o_input + BK < K))


@dataclass(frozen=True)
class WidenConfig:
    """A program widens two groups of ``n`` rows: 16 bytes a thread of them in groups of 64."""

    n: int = 32
    warps: int = 4


def widen_int4(weight: Int4Packed, *, config: WidenConfig | None = None) -> Tensor:
    """value · multiplier, ``[N, inputs]`` int8, exactly."""
    n, k = weight.shape
    require_device("widen_int4", weight.packed, weight.multiplier)
    out = torch.empty((n, k), dtype=torch.int8, device=weight.packed.device)
    config = config or WidenConfig()
    launch(
        "widen_int4",
        widen_kernel,
        triton.cdiv(n, config.n) * triton.cdiv(k, 2 * weight.group),
        weight.packed,
        weight.multiplier,
        out,
        n,
        k,
        weight.packed.stride(0),
        weight.multiplier.stride(0),
        config=config,
        BN=config.n,
        BK=weight.group,
    )
    return out


def linear_int4(
    x: Tensor,
    x_scale: Tensor,
    weight: Int4Packed,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: GemmConfig | None = None,
    out: Tensor | None = None,
    new: New = torch.empty,
) -> Tensor:
    """:func:`.gemm.linear_quantised` of int8 rows by a 4-bit weight, summed exactly.

    Args:
        x: ``[M, inputs]`` int8.
        x_scale: ``[M]`` float32.
        bias, dtype, activation, residual, gated, out, new: as there.
        config: blocks for the 4-bit kernel, which is then taken whatever M is.

    Raises:
        RefusalError: shapes do not fit, or a dtype is another.
    """
    op = "gated_linear_int4" if gated else "linear_int4"
    rows, k = weight.shape
    if x.dtype != torch.int8 or x.dim() != 2 or x.shape[1] != k:
        raise RefusalError(f"{op}: x {tuple(x.shape)} {x.dtype}, not [M, {k}] int8")
    m, n = len(x), rows // 2 if gated else rows
    if config is None and m > INT4_ROWS:
        return linear_quantised(
            x,
            x_scale,
            widen_int4(weight),
            weight.scale,
            bias,
            dtype=dtype,
            activation=activation,
            residual=residual,
            gated=gated,
            out=out,
            new=new,
        )
    if x_scale.shape != (m,) or x_scale.dtype != torch.float32 or not x_scale.is_contiguous():
        raise RefusalError(f"{op}: x_scale {tuple(x_scale.shape)} {x_scale.dtype} for {m} rows")
    require_unit_stride(op, x=x)
    check_epilogue(op, (m, n), dtype, bias, activation, residual, gated)
    check_place(op, out, residual)
    extra = [t for t in (bias, residual) if t is not None]
    require_device(op, x, x_scale, weight.packed, weight.multiplier, weight.scale, *extra)
    config = config or gemm_config("int4", target_of(x.device), m, n, k, gated=gated)
    config = replace(config, k=weight.group)
    out = new((m, n), dtype=dtype, device=x.device) if out is None else out
    parts = out
    if config.split > 1:
        parts = torch.empty((config.split, m, n), dtype=torch.int32, device=x.device)
    launch(
        op,
        gemm_int4_kernel,
        triton.cdiv(m, config.m) * triton.cdiv(n, config.n) * config.split,
        x,
        weight.packed,
        weight.multiplier,
        x_scale,
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
        DTYPE=TRITON_DTYPES[dtype],
        SPLIT=config.split,
        BM=config.m,
        BN=config.n,
        BK=config.k,
    )
    if config.split > 1:
        add_parts(parts, out, x_scale, weight.scale, bias, activation, residual)
    return out
