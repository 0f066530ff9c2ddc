"""Rows of int8 or e4m3 with one scale a token, as the quantised products take them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    EMULATE,
    New,
    RefusalError,
    RowConfig,
    inline,
    launch,
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)

FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def has_e4m3(device: torch.device) -> bool:
    """Whether FP8 runs there: before sm_89 it does not even compile."""
    target = target_of(device)
    return not target.startswith("sm_8") or target >= "sm_89"


def require_form(op: str, form: str, device: torch.device) -> None:
    """The device computes in that form.

    Raises:
        RefusalError: it does not, or there is no such form.
    """
    if form not in FORMS:
        raise RefusalError(f"{op}: rows in {form!r}, not one of {', '.join(FORMS)}")
    if form == "fp8" and not has_e4m3(device):
        raise RefusalError(
            f"{op}: {target_of(device)} has no e4m3, which begins with sm_89: use int8"
        )


def new_rows(
    shape: tuple[int, ...], form: str, device: torch.device, new: New = torch.empty
) -> tuple[Tensor, Tensor]:
    """Room for values ``shape`` and one float32 scale a row."""
    # Allocated as bytes: torch cannot fill e4m3, which tests do.
    values = new(shape, dtype=torch.int8, device=device).view(FORMS[form])
    return values, new(shape[:1], dtype=torch.float32, device=device)


@inline
def to_e4m3(b_x):
    """e4m3 of a float32 block within ±448, ties to even.

    The interpreter cuts e4m3 off, so there the rounding is done on the bits.
    """
    if EMULATE:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_most = b_bits & 0x7FFFFFFF
        # 20 of 23 bits go, and the exponent's bias falls from 127 to 7.
        b_normal = ((b_most + 0x7FFFF + ((b_most >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2⁻⁶ the steps are 2⁻⁹, that of float32 at 2¹⁴.
        b_small = (tl.abs(b_x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        b_byte = tl.where(b_most < 0x3C800000, b_small, b_normal) | ((b_bits >> 24) & 0x80)
        b_y = b_byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        b_y = b_x.to(tl.float8e4nv)
    return b_y


@inline
def quantise_block(b_x, FORM: tl.constexpr):
    """Values of the form, and scales ``[BT]``, of whole float32 rows ``[BT, BC]``.

    scale = max(|x|, 1e-30) / 127 or 448; a row with NaN or infinity in it has the scale NaN.
    """
    BOUND: tl.constexpr = 127.0 if FORM == "int8" else 448.0
    # [BT]: without their sign, floats are ordered as integers are, with NaN above infinity
    b_bits = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    m_finite = b_bits < 0x7F800000
    b_most = tl.where(m_finite, b_bits, 0).to(tl.float32, bitcast=True)
    b_most = tl.maximum(b_most, 1e-30)
    # [BT, BC]: the product may pass the bound by one bit
    b_y = b_x * tl.div_rn(tl.full(b_most.shape, BOUND, tl.float32), b_most)[:, None]
    b_y = tl.where(m_finite[:, None], tl.minimum(tl.maximum(b_y, -BOUND), BOUND), 0.0)
    if FORM == "int8":
        # Adding 1.5 · 2²³ leaves no bits for fractions: rounded, ties to even.
        b_y = (b_y + 12582912.0) - 12582912.0
        b_values = b_y.to(tl.int8)
    else:
        b_values = to_e4m3(b_y)
    b_scale = tl.div_rn(b_most, tl.full(b_most.shape, BOUND, tl.float32))
    return b_values, tl.where(m_finite, b_scale, float("nan"))


@triton.jit(do_not_specialize=["T"])
def quantise_kernel(
    p_x, p_y, p_scale, T, C, stride_x, FORM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """One program: BT rows, whole."""
    # [BT]
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_row = o_t.to(tl.int64)[:, None]
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    # [BT, BC]
    m = (o_t < T)[:, None] & (o_c < C)
    b_x = widen(tl.load(p_x + o_row * stride_x + o_c, mask=m, other=0.0))
    b_values, b_scale = quantise_block(b_x, FORM)
    tl.store(p_y + o_row * C + o_c, b_values, mask=m)
    tl.store(p_scale + o_t, b_scale, mask=o_t < T)


def quantise_rows(
    x: Tensor, form: str = "int8", *, config: RowConfig | None = None, new: New = torch.empty
) -> tuple[Tensor, Tensor]:
    """Rows of ``int8`` or ``fp8`` and their scales, as the ops' contract says.

    Args:
        x: ``[T, C]``, float32, float16 or bfloat16; rows may be apart.

    Returns:
        ``[T, C]`` int8 in −127 … 127 or float8_e4m3fn, and ``[T]`` float32.

    Raises:
        RefusalError: another dtype, or a device without e4m3.
    """
    op = "quantise_rows"
    require_floats(op, x=x)
    require_unit_stride(op, x=x)
    require_form(op, form, x.device)
    out, scale = new_rows(tuple(x.shape), form, x.device, new)
    config = config or row_config(target_of(x.device), x.shape[1])
    launch(
        op,
        quantise_kernel,
        triton.cdiv(len(x), config.rows),
        x,
        out,
        scale,
        len(x),
        x.shape[1],
        x.stride(0),
        config=config,
        FORM=form,
        BT=config.rows,
        BC=config.columns,
    )
    return out, scale
