"""Triton's product of float rows and weights of 4 bits, in the interpreter, against float64.

Inputs are fresh each time. So tolerances are bounds that follow from the arithmetic: a sum of K
products in float32, in any order, errs by at most K roundings of the sum of their magnitudes, and
its scale, bias and residual by a few more; then comes the one rounding to the rows' dtype.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qvlfast.kernels.common import LAUNCHES, RefusalError
from qvlfast.kernels.configs import GemmConfig
from qvlfast.kernels.gemm_int4 import GROUPS, Int4Packed, pack_int4
from qvlfast.kernels.gemm_int4_float import linear_int4_float

from tests.guards import between_guards, inside_poison
from tests.test_kernels_gemm import activated

BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
CONFIGS = {
    "plain": BLOCKS,
    "split": replace(BLOCKS, split=3),
    "deep": replace(BLOCKS, k=128),
    "shallow": replace(BLOCKS, k=16),
    "chosen": None,
}
# Half of the distance to the next value.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = list(ROUNDING)
# No rows, one of everything, block ± 1; inputs that end within a group and within a run.
SHAPES = [(0, 64, 8), (1, 2, 1), (15, 64, 33), (16, 128, 32), (17, 300, 31), (33, 131, 40)]

guarded = pytest.mark.usefixtures("guarded_outputs")


class Drawn:
    """Random operands, and what they stand for in float64.

    Attributes:
        x: ``[M, K]``, rows apart in a buffer of NaN.
        weight: of two parts, as the projections of one input are, between guards.
        product, terms: ``[M, N]``, x · weightᵀ and the sum of the magnitudes.
    """

    def __init__(self, m, k, n, group, dtype, *, seed=None, scale=1.0):
        rng = np.random.default_rng(seed)
        self.x = inside_poison(torch.from_numpy(rng.standard_normal((m, k)) * scale).to(dtype))
        values = torch.from_numpy(rng.integers(-7, 8, (n, k), dtype=np.int8))
        multiplier = torch.from_numpy(rng.integers(1, 19, (n, -(-k // group)), dtype=np.uint8))
        scales = torch.from_numpy((10 ** rng.uniform(-6, -2, n)).astype(np.float32))
        cut = n // 2
        parts = [[t[:cut], t[cut:]] for t in (values, multiplier, scales)]
        packed = pack_int4(list(zip(*parts, strict=True)), group)
        tensors = (packed.packed, packed.multiplier, packed.scale)
        self.weight = Int4Packed(*map(between_guards, tensors), k, group)
        wide = values.numpy() * multiplier.numpy().repeat(group, axis=1)[:, :k].astype(np.float64)
        wide *= scales.double().numpy()[:, None]
        rows = self.x.double().numpy()
        self.product, self.terms = rows @ wide.T, np.abs(rows) @ np.abs(wide.T)
        self.inputs = k

    def bound(self, terms=None):
        """Of the float32 sum and what follows it; magnitudes of all that is added up."""
        return (self.inputs + 8) * 2**-23 * (self.terms if terms is None else terms)


def check(got, expected, bound):
    assert got.shape == expected.shape
    error = np.abs(got.double().numpy() - expected)
    # float16 below 2^-14 has steps of 2^-24.
    least = 2**-25 if got.dtype == torch.float16 else 0.0
    allowed = ROUNDING[got.dtype] * (np.abs(expected) + bound) + bound + least
    assert (error <= allowed).all(), (error - allowed).max()


@guarded
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("group", GROUPS)
def test_product(shape, dtype, config, group) -> None:
    drawn = Drawn(*shape, group, dtype)
    LAUNCHES.clear()
    got = linear_int4_float(drawn.x, drawn.weight, config=CONFIGS[config])
    assert set(LAUNCHES) <= {"linear_int4_float", "reduce"}
    assert LAUNCHES["linear_int4_float"] == (shape[0] > 0)
    assert got.dtype == dtype
    check(got, drawn.product, drawn.bound())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_weight_is_exact(dtype, group) -> None:
    """Rows of the identity give the weight back: each value with each multiplier, to the bit."""
    values = torch.arange(-7, 8, dtype=torch.int8).repeat(18)
    multiplier = torch.arange(1, 19, dtype=torch.uint8).repeat_interleave(15)
    n, k = len(values), 4 * group
    at = torch.tensor([0, group - 1, group, 2 * group - 1, 3 * group + 1])
    fours = torch.zeros(n, k, dtype=torch.int8)
    fours[:, at] = values[:, None]
    weight = pack_int4([(fours, multiplier[:, None].expand(n, 4), torch.ones(n))], group)
    got = linear_int4_float(torch.eye(k, dtype=dtype)[at], weight, config=BLOCKS)
    assert torch.equal(got.double(), (values.double() * multiplier).expand(len(at), n))


@guarded
@pytest.mark.parametrize("kind", ["none", "gelu_tanh", "gelu_erf", "silu"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_is_done_on_the_unrounded_sum(kind, config, dtype) -> None:
    drawn = Drawn(18, 200, 35, 32, dtype)
    rng = np.random.default_rng()
    bias = torch.from_numpy(rng.standard_normal(35)).float()
    residual = inside_poison(torch.from_numpy(rng.standard_normal((18, 35))).to(dtype))
    before = drawn.product + bias.double().numpy()
    rest = residual.double().numpy()
    got = linear_int4_float(
        drawn.x, drawn.weight, between_guards(bias), activation=kind, residual=residual,
        config=CONFIGS[config],
    )  # fmt: skip
    # No activation is steeper than 1.13; exponentials and erf err by a few roundings of theirs.
    terms = drawn.terms + np.abs(bias.double().numpy()) + np.abs(rest)
    expected = activated(before, kind) + rest
    check(got, expected, 1.2 * drawn.bound(terms) + (0 if kind == "none" else 2e-6))


@guarded
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", ["plain", "deep", "shallow", "chosen"])
@pytest.mark.parametrize("shape", [(0, 64, 8), (1, 2, 2), (17, 300, 62), (5, 131, 144)])
def test_gate_and_up_in_one_launch(dtype, config, shape) -> None:
    drawn = Drawn(*shape, 64, dtype)
    half = shape[2] // 2
    gate, up = drawn.product[:, :half], drawn.product[:, half:]
    bound = drawn.bound()
    LAUNCHES.clear()
    got = linear_int4_float(drawn.x, drawn.weight, gated=True, config=CONFIGS[config])
    assert dict(LAUNCHES) == ({"gated_linear_int4_float": 1} if shape[0] else {})
    # |silu(x)| <= |x| and its slope is below 1.1; silu itself errs by a few roundings.
    of_gate, of_up = bound[:, :half], bound[:, half:]
    wrong = 1.1 * of_gate * (np.abs(up) + of_up) + np.abs(gate) * (of_up + 4e-6 * np.abs(up))
    check(got, activated(gate, "silu") * up, wrong)


@guarded
@pytest.mark.parametrize("m", [15, 16, 17, 63, 64, 65, 127, 129])
def test_any_number_of_rows(m) -> None:
    drawn = Drawn(m, 128, 24, 64, torch.bfloat16)
    check(linear_int4_float(drawn.x, drawn.weight), drawn.product, drawn.bound())


@guarded
@pytest.mark.parametrize("split", [2, 4, 8])
def test_parts_of_k_are_added_in_a_second_launch(split) -> None:
    """Also where there are fewer steps than parts."""
    drawn = Drawn(3, 300, 40, 32, torch.float32)
    LAUNCHES.clear()
    got = linear_int4_float(drawn.x, drawn.weight, config=replace(BLOCKS, split=split))
    assert dict(LAUNCHES) == {"linear_int4_float": 1, "reduce": 1}
    check(got, drawn.product, drawn.bound())


@guarded
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["plain", "split"])
def test_small_and_large_values(scale, dtype, config) -> None:
    drawn = Drawn(17, 96, 34, 32, dtype, scale=scale)
    got = linear_int4_float(drawn.x, drawn.weight, config=CONFIGS[config])
    check(got, drawn.product, drawn.bound())


@settings(max_examples=40)
@given(
    m=st.integers(0, 40), k=st.integers(1, 280), n=st.integers(1, 70),
    group=st.sampled_from(GROUPS), dtype=st.sampled_from(DTYPES),
    split=st.integers(1, 5), bk=st.sampled_from([16, 32, 64, 128]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(m, k, n, group, dtype, split, bk, seed) -> None:
    drawn = Drawn(m, k, n, group, dtype, seed=seed)
    config = replace(BLOCKS, k=bk, split=split)
    check(linear_int4_float(drawn.x, drawn.weight, config=config), drawn.product, drawn.bound())


@guarded
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_do_not_depend_on_other_rows(config) -> None:
    drawn = Drawn(20, 100, 24, 32, torch.float32)
    alone = linear_int4_float(drawn.x, drawn.weight, config=CONFIGS[config])
    drawn.x[3] = torch.nan
    drawn.x[4, 7] = torch.inf
    drawn.x[5:, 99] = torch.nan
    got = linear_int4_float(drawn.x, drawn.weight, config=CONFIGS[config])
    assert torch.equal(got[:3], alone[:3])
    assert got[3].isnan().all() and got[5:].isnan().all()
    assert not got[4].isfinite().any()


def test_a_channel_that_is_not_a_number_spoils_itself_only() -> None:
    drawn = Drawn(4, 64, 6, 32, torch.float32)
    alone = linear_int4_float(drawn.x, drawn.weight, config=BLOCKS)
    drawn.weight.scale[2] = torch.nan
    got = linear_int4_float(drawn.x, drawn.weight, config=BLOCKS)
    assert got[:, 2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[:, others], alone[:, others])


def test_refusals_name_operand_and_reason() -> None:
    drawn = Drawn(3, 64, 5, 32, torch.float32)
    x, weight = drawn.x, drawn.weight
    for call, message in (
        (lambda: linear_int4_float(x[:, :32], weight), r"x \(3, 32\), not \[M, 64\]"),
        (lambda: linear_int4_float(x.double(), weight), r"x is torch.float64"),
        (lambda: linear_int4_float(x.to(torch.int8), weight), r"x is torch.int8"),
        (lambda: linear_int4_float(x.T.contiguous().T, weight), r"x has strides \(1, 3\)"),
        (lambda: linear_int4_float(x, weight, torch.zeros(4)), r"bias \(4,\) for 5 outputs"),
        (lambda: linear_int4_float(x, weight, gated=True), r"5 weight rows are not as many"),
        (
            lambda: linear_int4_float(x, weight, residual=x),
            r"residual is \(3, 64\) torch.float32, not \(3, 5\)",
        ),
    ):
        with pytest.raises(RefusalError, match=message):
            call()
