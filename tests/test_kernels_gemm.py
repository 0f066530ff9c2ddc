"""Triton's float products, in the interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import LAUNCHES, RefusalError
from qvlfast.kernels.configs import (
    DESCRIPTOR_TARGETS,
    KINDS,
    PROCESSORS,
    TARGETS,
    GemmConfig,
    gemm_config,
    main,
    nearest,
)
from qvlfast.kernels.epilogue import ACTIVATIONS
from qvlfast.kernels.gemm import linear

from tests.guards import inside_poison

pytestmark = pytest.mark.usefixtures("guarded_outputs")

# Rounding of the result to its dtype; float32 also adds in another order.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = list(ROUNDING)
BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
FAMILIES = {
    "pointers": BLOCKS,
    "descriptors": replace(BLOCKS, descriptors=True),
    "split": replace(BLOCKS, split=3),
    "chosen": None,
}
# Block ± 1, no rows, one of everything.
SHAPES = [(0, 32, 32), (1, 1, 1), (15, 31, 33), (16, 32, 32), (17, 33, 31), (150, 72, 40)]


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return inside_poison(torch.from_numpy(values).to(dtype))


def aligned(*tensors):
    """Copies that descriptors take: rows of whole 16 bytes, without poison between them."""
    padded = [torch.nn.functional.pad(x.contiguous(), (0, -x.shape[1] % 16)) for x in tensors]
    copies = [wide[:, : x.shape[1]] for wide, x in zip(padded, tensors, strict=True)]
    assert all(x.stride(0) * x.element_size() % 16 == 0 for x in copies if len(x))
    return copies


def activated(x, kind):
    if kind == "gelu_tanh":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if kind == "gelu_erf":
        return x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x)) if kind == "silu" else x


def check(got, expected, dtype, spread=1.0):
    """``spread``: size of the terms that a result is the sum of."""
    assert got.dtype == dtype
    tolerance = 2 * ROUNDING[torch.float32] * spread
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=ROUNDING[dtype], atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(dtype, family, shape) -> None:
    m, k, n = shape
    x = draw(m, k, dtype=dtype)
    weight = draw(n, k, seed=1, dtype=dtype, scale=k**-0.5)
    expected = x.double().numpy() @ weight.double().numpy().T
    if family == "descriptors":
        x, weight = aligned(x, weight)
    check(linear(x, weight, config=FAMILIES[family]), expected, dtype)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_is_done_on_the_unrounded_sum(kind, family, dtype) -> None:
    x, weight = draw(18, 40, dtype=dtype), draw(35, 40, seed=1, scale=0.3, dtype=dtype)
    bias, residual = draw(35, seed=2).contiguous(), draw(18, 35, seed=3, dtype=dtype)
    product = x.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    expected = activated(product, kind) + residual.double().numpy()
    if family == "descriptors":
        x, weight = aligned(x, weight)
    options = {"activation": kind, "config": FAMILIES[family]}
    got = linear(x, weight, bias, residual=residual, **options)
    check(got, expected, dtype, spread=3.0)
    onto = residual.contiguous()
    assert linear(x, weight, bias, residual=onto, out=onto, **options) is onto
    assert torch.equal(onto, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["pointers", "descriptors", "chosen"])
@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 1, 1), (17, 33, 31), (5, 70, 72)])
def test_gate_and_up_in_one_launch(dtype, family, shape) -> None:
    m, k, n = shape
    x, weight = draw(m, k, dtype=dtype), draw(2 * n, k, seed=1, dtype=dtype, scale=k**-0.5)
    product = x.double().numpy() @ weight.double().numpy().T
    expected = activated(product[:, :n], "silu") * product[:, n:]
    if family == "descriptors":
        x, weight = aligned(x, weight)
    LAUNCHES.clear()
    got = linear(x, weight, gated=True, config=FAMILIES[family])
    assert dict(LAUNCHES) == ({"gated_linear": 1} if m else {})
    check(got, expected, dtype, spread=3.0)


@pytest.mark.parametrize("split", [2, 4, 8])
def test_parts_of_k_are_added_in_a_second_launch(split) -> None:
    """Also where there are fewer steps than parts."""
    x, weight = draw(3, 100), draw(40, 100, seed=1)
    LAUNCHES.clear()
    got = linear(x, weight, config=replace(BLOCKS, split=split))
    assert LAUNCHES == {"linear": 1, "reduce": 1}
    check(got, x.double().numpy() @ weight.double().numpy().T, torch.float32, spread=10.0)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_small_and_large_values(scale) -> None:
    x, weight = draw(17, 50, scale=scale), draw(20, 50, seed=1)
    product = x.double().numpy() @ weight.double().numpy().T
    got = linear(x, weight, config=BLOCKS)
    np.testing.assert_allclose(got.numpy(), product, atol=2e-5 * scale, rtol=3e-6)
    gated = linear(x, weight, gated=True, config=BLOCKS)
    expected = activated(product[:, :10], "silu") * product[:, 10:]
    # Both factors carry the error of a product.
    bound = 4e-5 * max(scale, scale**2)
    np.testing.assert_allclose(gated.numpy(), expected, atol=bound * 10, rtol=1e-5)


def test_not_a_number_stays_one() -> None:
    x = torch.zeros(2, 16)
    x[0] = torch.nan
    weight = torch.zeros(2, 16)
    weight[:, 2] = torch.inf
    for kind in ACTIVATIONS:
        got = linear(x, weight, activation=kind, config=BLOCKS)
        assert got[0].isnan().all()
        assert got[1].isnan().all()  # 0 · ∞


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_other_rows(family) -> None:
    x, weight = draw(20, 40), draw(24, 40, seed=1)
    alone = linear(x, weight, config=FAMILIES[family])
    x[3:] = torch.nan
    poisoned = linear(x, weight, config=FAMILIES[family])
    assert torch.equal(poisoned[:3], alone[:3])
    assert poisoned[3:].isnan().all()


def test_refusals_name_operand_and_reason() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    for call, message in (
        (lambda: linear(x, weight[:, :7]), r"\(3, 8\) by weight \(5, 7\)"),
        (lambda: linear(x, weight.half()), r"x torch.float32, weight torch.float16"),
        (lambda: linear(x.double(), weight.double()), r"x is torch.float64"),
        (lambda: linear(x, weight, torch.zeros(4)), r"bias \(4,\) for 5 outputs"),
        (lambda: linear(x.T.contiguous().T, weight), r"x has strides \(1, 3\)"),
        (lambda: linear(x, weight, activation="relu"), r"'relu', not one of none"),
        (lambda: linear(x, weight, gated=True), r"5 weight rows are not as many for gate"),
        (lambda: linear(x, weight[:4], weight[0, :2], gated=True), r"takes neither bias"),
        (
            lambda: linear(x, weight, residual=x),
            r"residual is \(3, 8\) torch.float32, not \(3, 5\)",
        ),
    ):
        with pytest.raises(RefusalError, match=message):
            call()


# Shared memory of one block, from the CUDA programming guide.
SHARED_KB = {"sm_80": 163, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
BYTES = {"float32": 4, "float16": 2, "int8": 1, "fp8": 1, "fp8_blocks": 1, "int4": 1}
BYTES |= {"int4_float": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_fit_every_target(target, kind) -> None:
    for m in (1, 16, 17, 64, *([] if kind == "int4" else [65, 4096])):
        for n, k in ((2048, 1024), (64, 64), (4304, 1152), (12288, 4096)):
            for activation in ACTIVATIONS:
                for gated in (False, True):
                    c = gemm_config(
                        kind,
                        target,
                        m,
                        n,
                        k,
                        activation=activation,
                        gated=gated,
                        residual=not gated,
                    )
                    columns = 2 * c.n if gated else c.n
                    shared, sums = (c.m + columns) * c.k * BYTES[kind] * c.stages, 1
                    if kind == "int4_float":
                        # Two halves of x, of 2 bytes each, and two widened blocks; two sums.
                        shared = (4 * c.m + columns) * c.k * c.stages + 4 * columns * c.k
                        sums = 2
                    assert shared <= SHARED_KB.get(target, 99) * 1024
                    # The accumulators leave at least half of a thread's 255 registers.
                    assert sums * c.m * columns / (32 * c.warps) <= 128
                    assert c.split == 1 or m <= 16
                    tiles = -(-m // c.m) * -(-n // c.n)
                    assert c.split == 1 or c.split * tiles <= PROCESSORS[target]
                    assert not c.descriptors or target in DESCRIPTOR_TARGETS
    # Few rows get the smallest block: rows that are not there cost as much as others.
    assert gemm_config(kind, target, 1, 64, 64).m == 16


@pytest.mark.parametrize(
    ("target", "like"),
    [("sm_86", "sm_80"), ("sm_88", "sm_87"), ("sm_103", "sm_100"), ("sm_121", "sm_120")]
    + [(target, target) for target in TARGETS],
)
def test_other_gpus_get_the_blocks_of_the_next_older(target, like) -> None:
    assert nearest(target) == like
    for kind in KINDS:
        for m in (1, 64):
            assert gemm_config(kind, target, m, 2048, 2048) == gemm_config(
                kind, like, m, 2048, 2048
            )


def test_older_gpus_have_none() -> None:
    with pytest.raises(ValueError, match="sm_75 is older than sm_80"):
        gemm_config("float16", "sm_75", 1, 2048, 2048)


def test_the_table_can_be_printed(capsys) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(TARGETS) * 7 * (6 * 3 + 2)
    assert any("sm_90" in line and "128 × 256 × 64" in line for line in lines)
