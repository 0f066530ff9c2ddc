"""Triton's quantised products, in the interpreter: int8 sums are exact, so are the comparisons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import LAUNCHES, RefusalError, RowConfig
from qvlfast.kernels.configs import GemmConfig
from qvlfast.kernels.gemm import linear_quantised
from qvlfast.kernels.gemm_int4 import Int4Packed, linear_int4, pack_int4, widen_int4
from qvlfast.kernels.quantise import quantise_rows

from qvlfast.kernels import quantise as quantise_module
from qvlfast.ops import rows as reference
from tests.guards import between_guards, inside_poison
from tests.test_kernels_gemm import activated, aligned

pytestmark = pytest.mark.usefixtures("guarded_outputs")

BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
FAMILIES = {
    "pointers": BLOCKS,
    "descriptors": replace(BLOCKS, descriptors=True),
    "split": replace(BLOCKS, split=3),
    "chosen": None,
}
ROWS = RowConfig(rows=4, columns=64, warps=4)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 8, 8), (1, 1, 1), (15, 31, 33), (16, 32, 32), (17, 33, 31), (3, 300, 40)]
FP8 = torch.float8_e4m3fn


def bytes_of(x):
    return x.view(torch.int8)


def scales(rng, count):
    return torch.from_numpy((10 ** rng.uniform(-6, 0, count)).astype(np.float32))


def operands(form, m, k, n):
    """x, its scales, weight, its scales, bias; and the product as a float32 of the true sum."""
    rng = np.random.default_rng(0)
    if form == "int8":
        x, w = (
            torch.from_numpy(rng.integers(-127, 128, s, dtype=np.int8)) for s in ((m, k), (n, k))
        )
    else:
        # Every finite e4m3, zeros of both signs and subnormals among them.
        finite = np.array([b for b in range(256) if b & 127 != 127], dtype=np.uint8)
        x, w = (torch.from_numpy(rng.choice(finite, s)) for s in ((m, k), (n, k)))
        x, w = x.view(FP8), w.view(FP8)
    x_scale, w_scale = scales(rng, m), scales(rng, n)
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    product = x.double().numpy() @ w.double().numpy().T
    return (x, x_scale, w, w_scale, bias), product


def poisoned(x):
    return inside_poison(bytes_of(x)).view(x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_exact(shape, dtype, family) -> None:
    (x, x_scale, weight, w_scale, bias), product = operands("int8", *shape)
    x_scale, w_scale, bias = map(inside_poison, (x_scale, w_scale, bias))
    expected = product.astype(np.float32) * x_scale.numpy()[:, None] * w_scale.numpy()
    x, weight = aligned(x, weight) if family == "descriptors" else (poisoned(x), poisoned(weight))
    for offset, wide in ((None, expected), (bias, expected + bias.numpy())):
        got = linear_quantised(
            x, x_scale, weight, w_scale, offset, dtype=dtype, config=FAMILIES[family]
        )
        assert torch.equal(got, torch.from_numpy(wide).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8(shape, family) -> None:
    (x, x_scale, weight, w_scale, bias), product = operands("fp8", *shape)
    terms = np.abs(x.double().numpy()) @ np.abs(weight.double().numpy()).T
    outer = x_scale.double().numpy()[:, None] * w_scale.double().numpy()
    if family == "descriptors":
        x, weight = (bytes_.view(FP8) for bytes_ in aligned(bytes_of(x), bytes_of(weight)))
    else:
        x, weight = poisoned(x), poisoned(weight)
    got = linear_quantised(
        x, x_scale, weight, w_scale, bias, dtype=torch.float32, config=FAMILIES[family]
    )
    # Products are exact in float32; their sum rounds in some order.
    error = np.abs(got.double().numpy() - product * outer - bias.double().numpy())
    assert (error <= 1e-6 * (terms * outer + 1)).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(0, 8, 8), (5, 128, 34), (17, 300, 40), (3, 129, 4)])
def test_fp8_with_a_scale_for_each_group_of_inputs(shape, gated) -> None:
    _, k, n = shape
    (x, x_scale, weight, _, _), _ = operands("fp8", *shape)
    groups = scales(np.random.default_rng(1), (-(-k // 128), n))
    wide = weight.double().numpy() * groups.double().numpy().repeat(128, axis=0)[:k].T
    rows = x.double().numpy() * x_scale.double().numpy()[:, None]
    expected, terms = rows @ wide.T, np.abs(rows) @ np.abs(wide.T)
    if gated:
        left, right = expected[:, : n // 2], expected[:, n // 2 :]
        expected = activated(left, "silu") * right
        terms = terms[:, : n // 2] * (np.abs(right) + 1) + terms[:, n // 2 :] * (np.abs(left) + 1)
    for config in (BLOCKS, replace(BLOCKS, split=4), replace(BLOCKS, k=256), None):
        got = linear_quantised(
            poisoned(x),
            x_scale,
            poisoned(weight),
            between_guards(groups),
            dtype=torch.float32,
            gated=gated,
            config=config,
        )
        assert (np.abs(got.double().numpy() - expected) <= 2e-6 * terms + 1e-6).all()


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["none", "gelu_tanh", "gelu_erf"])
def test_what_follows_a_quantised_product(form, family, kind) -> None:
    (x, x_scale, weight, w_scale, bias), product = operands(form, 9, 40, 35)
    residual = inside_poison(torch.randn(9, 35, generator=torch.Generator().manual_seed(0)))
    x_scale, w_scale = x_scale / 127, w_scale / 127
    wide = product * x_scale.double().numpy()[:, None] * w_scale.double().numpy()
    expected = activated(wide + bias.double().numpy(), kind) + residual.double().numpy()
    got = linear_quantised(
        x,
        x_scale,
        weight,
        w_scale,
        bias,
        dtype=torch.float32,
        activation=kind,
        residual=residual,
        config=FAMILIES[family],
    )
    np.testing.assert_allclose(got.double().numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["pointers", "descriptors", "chosen"])
def test_quantised_gate_and_up_in_one_launch(form, family) -> None:
    (x, x_scale, weight, w_scale, _), product = operands(form, 18, 48, 70)
    x_scale, w_scale = x_scale / 127, w_scale / 127
    wide = product * x_scale.double().numpy()[:, None] * w_scale.double().numpy()
    expected = activated(wide[:, :35], "silu") * wide[:, 35:]
    LAUNCHES.clear()
    got = linear_quantised(
        x, x_scale, weight, w_scale, dtype=torch.float32, gated=True, config=FAMILIES[family]
    )
    assert dict(LAUNCHES) == {f"gated_linear_{form}": 1}
    np.testing.assert_allclose(got.double().numpy(), expected, atol=1e-5, rtol=1e-5)


def test_largest_sums_do_not_overflow() -> None:
    x = torch.full((1, 12288), -127, dtype=torch.int8)
    weight = torch.full((2, 12288), 127, dtype=torch.int8)
    ones = torch.ones(2)
    got = linear_quantised(x, ones[:1], weight, ones, dtype=torch.float32)
    assert got.tolist() == [[-(127.0**2) * 12288] * 2]


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_spoilt_row_spoils_itself_only(form) -> None:
    (x, x_scale, weight, w_scale, _), _ = operands(form, 4, 40, 35)
    clean = linear_quantised(x, x_scale, weight, w_scale, dtype=torch.float32)
    x_scale[2] = torch.nan
    got = linear_quantised(x, x_scale, weight, w_scale, dtype=torch.float32)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (4, 64)])
def test_rows_equal_the_reference(form, dtype, scale, shape) -> None:
    values = np.random.default_rng(0).standard_normal(shape) * scale
    x = inside_poison(torch.from_numpy(values).to(dtype))
    got, got_scale = quantise_rows(x, form, config=ROWS)
    expected = reference.quantise_rows(x, form)
    assert got.dtype == expected.values.dtype
    assert torch.equal(bytes_of(got), bytes_of(expected.values))
    assert torch.equal(got_scale, expected.scale)


def test_every_tie_goes_to_even() -> None:
    """Values that are halves after scaling, for int8; for e4m3 every midpoint of two neighbours,
    and the floats on both sides of it."""
    halves = torch.cat((torch.arange(-126.5, 127, 1.0), torch.tensor([127.0])))
    got, _ = quantise_rows(halves[None], "int8")
    assert torch.equal(got, reference.quantise_rows(halves[None], "int8").values)
    assert got[0, :3].tolist() == [-126, -126, -124]
    grid = torch.arange(0, 127, dtype=torch.uint8).view(FP8).float()
    middles = (grid[:-1] + grid[1:]) / 2
    beside = [torch.nextafter(middles, torch.tensor(side)) for side in (0.0, 500.0)]
    every = torch.cat((grid, middles, *beside))
    every = torch.cat((every, -every))[None]
    got, scale = quantise_rows(every, "fp8")
    assert scale.item() == 1.0
    assert torch.equal(bytes_of(got), bytes_of(every.to(FP8)))


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_rows_of_zeros_and_rows_that_are_not_finite(form) -> None:
    x = torch.ones(5, 6)
    x[0], x[2, 3], x[3, 0] = 0, torch.nan, -torch.inf
    x[4] = 1e-38
    got, scale = quantise_rows(x, form)
    expected = reference.quantise_rows(x, form)
    assert torch.equal(bytes_of(got), bytes_of(expected.values))
    assert torch.equal(scale.nan_to_num(-1), expected.scale.nan_to_num(-1))
    assert scale.isnan().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("target", ["sm_80", "sm_87"])
def test_no_e4m3_before_sm_89(target, monkeypatch) -> None:
    monkeypatch.setattr(quantise_module, "target_of", lambda device: target)
    (x, x_scale, weight, w_scale, _), _ = operands("fp8", 3, 8, 5)
    for call in (
        lambda: linear_quantised(x, x_scale, weight, w_scale, dtype=torch.float32),
        lambda: quantise_rows(torch.zeros(2, 4), "fp8"),
    ):
        with pytest.raises(RefusalError, match=f"{target} has no e4m3, which begins with sm_89"):
            call()


def test_refusals_name_operand_and_reason() -> None:
    (x, x_scale, weight, w_scale, bias), _ = operands("int8", 3, 8, 5)
    grouped = w_scale[None].contiguous()
    for args, message in (
        ((x, x_scale, weight[:, :7], w_scale), r"x \(3, 8\) by weight \(5, 7\)"),
        ((x, x_scale[:2], weight, w_scale), r"x_scale is \(2,\) torch.float32, not \(3,\)"),
        ((x, x_scale, weight, w_scale.half()), r"weight_scale is \(5,\) torch.float16"),
        ((x, x_scale, weight, grouped), r"weight_scale is \(1, 5\) torch.float32, not \(5,\)"),
        ((x.float(), x_scale, weight, w_scale), r"quantised rows are torch.float32"),
        ((x, x_scale, weight.float(), w_scale), r"x is torch.int8 and weight torch.float32"),
        ((x, x_scale, weight, w_scale, bias[:4]), r"bias \(4,\) for 5 outputs"),
    ):
        with pytest.raises(RefusalError, match=message):
            linear_quantised(*args, dtype=torch.float32)
    with pytest.raises(RefusalError, match=r"a result in torch.int8"):
        linear_quantised(x, x_scale, weight, w_scale, dtype=torch.int8)
    wide = torch.zeros(1, 200_000, dtype=torch.int8)
    with pytest.raises(RefusalError, match=r"200000 inputs, the sums of more than 133144 overflow"):
        linear_quantised(wide, x_scale[:1], wide, w_scale[:1], dtype=torch.float32)


def draw_int4(m, k, n, group):
    """int8 rows, their scales, a weight of 4 bits, and the product as a float32 of the true sum."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(-127, 128, (m, k), dtype=np.int8))
    values = torch.from_numpy(rng.integers(-7, 8, (n, k), dtype=np.int8))
    multiplier = torch.from_numpy(rng.integers(1, 19, (n, -(-k // group)), dtype=np.uint8))
    x_scale, w_scale = scales(rng, m), scales(rng, n)
    wide = values * multiplier.to(torch.int8).repeat_interleave(group, dim=1)[:, :k]
    product = x.double().numpy() @ wide.double().numpy().T
    return x, x_scale, (values, multiplier, w_scale), wide, product


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    "shape", [(0, 64, 8), (1, 2, 1), (15, 64, 33), (17, 300, 31), (33, 130, 40)]
)
def test_int4_is_exact(shape, split, group) -> None:
    x, x_scale, (values, multiplier, w_scale), wide, product = draw_int4(*shape, group)
    # Two parts, as the projections of one input are.
    cut = shape[2] // 2
    halves = [[t[:cut], t[cut:]] for t in (values, multiplier, w_scale)]
    weight = pack_int4(list(zip(*halves, strict=True)), group)
    parts = (weight.packed, weight.multiplier, weight.scale)
    weight = Int4Packed(*map(between_guards, parts), weight.inputs, weight.group)
    x_scale = inside_poison(x_scale)
    assert weight.shape == (shape[2], shape[1])
    assert torch.equal(widen_int4(weight), wide)
    expected = product.astype(np.float32) * x_scale.numpy()[:, None] * w_scale.numpy()
    for dtype in DTYPES:
        config = replace(BLOCKS, split=split)
        got = linear_int4(poisoned(x), x_scale, weight, dtype=dtype, config=config)
        assert torch.equal(got, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("gated", [False, True])
def test_int4_is_int8_to_the_bit_whatever_the_number_of_rows(gated) -> None:
    x, x_scale, parts, wide, _ = draw_int4(65, 200, 34, 64)
    weight = pack_int4([parts], 64)
    x_scale = x_scale / 127
    residual = None if gated else torch.randn(65, 34, generator=torch.Generator().manual_seed(0))
    for m, launches in (
        (64, {"linear_int4": 1}),
        (65, {"widen_int4": 1, "linear_int8": 1}),
    ):
        rest = {
            "dtype": torch.float32,
            "gated": gated,
            "residual": None if residual is None else residual[:m],
        }
        prefix = "gated_" if gated else ""
        LAUNCHES.clear()
        got = linear_int4(x[:m], x_scale[:m], weight, **rest)
        assert dict(LAUNCHES) == {
            f"{'' if name == 'widen_int4' else prefix}{name}": count
            for name, count in launches.items()
        }
        expected = linear_quantised(x[:m], x_scale[:m], wide, parts[2], **rest)
        assert torch.equal(got, expected)


def test_int4_refusals_name_operand_and_reason() -> None:
    x, x_scale, parts, _, _ = draw_int4(3, 64, 5, 32)
    weight = pack_int4([parts], 32)
    for args, message in (
        ((x[:, :32], x_scale, weight), r"x \(3, 32\) torch.int8, not \[M, 64\] int8"),
        ((x.float(), x_scale, weight), r"x \(3, 64\) torch.float32"),
        ((x, x_scale[:2], weight), r"x_scale \(2,\) torch.float32 for 3 rows"),
    ):
        with pytest.raises(RefusalError, match=message):
            linear_int4(*args, dtype=torch.float32)
    with pytest.raises(RefusalError, match="groups of 48 inputs, not 32, 64 or 128"):
        pack_int4([parts], 48)
