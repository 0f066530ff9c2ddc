"""Activations of the two MLPs, computed in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (vision blocks): x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³)))."""
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def gelu_erf(x: Tensor) -> Tensor:
    """Exact GELU (vision mergers): x/2 · (1 + erf(x/√2))."""
    return F.gelu(x.float()).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both ``[T, F]``; returns ``[T, F]`` in their dtype."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)
