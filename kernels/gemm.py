"""Matrix products with weights: y = activation(x · weightᵀ + bias) + residual, in one launch.

One kernel for floats, int8 and e4m3, which differ in how a block is multiplied and in the scales
after it; gate and up of an MLP are multiplied side by side and leave as silu(gate) · up. Two
families read the operands: pointers, whose loads go through cp.async on sm_80 to 89 and 120, and
tensor descriptors for sm_90 and later.

int8 and e4m3 have one scale a token and one an output channel. They leave the sum over K whole: in
int8 it is exact in any order, and the matrix unit never stops for them. Only files with a scale for
each 128 × 128 of e4m3 make it stop, every 128 inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import activate
from .common import (
    EMULATE,
    TRITON_DTYPES,
    New,
    RefusalError,
    dot,
    inline,
    launch,
    require_device,
    require_floats,
    require_unit_stride,
    target_of,
)
from .configs import GemmConfig, gemm_config
from .epilogue import add_parts, check_epilogue, check_place, finish, place, rescale
from .quantise import require_form

SCALE_GROUP = 128
"""Inputs that share a scale where the weight has one for more than whole channels."""

_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.float32: "float32"}
# 127² · K must stay below 2³¹.
_MOST_INPUTS = (1 << 31) // 127**2


@inline
def multiply(b_x, b_w, b_acc, KIND: tl.constexpr, BK: tl.constexpr):
    """b_acc + b_x · b_w, in int32 for int8 and in float32 otherwise."""
    if KIND == "int8":
        if EMULATE:
            # NumPy is slow with integers, and float32 exact with up to 1,024 products of them.
            b_acc += tl.dot(b_x.to(tl.float32), b_w.to(tl.float32)).to(tl.int32)
        else:
            b_acc = tl.dot(b_x, b_w, b_acc, out_dtype=tl.int32)
    elif KIND == "fp8" and not EMULATE:
        # wgmma keeps 14 bits of a sum of e4m3: every 128 inputs it goes to float32.
        b_acc = tl.dot(b_x, b_w, b_acc, max_num_imprecise_acc=BK if BK < 128 else 128)
    else:
        b_acc = dot(b_x, b_w, b_acc)
    return b_acc


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    p_x,
    p_weight,
    p_x_scale,
    p_w_scale,
    p_bias,
    p_residual,
    p_y,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    KIND: tl.constexpr,
    GROUPED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: a BM × BN block of y, or with SPLIT its sum over a part of K.

    GATED: rows N to 2N of the weight are those of up. GROUPED: the weight's scales are
    ``[K / 128, rows]``. With SPLIT the sums go to ``p_y`` as ``[SPLIT, M, N]``, without scales.
    """
    i_m, i_n = place(tl.program_id(0) // SPLIT, M, N, BM, BN)
    # [BM], [BN], [BK]
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    n_k = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    i_split = tl.program_id(0) % SPLIT
    if not DESCRIPTORS:
        # [BM, BK], [BK, BN]
        p_x_block = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        p_w_block = p_weight + o_n.to(tl.int64)[None, :] * stride_weight + o_k[:, None]
        p_up_block = p_weight + (o_n + N).to(tl.int64)[None, :] * stride_weight + o_k[:, None]
    # [BM, BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.int32 if KIND == "int8" else tl.float32)
    if GATED:
        b_up = tl.zeros((BM, BN), dtype=tl.int32 if KIND == "int8" else tl.float32)
    for i_k in range(i_split * n_k, tl.minimum(K, (i_split + 1) * n_k), BK):
        # [BM, BK], [BK, BN]
        if DESCRIPTORS:
            b_x = p_x.load([i_m * BM, i_k])
            b_w = p_weight.load([i_n * BN, i_k]).T
        else:
            m_k = o_k < K - i_k
            b_x = tl.load(p_x_block + i_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w_block + i_k, mask=m_k[:, None] & m_n[None, :], other=0.0)
        if GROUPED:
            # [BN]
            p_scales = p_w_scale + (i_k // 128) * (2 * N if GATED else N) + o_n
            b_part = multiply(b_x, b_w, tl.zeros((BM, BN), dtype=tl.float32), KIND, BK)
            b_acc += b_part * tl.load(p_scales, mask=m_n, other=0.0)[None, :]
        else:
            b_acc = multiply(b_x, b_w, b_acc, KIND, BK)
        if GATED:
            # [BK, BN]
            if DESCRIPTORS:
                b_w = p_weight.load([N + i_n * BN, i_k]).T
            else:
                b_w = tl.load(p_up_block + i_k, mask=m_k[:, None] & m_n[None, :], other=0.0)
            if GROUPED:
                b_part = multiply(b_x, b_w, tl.zeros((BM, BN), dtype=tl.float32), KIND, BK)
                b_up += b_part * tl.load(p_scales + N, mask=m_n, other=0.0)[None, :]
            else:
                b_up = multiply(b_x, b_w, b_up, KIND, BK)
    if SPLIT > 1:
        p_part = p_y + (i_split.to(tl.int64) * M + o_m[:, None]) * N + o_n[None, :]
        tl.store(p_part, b_acc, mask=m_m[:, None] & m_n[None, :])
    else:
        if p_x_scale is not None:
            # [BM]
            b_x_scale = tl.load(p_x_scale + o_m, mask=m_m, other=0.0)
            b_acc = rescale(b_acc, b_x_scale, None if GROUPED else p_w_scale, o_n, m_n)
            if GATED:
                p_up_scale = None if GROUPED else p_w_scale + N
                b_up = rescale(b_up, b_x_scale, p_up_scale, o_n, m_n)
        if GATED:
            b_acc = activate(b_acc, "silu") * b_up
        finish(b_acc, o_m, o_n, M, N, p_bias, p_residual, stride_residual, p_y, ACTIVATION, DTYPE)


def _operands(
    op: str, kind: str, x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None
) -> None:
    """Raise RefusalError unless shapes, dtypes and scales fit each other."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise RefusalError(
            f"{op}: x {tuple(x.shape)} by weight {tuple(weight.shape)}, not [M, K] by [N, K]"
        )
    require_unit_stride(op, x=x, weight=weight)
    if x_scale is None or w_scale is None:
        return
    if x.dtype != weight.dtype or _KINDS.get(x.dtype) != kind:
        raise RefusalError(f"{op}: x is {x.dtype} and weight {weight.dtype}, both must be {kind}")
    (m, k), n = x.shape, len(weight)
    if kind == "int8" and k > _MOST_INPUTS:
        raise RefusalError(f"{op}: {k} inputs, the sums of more than {_MOST_INPUTS} overflow")
    grouped = (-(-k // SCALE_GROUP), n)
    for name, scale, shapes in (
        ("x_scale", x_scale, ((m,),)),
        ("weight_scale", w_scale, ((n,), grouped) if kind == "fp8" else ((n,),)),
    ):
        if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
            raise RefusalError(
                f"{op}: {name} is {tuple(scale.shape)} {scale.dtype}, not {shapes[0]} float32"
            )
        if not scale.is_contiguous():
            raise RefusalError(f"{op}: {name} has strides {tuple(scale.stride())}: not contiguous")


def _describable(x: Tensor) -> bool:
    """Whether the copy engine takes it: some rows, which start on 16 bytes."""
    start = x.data_ptr() if x.device.type != "meta" else 0
    return len(x) > 0 and start % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _product(
    op: str,
    kind: str,
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
    config: GemmConfig | None,
    out: Tensor | None,
    new: New,
) -> Tensor:
    x_scale, w_scale = scales or (None, None)
    _operands(op, kind, x, weight, x_scale, w_scale)
    (m, k), rows = x.shape, len(weight)
    if gated and rows % 2:
        raise RefusalError(f"{op}: {rows} weight rows are not as many for gate as for up")
    n = rows // 2 if gated else rows
    check_epilogue(op, (m, n), dtype, bias, activation, residual, gated)
    check_place(op, out, residual)
    extra = [t for t in (x_scale, w_scale, bias, residual) if t is not None]
    require_device(op, x, weight, *extra)
    target = target_of(x.device)
    grouped = w_scale is not None and w_scale.dim() == 2
    config = config or gemm_config(
        "fp8_blocks" if grouped else kind,
        target,
        m,
        n,
        k,
        activation=activation,
        gated=gated,
        residual=residual is not None,
    )
    if grouped:
        # Its scales stay with the inputs they belong to, and leave no sum to add up later.
        config = replace(config, k=min(config.k, SCALE_GROUP), split=1)
    described = config.descriptors and _describable(x) and _describable(weight)
    out = new((m, n), dtype=dtype, device=x.device) if out is None else out
    total = torch.int32 if kind == "int8" else torch.float32
    part = out
    if config.split > 1:
        part = torch.empty((config.split, m, n), dtype=total, device=x.device)
    constants = {"ACTIVATION": activation, "DTYPE": TRITON_DTYPES[dtype], "SPLIT": config.split}
    launch(
        op,
        gemm_kernel,
        triton.cdiv(m, config.m) * triton.cdiv(n, config.n) * config.split,
        TensorDescriptor.from_tensor(x, [config.m, config.k]) if described else x,
        TensorDescriptor.from_tensor(weight, [config.n, config.k]) if described else weight,
        x_scale,
        w_scale,
        bias,
        residual,
        part,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        config=config,
        KIND=kind,
        GROUPED=grouped,
        GATED=gated,
        DESCRIPTORS=described,
        BM=config.m,
        BN=config.n,
        BK=config.k,
        **constants,
    )
    if config.split > 1:
        add_parts(part, out, x_scale, w_scale, bias, activation, residual)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: GemmConfig | None = None,
    out: Tensor | None = None,
    new: New = torch.empty,
) -> Tensor:
    """activation(x · weightᵀ + bias) + residual, or silu(x · gateᵀ) · (x · upᵀ).

    Args:
        x: ``[M, K]``, float32, float16 or bfloat16; rows may be apart.
        weight: ``[N, K]``, the dtype of ``x``; rows may be apart. Gate and then up if ``gated``.
        bias: ``[N]`` in any float dtype, or None.
        activation: one of :data:`ACTIVATIONS`, applied to the float32 sum.
        residual: ``[M, N]``, the dtype of ``x``, added before the one rounding.
        out: ``residual``, if it is contiguous, for the result to take its place.
        new: what the result is put in otherwise.

    Returns:
        ``[M, N]``, or ``[M, N / 2]`` if ``gated``, in the dtype of ``x``.

    Raises:
        RefusalError: shapes do not fit, or dtypes differ.
    """
    op = "gated_linear" if gated else "linear"
    require_floats(op, x=x, weight=weight)
    kind = _KINDS.get(x.dtype, "float16")
    return _product(
        op,
        kind,
        x,
        weight,
        None,
        bias,
        activation,
        residual,
        gated,
        x.dtype,
        config,
        out,
        new,
    )


def linear_quantised(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
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
    """:func:`linear` of quantised rows by a quantised weight; in int8 the sum over K is exact.

    Args:
        x: ``[M, K]`` int8 or float8_e4m3fn; K up to 133,000 in int8, so that no sum overflows.
        x_scale: ``[M]`` float32.
        weight: ``[N, K]``, the dtype of ``x``.
        weight_scale: ``[N]`` float32; for e4m3 also ``[K / 128, N]``, rounded up.
        bias: ``[N]`` in any float dtype, or None.
        dtype: of the result: float32, float16 or bfloat16.
        residual: ``[M, N]`` in that dtype.
        out, new: as there.

    Returns:
        ``[M, N]``, or ``[M, N / 2]`` if ``gated``.

    Raises:
        RefusalError: shapes do not fit, a dtype is another, or the device has no e4m3.
    """
    kind = _KINDS.get(x.dtype, "")
    if kind not in ("int8", "fp8"):
        raise RefusalError(f"linear: quantised rows are {x.dtype}, not int8 or float8_e4m3fn")
    op = f"{'gated_' if gated else ''}linear_{kind}"
    require_form(op, kind, x.device)
    return _product(
        op,
        kind,
        x,
        weight,
        (x_scale, weight_scale),
        bias,
        activation,
        residual,
        gated,
        dtype,
        config,
        out,
        new,
    )
