"""What surrounds the loop of every matrix product: which block a program makes, and what becomes of
its sums.

The scales of quantised operands, then bias, activation and residual, in float32 and with one
rounding. Where K was split over programs, a second launch adds their sums, in their order, and
goes on from there; nothing depends on which program was faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .common import (
    FLOATS,
    TRITON_DTYPES,
    RefusalError,
    inline,
    launch,
    narrow,
    require_floats,
    require_unit_stride,
    widen,
)

ACTIVATIONS = ("none", "gelu_tanh", "gelu_erf", "silu")


@inline
def place(i_program, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Row block and column block of a program.

    Programs run down the rows in groups of 8 row blocks, so that those under way at once share
    rows of x and of the weight in L2.
    """
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_group = i_program // (8 * n_n)
    n_group = tl.minimum(n_m - i_group * 8, 8)
    i_in = i_program % (8 * n_n)
    return i_group * 8 + i_in % n_group, i_in // n_group


@inline
def rescale(b_acc, b_x_scale, p_w_scale, o_n, m_n):
    """float32 of a sum, times its token's scale and then its channel's, where there are such."""
    # [BM, BN]
    b_y = b_acc.to(tl.float32)
    if b_x_scale is not None:
        b_y *= b_x_scale[:, None]
    if p_w_scale is not None:
        b_y *= tl.load(p_w_scale + o_n, mask=m_n, other=0.0)[None, :]
    return b_y


@inline
def finish(
    b_y,
    o_m,
    o_n,
    M,
    N,
    p_bias,
    p_residual,
    stride_residual,
    p_y,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What follows a product, up to the one rounding, and its store."""
    # [BM, BN]
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    if p_bias is not None:
        b_y += widen(tl.load(p_bias + o_n, mask=o_n < N, other=0.0))[None, :]
    if ACTIVATION != "none":
        b_y = activate(b_y, ACTIVATION)
    if p_residual is not None:
        p_rest = p_residual + o_m.to(tl.int64)[:, None] * stride_residual + o_n[None, :]
        b_y += widen(tl.load(p_rest, mask=m, other=0.0))
    p_out = p_y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, narrow(b_y, DTYPE), mask=m)


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    p_part,
    p_x_scale,
    p_w_scale,
    p_bias,
    p_residual,
    p_y,
    M,
    N,
    stride_residual,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: a BM × BN block of y from SPLIT sums, added in their order."""
    i_m, i_n = tl.program_id(0) // tl.cdiv(N, BN), tl.program_id(0) % tl.cdiv(N, BN)
    # [BM], [BN]
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    # [BM, BN]
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    p_block = p_part + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    b_acc = tl.load(p_block, mask=m, other=0)
    for i_split in tl.static_range(1, SPLIT):
        o_part = (o_m + i_split * M).to(tl.int64)[:, None] * N + o_n[None, :]
        b_acc += tl.load(p_part + o_part, mask=m, other=0)
    if p_x_scale is not None:
        # [BM]
        b_x_scale = tl.load(p_x_scale + o_m, mask=o_m < M, other=0.0)
        b_acc = rescale(b_acc, b_x_scale, p_w_scale, o_n, o_n < N)
    elif p_w_scale is not None:
        b_acc = rescale(b_acc, None, p_w_scale, o_n, o_n < N)
    finish(b_acc, o_m, o_n, M, N, p_bias, p_residual, stride_residual, p_y, ACTIVATION, DTYPE)


@dataclass(frozen=True)
class _ReduceConfig:
    """A program adds the parts of ``m`` × ``n`` results: one vector a thread, many programs."""

    m: int = 4
    n: int = 256
    warps: int = 4


def add_parts(
    parts: Tensor,
    out: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    """The sums ``[SPLIT, M, N]`` of a product whose K was split, into its result ``[M, N]``."""
    m, n = out.shape
    config = _ReduceConfig()
    launch(
        "reduce",
        reduce_kernel,
        triton.cdiv(m, config.m) * triton.cdiv(n, config.n),
        parts,
        x_scale,
        w_scale,
        bias,
        residual,
        out,
        m,
        n,
        0 if residual is None else residual.stride(0),
        config=config,
        ACTIVATION=activation,
        DTYPE=TRITON_DTYPES[out.dtype],
        SPLIT=len(parts),
        BM=config.m,
        BN=config.n,
    )


def check_epilogue(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gated: bool,
) -> None:
    """Raise RefusalError unless what follows a product fits its result.

    Args:
        shape: of the result, after gating.
    """
    if dtype not in FLOATS:
        raise RefusalError(f"{op}: a result in {dtype}, not float32, float16 or bfloat16")
    if activation not in ACTIVATIONS:
        raise RefusalError(f"{op}: activation {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    if gated and (bias is not None or activation != "none"):
        raise RefusalError(f"{op}: a gated product takes neither bias nor activation")
    if bias is not None:
        require_floats(op, bias=bias)
        if bias.shape != shape[1:] or not bias.is_contiguous():
            raise RefusalError(f"{op}: bias {tuple(bias.shape)} for {shape[1]} outputs")
    if residual is not None:
        require_unit_stride(op, residual=residual)
        if tuple(residual.shape) != shape or residual.dtype != dtype:
            raise RefusalError(
                f"{op}: residual is {tuple(residual.shape)} {residual.dtype}, not {shape} {dtype}"
            )


def check_place(op: str, out: Tensor | None, residual: Tensor | None) -> None:
    """Raise RefusalError unless the result can go there: nowhere else than over the residual."""
    if out is not None and (out is not residual or not out.is_contiguous()):
        raise RefusalError(f"{op}: out is {tuple(out.shape)}, not a contiguous residual itself")
