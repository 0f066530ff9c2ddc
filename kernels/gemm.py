"""Matrix products with weights: y = activation(x · weightᵀ + bias), accumulated in float32.

This is the pointer family: loads go through cp.async on sm_80 to 89 and 120, and work everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .common import (
    TRITON_DTYPES,
    RefusalError,
    dot,
    launch,
    narrow,
    require_floats,
    require_unit_stride,
    target_of,
    widen,
)

ACTIVATIONS = ("none", "gelu_tanh", "gelu_erf", "silu")


@dataclass(frozen=True)
class GemmConfig:
    """A program makes ``m`` × ``n`` results, ``k`` of the inner size at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def gemm_config(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, activation: str = "none"
) -> GemmConfig:
    """Blocks for an ``[m, k]`` by ``[n, k]`` product; by reasoning, not yet by measurement.

    float32 multiplies on the plain units, so its blocks are small enough for registers. In 16
    bits a product of few rows is bound by reading the weight: narrow blocks make enough programs,
    and deep ``k`` with 4 stages keeps loads in flight. One of many rows is bound by arithmetic:
    128 × 128 is the largest block whose 3 stages (96 KB) fit all targets; sm_90 and sm_100 have
    227 KB and wider matrix units, which want 256 columns; but not with erf behind them, whose
    polynomials do not fit the registers that are left; nor does 128 × 128 on sm_110 (both seen in
    the machine code).
    """
    if target == "interpreter":
        bm, bn, bk = (min(512, max(16, triton.next_power_of_2(size))) for size in (m, n, k))
        return GemmConfig(bm, bn, bk, warps=4, stages=1)
    if dtype == torch.float32:
        return GemmConfig(16 if m <= 16 else 64, 64, 32, warps=4 if m <= 16 else 8, stages=2)
    if m <= 16:
        return GemmConfig(16, 64, 128, warps=4, stages=4)
    if m <= 64:
        return GemmConfig(64, 64, 64, warps=4, stages=4)
    if target in ("sm_90", "sm_100") and n >= 1024 and activation != "gelu_erf":
        return GemmConfig(128, 256, 64, warps=8, stages=3)
    return GemmConfig(128, 64 if target == "sm_110" else 128, 64, warps=8, stages=3)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: a BM × BN block of y.

    Programs run down the rows in groups of 8 row blocks, so that those under way at once share
    rows of x and of the weight in L2.
    """
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_group = tl.program_id(0) // (8 * n_n)
    n_group = tl.minimum(n_m - i_group * 8, 8)
    i_in = tl.program_id(0) % (8 * n_n)
    i_m, i_n = i_group * 8 + i_in % n_group, i_in // n_group
    # [BM], [BN], [BK]
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    # [BM, BK]
    p_x_block = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    # [BK, BN]
    p_w_block = p_weight + o_n.to(tl.int64)[None, :] * stride_weight + o_k[:, None]
    # [BM, BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        m_k = o_k < K - i_k * BK
        # [BM, BK]
        b_x = tl.load(p_x_block, mask=(o_m < M)[:, None] & m_k[None, :], other=0.0)
        # [BK, BN]
        b_w = tl.load(p_w_block, mask=m_k[:, None] & (o_n < N)[None, :], other=0.0)
        b_acc = dot(b_x, b_w, b_acc)
        p_x_block += BK
        p_w_block += BK
    if p_bias is not None:
        b_acc += widen(tl.load(p_bias + o_n, mask=o_n < N, other=0.0))[None, :]
    if ACTIVATION != "none":
        b_acc = activate(b_acc, ACTIVATION)
    p_out = p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, narrow(b_acc, DTYPE), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    config: GemmConfig | None = None,
) -> Tensor:
    """activation(x · weightᵀ + bias).

    Args:
        x: ``[M, K]``, float32, float16 or bfloat16; rows may be apart.
        weight: ``[N, K]``, the dtype of ``x``; rows may be apart.
        bias: ``[N]`` in any float dtype, or None.
        activation: one of :data:`ACTIVATIONS`, applied to the float32 sum.

    Returns:
        ``[M, N]`` in the dtype of ``x``.

    Raises:
        RefusalError: shapes do not fit, or dtypes differ.
    """
    require_floats("linear", x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise RefusalError(
            f"linear: x {tuple(x.shape)} by weight {tuple(weight.shape)}, not [M, K] by [N, K]"
        )
    if activation not in ACTIVATIONS:
        raise RefusalError(
            f"linear: activation {activation!r}, not one of {', '.join(ACTIVATIONS)}"
        )
    if bias is not None:
        require_floats("linear", bias=bias)
        if bias.shape != weight.shape[:1] or not bias.is_contiguous():
            raise RefusalError(f"linear: bias {tuple(bias.shape)} for {len(weight)} outputs")
    require_unit_stride("linear", x=x, weight=weight)
    m, n, k = len(x), len(weight), x.shape[1]
    config = config or gemm_config(target_of(x.device), x.dtype, m, n, k, activation)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    launch(
        "linear",
        gemm_kernel,
        triton.cdiv(m, config.m) * triton.cdiv(n, config.n),
        x,
        weight,
        bias,
        out,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        config=config,
        ACTIVATION=activation,
        DTYPE=TRITON_DTYPES[x.dtype],
        BM=config.m,
        BN=config.n,
        BK=config.k,
    )
    return out
