"""GELU (both forms) and SiLU of float32 blocks, as the products apply them to their sums."""

from __future__ import annotations

import triton.language as tl

from .common import inline


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
