"""int8 products: y = (x · weightᵀ) · x_scale · weight_scale + bias, summed exactly in int32.

One scale a token and one an output channel: the scales leave the sum whole, so it is the same in
any order, and the matrix unit never stops for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FLOATS,
    TRITON_DTYPES,
    RefusalError,
    RowConfig,
    launch,
    narrow,
    require_device,
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)
from .gemm import GemmConfig


def gemm_int8_config(target: str, m: int, n: int, k: int) -> GemmConfig:
    """Blocks for an ``[m, k]`` by ``[n, k]`` product; by reasoning, not yet by measurement.

    As :func:`.gemm.gemm_config`, with twice the ``k``, since a value is half as wide.
    """
    if target == "interpreter":
        bm, bn, bk = (min(128, max(16, triton.next_power_of_2(size))) for size in (m, n, k))
        return GemmConfig(bm, bn, bk, warps=4, stages=1)
    if m <= 16:
        return GemmConfig(16, 64, 256, warps=4, stages=4)
    if m <= 64:
        return GemmConfig(64, 64, 128, warps=4, stages=4)
    return GemmConfig(128, 128, 128, warps=8, stages=3)


@triton.jit(do_not_specialize=["T"])
def quantise_kernel(p_x, p_y, p_scale, T, C, stride_x, BT: tl.constexpr, BC: tl.constexpr):
    """One program: BT rows, whole."""
    # [BT]
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_row = o_t.to(tl.int64)[:, None]
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    # [BT, BC]
    m = (o_t < T)[:, None] & (o_c < C)
    b_x = widen(tl.load(p_x + o_row * stride_x + o_c, mask=m, other=0.0))
    # [BT]
    b_most = tl.maximum(tl.max(tl.abs(b_x), axis=1), 1e-30)
    # [BT, BC]: a rounded quotient may pass 127 by one bit, hence the bounds
    b_y = tl.floor(b_x * (127.0 / b_most)[:, None] + 0.5)
    b_y = tl.minimum(tl.maximum(b_y, -127.0), 127.0)
    tl.store(p_y + o_row * C + o_c, b_y.to(tl.int8), mask=m)
    tl.store(p_scale + o_t, b_most / 127.0, mask=o_t < T)


def quantise_rows(x: Tensor, *, config: RowConfig | None = None) -> tuple[Tensor, Tensor]:
    """int8 rows and their scales: x ≈ rows · scale, scale = max(|x|, 1e-30) / 127.

    Halves are rounded up.

    Args:
        x: ``[T, C]``, float32, float16 or bfloat16; rows may be apart.

    Returns:
        ``[T, C]`` int8 in −127 … 127, and ``[T]`` float32.
    """
    require_floats("quantise_rows", x=x)
    require_unit_stride("quantise_rows", x=x)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    config = config or row_config(target_of(x.device), x.shape[1])
    launch(
        "quantise_rows",
        quantise_kernel,
        triton.cdiv(len(x), config.rows),
        x,
        out,
        scale,
        len(x),
        x.shape[1],
        x.stride(0),
        config=config,
        BT=config.rows,
        BC=config.columns,
    )
    return out, scale


@triton.jit(do_not_specialize=["M"])
def gemm_int8_kernel(
    p_x,
    p_x_scale,
    p_weight,
    p_w_scale,
    p_bias,
    p_y,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: a BM × BN block of y, in the order of :func:`.gemm.gemm_kernel`."""
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_group = tl.program_id(0) // (8 * n_n)
    n_group = tl.minimum(n_m - i_group * 8, 8)
    i_in = tl.program_id(0) % (8 * n_n)
    # [BM], [BN], [BK]
    o_m = (i_group * 8 + i_in % n_group) * BM + tl.arange(0, BM)
    o_n = (i_in // n_group) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    # [BM, BK]
    p_x_block = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    # [BK, BN]
    p_w_block = p_weight + o_n.to(tl.int64)[None, :] * stride_weight + o_k[:, None]
    # [BM, BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.int32)
    for i_k in range(0, tl.cdiv(K, BK)):
        m_k = o_k < K - i_k * BK
        # [BM, BK]
        b_x = tl.load(p_x_block, mask=(o_m < M)[:, None] & m_k[None, :], other=0)
        # [BK, BN]
        b_w = tl.load(p_w_block, mask=m_k[:, None] & (o_n < N)[None, :], other=0)
        b_acc = tl.dot(b_x, b_w, b_acc, out_dtype=tl.int32)
        p_x_block += BK
        p_w_block += BK
    # [BM, BN]
    b_y = b_acc.to(tl.float32) * tl.load(p_x_scale + o_m, mask=o_m < M, other=0.0)[:, None]
    b_y *= tl.load(p_w_scale + o_n, mask=o_n < N, other=0.0)[None, :]
    if p_bias is not None:
        b_y += widen(tl.load(p_bias + o_n, mask=o_n < N, other=0.0))[None, :]
    p_out = p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, narrow(b_y, DTYPE), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


def linear_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """(x · weightᵀ) · x_scale · weight_scale + bias; the sum over K is exact.

    Args:
        x: ``[M, K]`` int8; K up to 2³¹ / 127² = 133,000, so that no sum overflows.
        x_scale: ``[M]`` float32.
        weight: ``[N, K]`` int8.
        weight_scale: ``[N]`` float32.
        bias: ``[N]`` in any float dtype, or None.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        ``[M, N]``.

    Raises:
        RefusalError: shapes do not fit, or a dtype is another.
    """
    op = "linear_int8"
    require_device(op, x, x_scale, weight, weight_scale, *([] if bias is None else [bias]))
    if x.dtype != torch.int8 or weight.dtype != torch.int8 or dtype not in FLOATS:
        raise RefusalError(f"{op}: {x.dtype} by {weight.dtype} to {dtype}, not int8 to a float")
    (m, k), n = x.shape, len(weight)
    if weight.shape != (n, k) or k > (1 << 31) // 127**2:
        raise RefusalError(f"{op}: x {tuple(x.shape)} by weight {tuple(weight.shape)}")
    for name, scale, count in (("x_scale", x_scale, m), ("weight_scale", weight_scale, n)):
        if scale.shape != (count,) or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise RefusalError(f"{op}: {name} {tuple(scale.shape)} {scale.dtype} for {count}")
    if bias is not None:
        require_floats(op, bias=bias)
        if bias.shape != (n,) or not bias.is_contiguous():
            raise RefusalError(f"{op}: bias {tuple(bias.shape)} for {n} outputs")
    require_unit_stride(op, x=x, weight=weight)
    config = config or gemm_int8_config(target_of(x.device), m, n, k)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    launch(
        op,
        gemm_int8_kernel,
        triton.cdiv(m, config.m) * triton.cdiv(n, config.n),
        x,
        x_scale,
        weight,
        weight_scale,
        bias,
        out,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        config=config,
        DTYPE=TRITON_DTYPES[dtype],
        BM=config.m,
        BN=config.n,
        BK=config.k,
    )
    return out
