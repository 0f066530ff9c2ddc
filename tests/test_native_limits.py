"""The C++ ops at the limits of what they take: NaN, the ends of float32, sums of int32, strides,
and memory that nobody else holds.

Only NumPy and torch are imported, and ``qvlfast._C``: scripts/sanitize.sh runs this file with an
extension of its own, in which AVX-512 and AMX are emulated.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qvlfast import _C

ALL = ("scalar", "avx2", "avx512", "amx")
ISAS = ALL[: ALL.index(_C.best_isa()) + 1]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_activation = pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu", "swiglu"])

MOST_INPUTS = 2**17


def every_nan(dtype: torch.dtype) -> Tensor:
    """NaN of both signs, signalling and quiet, whatever its low bits: 9, or 6 in bfloat16."""
    if dtype == torch.bfloat16:
        low = np.arange(64, dtype=np.uint16)
        kinds = [0x7F80 | low[1:], 0x7FC0 | low, 0xFF80 | low[1:], 0xFFC0 | low]
        return torch.from_numpy(np.concatenate(kinds).view(np.int16)).view(torch.bfloat16)
    bits = np.arange(512, dtype=np.uint32)
    kinds = [0x7F800000 | bits[1:], 0x7FC00000 | bits, 0xFF800000 | bits[1:], 0xFFC00000 | bits]
    return torch.from_numpy(np.concatenate(kinds).view(np.float32))


def activated(x: Tensor, activation: str, isa: str) -> Tensor:
    """One float32 value a row through the end of a product; swiglu gates the value by itself."""
    gated = activation == "swiglu"
    weight = _C.pack_floats([torch.ones(1, 1)] * (1 + gated), "f32", gated)
    out = torch.zeros(len(x), 1)
    _C.gemm(x[:, None], None, weight, None, activation, None, out, isa)
    return out[:, 0]


def edges(lengths: list[int]) -> tuple[Any, Any, Any]:
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    return cu, cu, np.full(len(lengths), -1, np.int32)


@each_isa
@each_activation
def test_activations_of_nan_are_nan(isa: str, activation: str) -> None:
    x = every_nan(torch.float32)
    assert x.isnan().all()
    assert activated(x, activation, isa).isnan().all()


@each_isa
@each_activation
def test_activations_of_the_largest_numbers(isa: str, activation: str) -> None:
    x = torch.tensor([100.0, 1e4, 1e18])
    above, below = activated(x, activation, isa), activated(-x, activation, isa)
    assert torch.equal(above, x * x if activation == "swiglu" else x)
    assert not below.any()


@each_isa
@each_dtype
def test_a_key_of_nan_makes_its_queries_nan(isa: str, dtype: torch.dtype) -> None:
    """A sequence of two tokens for each NaN."""
    nan = every_nan(dtype)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2 * len(nan), 1, 16, generator=generator).to(dtype).abs() for _ in range(3)
    )
    k[1::2, 0, 3] = nan
    out = torch.zeros_like(q)
    _C.attention(q, k, v, *edges([2] * len(nan)), False, 0.25, None, out, isa)
    assert out.isnan().all()


@each_isa
@each_dtype
@pytest.mark.parametrize("fill", [torch.nan, -torch.inf])
def test_a_whole_block_without_a_largest_score(isa: str, dtype: torch.dtype, fill: float) -> None:
    """Keys whose scores are all NaN are not skipped; those of minus infinity weigh nothing."""
    count, block = 300, 256
    q, k, v = (torch.zeros(count, 1, 16, dtype=dtype) for _ in range(3))
    q[:, :, 0] = 1
    k[:block, :, 0] = fill
    v[:block], v[block:] = 5, 3
    out = torch.zeros_like(q)
    _C.attention(q, k, v, *edges([count]), False, 0.25, None, out, isa)
    if fill == -torch.inf:
        torch.testing.assert_close(out, torch.full_like(out, 3))
    else:
        assert out.isnan().all()


class Exported:
    """Exports a tensor that nothing else holds, and counts those given back."""

    def __init__(self, x: Tensor, given_back: list[None]) -> None:
        self.x, self.given_back = x, given_back

    def __dlpack__(self) -> object:
        assert not self.given_back, "an earlier part was dropped before its use"
        array = self.x.numpy().copy()
        weakref.finalize(array, self.given_back.append, None)
        return torch.from_numpy(array).__dlpack__()


@pytest.mark.parametrize("form", ["f32", "int8", "int4"])
def test_parts_are_held_while_they_are_packed(form: str) -> None:
    given_back: list[None] = []

    def export(x: Tensor) -> Exported:
        return Exported(x, given_back)

    n, k = 48, 64
    if form == "f32":
        packed = _C.pack_floats([export(torch.full((n, k), float(i))) for i in (1, 2)], "f32")
    elif form == "int8":
        values = (torch.full((n, k), i, dtype=torch.int8) for i in (1, 2))
        packed = _C.pack_int8([(export(v), export(torch.ones(n))) for v in values])
    else:
        pairs = (torch.full((n, k // 2), 0x88 + 0x11 * i, dtype=torch.uint8) for i in (1, 2))
        factor = torch.ones(n, 2, dtype=torch.uint8)
        parts = [(export(p), export(factor), export(torch.ones(n))) for p in pairs]
        packed = _C.pack_int4(parts, 32)
    assert len(given_back) == 2 * {"f32": 1, "int8": 2, "int4": 3}[form]
    out = torch.full((2 * n, k), torch.nan)
    _C.unpack(packed, out)
    assert bool((out[:n] == 1).all()) and bool((out[n:] == 2).all())


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_weights_larger_than_any_memory_are_refused(form: str) -> None:
    one = torch.zeros(1, 1)
    for parts in ([one.expand(2**57, 1)], [one.expand(2**62, 1)] * 2, [one.expand(2**47, 1)] * 3):
        with pytest.raises(ValueError, match="more values than any memory"):
            _C.pack_floats(parts, form)


@each_isa
@pytest.mark.parametrize("x", [127, -127, -128])
@pytest.mark.parametrize("w", [127, -127])
def test_the_largest_int8_sums_are_exact(isa: str, x: int, w: int) -> None:
    values = torch.full((16, MOST_INPUTS), w, dtype=torch.int8)
    rows = torch.full((1, MOST_INPUTS), x, dtype=torch.int8)
    out = torch.zeros(1, 16)
    packed = _C.pack_int8([(values, torch.ones(16))])
    _C.gemm(rows, torch.ones(1), packed, None, "none", None, out, isa)
    assert torch.equal(out, torch.full((1, 16), x * w * MOST_INPUTS).float())


def int4_weight(value: int, factor: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """16 channels of zeros and one value at the end, all groups of 32 with one multiplier."""
    pairs = torch.full((16, k // 2), 0x88, dtype=torch.uint8)
    pairs[:, -1] = (value + 8) << 4 | 8
    return pairs, torch.full((16, -(-k // 32)), factor, dtype=torch.uint8), torch.ones(16)


@each_isa
@pytest.mark.parametrize(
    ("value", "factor"), [(-8, 15), (7, 18), (-7, 18), (6, 21), (1, 127), (-1, 127), (0, 255)]
)
def test_int4_products_within_int8_are_exact(isa: str, value: int, factor: int) -> None:
    packed = _C.pack_int4([int4_weight(value, factor, 40)], 32)
    for row in (1, -127):
        out = torch.full((1, 16), torch.nan)
        x = torch.full((1, 40), row, dtype=torch.int8)
        _C.gemm(x, torch.ones(1), packed, None, "none", None, out, isa)
        assert torch.equal(out, torch.full((1, 16), float(row * value * factor)))


@pytest.mark.parametrize(("value", "factor"), [(-8, 16), (7, 19), (-7, 19), (1, 128), (-1, 255)])
@pytest.mark.parametrize("k", [32, 40, 600])
def test_int4_products_beyond_int8_are_refused(value: int, factor: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"multiplier of {factor}; products must lie in -127"):
        _C.pack_int4([int4_weight(value, factor, k)], 32)


@each_isa
@pytest.mark.parametrize("x", [127, -127])
@pytest.mark.parametrize("w", [7, -7])
def test_the_largest_int4_sums_are_exact(isa: str, x: int, w: int) -> None:
    pairs = torch.full((16, MOST_INPUTS // 2), (w + 8) * 0x11, dtype=torch.uint8)
    factors = torch.full((16, MOST_INPUTS // 128), 18, dtype=torch.uint8)
    rows = torch.full((1, MOST_INPUTS), x, dtype=torch.int8)
    out = torch.zeros(1, 16)
    packed = _C.pack_int4([(pairs, factors, torch.ones(16))], 128)
    _C.gemm(rows, torch.ones(1), packed, None, "none", None, out, isa)
    assert torch.equal(out, torch.full((1, 16), x * w * 18 * MOST_INPUTS).float())


def test_more_inputs_than_int32_sums_hold_are_refused() -> None:
    k = MOST_INPUTS + 2
    values = torch.zeros(1, k, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"{k} inputs; sums of products in int32 hold 131072"):
        _C.pack_int8([(values, torch.ones(1))])
    pairs = torch.full((1, k // 2), 0x88, dtype=torch.uint8)
    factors = torch.ones(1, -(-k // 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{k} inputs; sums of products in int32 hold 131072"):
        _C.pack_int4([(pairs, factors, torch.ones(1))], 32)
    assert _C.pack_floats([torch.zeros(1, k)], "f32").k == k


def test_results_that_overlap_are_refused() -> None:
    packed = _C.pack_floats([torch.eye(4)], "f32")
    x = torch.arange(12.0).view(3, 4)
    memory = torch.zeros(12)
    for stride in (0, 1, 3):
        out = memory.as_strided((3, 4), (stride, 1))
        with pytest.raises(ValueError, match=r"out is float32 \[3, 4\] with values that share"):
            _C.gemm(x, None, packed, None, "none", None, out)
    row = memory[:4].expand(1, 4)
    _C.gemm(x[1:2], None, packed, None, "none", None, row)
    assert torch.equal(row, x[1:2])

    x, weight = torch.randn(3, 2, 8), torch.ones(8)
    angle = torch.zeros(3, 4)
    for strides in ((0, 8, 1), (8, 8, 1), (16, 4, 1), (8, 16, 1)):
        out = torch.zeros(64).as_strided((3, 2, 8), strides)
        with pytest.raises(ValueError, match=r"out is float32 \[3, 2, 8\] with values that share"):
            _C.rope(x, angle.cos(), angle.sin(), out)
        with pytest.raises(ValueError, match=r"out is float32 \[3, 2, 8\] with values that share"):
            _C.norm_rope(x, weight, angle.cos(), angle.sin(), 1e-6, out)
    heads_first = torch.zeros(2, 3, 8).transpose(0, 1)
    _C.rope(x, angle.cos(), angle.sin(), heads_first)
    assert torch.equal(heads_first, x)
