"""Plain products in floating point by the vendor's library, unless a measurement says otherwise.

cuBLAS has been tuned for each GPU for years, and what a plain product adds it can add too: a bias,
or the hidden states that a residual branch goes onto. What it cannot do in one go (SwiGLU, GELU,
both a bias and a residual, 8 and 4 bits) stays with the kernels, as does all in the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import LAUNCHES, New, RefusalError, require_floats
from .configs import row_class
from .measured import VENDOR

WORTH = 0.98
"""The kernel is taken from this part of the library's time on: less is noise."""


@dataclass(frozen=True)
class Choice:
    """Whether the library multiplies; and why, for a reader."""

    vendor: bool
    reason: str


def choose_product(
    target: str,
    dtype: torch.dtype,
    m: int,
    *,
    activation: str = "none",
    gated: bool = False,
    bias: bool = False,
    residual: bool = False,
) -> Choice:
    """Who computes a product of float weights.

    Args:
        target: ``sm_89`` and the like, or ``interpreter``.
        m: rows.
        activation, gated, bias, residual: what follows it.
    """
    if target == "interpreter":
        return Choice(False, "the interpreter is there to run the kernels")
    if gated or activation != "none":
        return Choice(False, "the library has no such epilogue")
    if bias and residual:
        return Choice(False, "the library adds a bias or a residual, not both")
    if dtype == torch.float32:
        return Choice(True, "float32 was not measured")
    rows = row_class("float16", m)
    ratio = VENDOR.get((target, rows))
    if ratio is None:
        return Choice(True, f"not measured on {target}")
    return Choice(ratio > WORTH, f"the kernel takes {ratio:.2f} of the library's time on {target}")


def vendor_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    new: New = torch.empty,
) -> Tensor:
    """x · weightᵀ + bias; or onto ``residual``, in place.

    Args:
        x: ``[M, K]``; rows may be apart.
        weight: ``[N, K]``, the dtype of ``x``.
        bias: ``[N]`` in any float dtype, rounded to that of ``x``; not with ``residual``.
        residual: ``[M, N]``, the dtype of ``x``, contiguous.

    Returns:
        ``[M, N]`` in the dtype of ``x``, which is ``residual`` if there is one.

    Raises:
        RefusalError: dtypes differ, or both are given.
    """
    require_floats("linear", x=x, weight=weight)
    if bias is not None and residual is not None:
        raise RefusalError("linear: the library adds a bias or a residual, not both")
    LAUNCHES["linear_vendor"] += 1
    if residual is not None:
        return torch.addmm(residual, x, weight.T, out=residual)
    out = new((len(x), len(weight)), dtype=x.dtype, device=x.device)
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias.to(x.dtype), x, weight.T, out=out)
