"""GELU (both forms) and SwiGLU, element by element, in float32."""

from __future__ import annotations

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
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)


@inline
def sigmoid(b_x):
    """1 / (1 + exp(−x)), without overflow at either end."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


@inline
def activate(b_x, KIND: tl.constexpr):
    """The function named by KIND: ``gelu_tanh``, ``gelu_erf`` or ``silu``."""
    if KIND == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2u), with u = √(2/π) (x + 0.044715 x³)
        b_y = b_x * sigmoid(1.5957691216057308 * b_x * (1.0 + 0.044715 * b_x * b_x))
    elif KIND == "gelu_erf":
        b_y = 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "silu", "unknown activation")
        b_y = b_x * sigmoid(b_x)
    return b_y


@triton.jit(do_not_specialize=["T"])
def activation_kernel(
    p_x,
    p_up,
    p_y,
    T,
    C,
    stride_x,
    stride_up,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT rows, BC columns. ``p_up`` is None, or what the result is multiplied by."""
    i_t, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    # [BT]
    o_t = i_t * BT + tl.arange(0, BT)
    o_row = o_t.to(tl.int64)[:, None]
    # [BC]
    o_c = (i_c * BC + tl.arange(0, BC))[None, :]
    # [BT, BC]
    m = (o_t[:, None] < T) & (o_c < C)
    # [BT, BC]
    b_x = widen(tl.load(p_x + o_row * stride_x + o_c, mask=m, other=0.0))
    b_y = activate(b_x, KIND)
    if p_up is not None:
        b_y *= widen(tl.load(p_up + o_row * stride_up + o_c, mask=m, other=0.0))
    tl.store(p_y + o_row * C + o_c, narrow(b_y, DTYPE), mask=m)


def _run(op: str, kind: str, x: Tensor, up: Tensor | None, config: RowConfig | None) -> Tensor:
    tensors = {"x": x} if up is None else {"gate": x, "up": up}
    require_floats(op, **tensors)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    ups = None if up is None else up.reshape(rows.shape)
    require_unit_stride(op, rows=rows, up=rows if ups is None else ups)
    if rows.shape[1] == 0:
        return out
    if config is None:
        # No row has to be whole here.
        config = row_config(target_of(x.device), min(rows.shape[1], 1024))
    programs = triton.cdiv(len(rows), config.rows) * triton.cdiv(rows.shape[1], config.columns)
    launch(
        op,
        activation_kernel,
        programs,
        rows,
        ups,
        out,
        len(rows),
        rows.shape[1],
        rows.stride(0),
        0 if ups is None else ups.stride(0),
        config=config,
        KIND=kind,
        DTYPE=TRITON_DTYPES[x.dtype],
        BT=config.rows,
        BC=config.columns,
    )
    return out


def gelu_tanh(x: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))), the shape and dtype of ``x``."""
    return _run("gelu_tanh", "gelu_tanh", x, None, config)


def gelu_erf(x: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """x/2 · (1 + erf(x/√2)), the shape and dtype of ``x``."""
    return _run("gelu_erf", "gelu_erf", x, None, config)


def swiglu(gate: Tensor, up: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """silu(gate) · up, all ``[T, F]``; rows may be apart, as halves of one matrix are.

    Raises:
        RefusalError: the shapes or dtypes differ.
    """
    if gate.shape != up.shape:
        raise RefusalError(f"swiglu: gate is {tuple(gate.shape)} and up {tuple(up.shape)}")
    return _run("swiglu", "silu", gate, up, config)
