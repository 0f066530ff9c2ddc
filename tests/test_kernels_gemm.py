"""Triton's matrix products, in the interpreter, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import RefusalError, RowConfig
from qvlfast.kernels.gemm import ACTIVATIONS, GemmConfig, gemm_config, linear
from qvlfast.kernels.patch_embed import patch_embed, patch_embed_config, resample_positions

from qvlfast.ops import Ops
from tests.guards import inside_poison

pytestmark = pytest.mark.usefixtures("guarded_outputs")

# Rounding of the result to its dtype; float32 also adds in another order.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = list(ROUNDING)
BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
TARGETS = ("sm_80", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return inside_poison(torch.from_numpy(values).to(dtype))


def activated(x, kind):
    if kind == "gelu_tanh":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if kind == "gelu_erf":
        return x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
    return x / (1 + np.exp(-x)) if kind == "silu" else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(0, 32, 32), (1, 1, 1), (15, 31, 33), (16, 32, 32), (17, 33, 31), (150, 64, 40), (3, 72, 97)],
)
def test_linear(dtype, bias, shape) -> None:
    m, k, n = shape
    x = draw(m, k, dtype=dtype)
    weight = draw(n, k, seed=1, dtype=dtype, scale=k**-0.5)
    b = draw(n, seed=2, dtype=dtype).contiguous() if bias else None
    expected = x.double().numpy() @ weight.double().numpy().T
    if b is not None:
        expected = expected + b.double().numpy()
    for config in (BLOCKS, None):
        got = linear(x, weight, b, config=config)
        assert got.dtype == dtype
        tolerance = ROUNDING[dtype]
        np.testing.assert_allclose(
            got.double().numpy(), expected, rtol=tolerance, atol=2 * ROUNDING[torch.float32]
        )


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_of_the_unrounded_sum(kind) -> None:
    x, weight, bias = draw(18, 40), draw(35, 40, seed=1, scale=0.3), draw(35, seed=2).contiguous()
    product = x.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    got = linear(x, weight, bias, activation=kind, config=BLOCKS)
    np.testing.assert_allclose(got.numpy(), activated(product, kind), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_small_and_large_values(scale) -> None:
    x, weight = draw(17, 50, scale=scale), draw(20, 50, seed=1)
    expected = x.double().numpy() @ weight.double().numpy().T
    got = linear(x, weight, config=BLOCKS)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5 * scale, rtol=3e-6)


def test_rows_do_not_depend_on_other_rows() -> None:
    x, weight = draw(20, 40), draw(24, 40, seed=1)
    alone = linear(x, weight, config=BLOCKS)
    x[3:] = torch.nan
    poisoned = linear(x, weight, config=BLOCKS)
    assert torch.equal(poisoned[:3], alone[:3])
    assert poisoned[3:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "c"), [(0, 48, 16), (1, 768, 24), (17, 96, 33), (16, 31, 32)])
def test_patch_embed(dtype, n, k, c) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (n, k), dtype=np.uint8)
    values[:1, :2] = 255, 0
    pixels = inside_poison(torch.from_numpy(values))
    weight = draw(c, k, seed=1, dtype=dtype, scale=0.01)
    bias, positions = draw(c, seed=2).contiguous(), draw(n, c, seed=3)
    expected = values.astype(np.float64) @ weight.double().numpy().T
    expected += bias.double().numpy() + positions.double().numpy()
    got = patch_embed(pixels, weight, bias, positions, config=BLOCKS)
    assert got.dtype == dtype
    # Terms reach 255 · 0.03, and there are k of them.
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=ROUNDING[dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grids",
    [
        [],
        [(1, 2, 2)],
        [(2, 4, 6), (1, 2, 8), (3, 6, 2)],
        [(1, 10, 14), (1, 14, 10)],
    ],
)
def test_positions_equal_the_reference(dtype, grids) -> None:
    table = draw(100, 19, dtype=dtype)
    blocks = RowConfig(rows=8, columns=32, warps=4)
    got = resample_positions(table, grids, 2, config=blocks)
    expected = Ops.resample_positions(table, grids, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_refusals_name_operand_and_reason() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    for call, message in (
        (lambda: linear(x, weight[:, :7]), r"\(3, 8\) by weight \(5, 7\)"),
        (lambda: linear(x, weight.half()), r"x torch.float32, weight torch.float16"),
        (lambda: linear(x.double(), weight.double()), r"x is torch.float64"),
        (lambda: linear(x, weight, torch.zeros(4)), r"bias \(4,\) for 5 outputs"),
        (lambda: linear(x.T.contiguous().T, weight), r"x has strides \(1, 3\)"),
        (lambda: linear(x, weight, activation="relu"), r"'relu', not one of none"),
        (lambda: patch_embed(x, weight, x, x), r"pixels are torch.float32"),
        (lambda: resample_positions(x, [], 2), r"grid of 3 rows is not square"),
        (lambda: resample_positions(x[:1], [(1, 3, 2)], 2), r"3 × 2 patches are not whole"),
    ):
        with pytest.raises(RefusalError, match=message):
            call()


# Shared memory of one block, from the CUDA programming guide.
SHARED_KB = {"sm_80": 163, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def fits(config, target, dtype):
    shared = (config.m + config.n) * config.k * dtype.itemsize * config.stages
    assert shared <= SHARED_KB.get(target, 99) * 1024
    # The float32 accumulator leaves at least half of a thread's 255 registers.
    assert config.m * config.n / (32 * config.warps) <= 128


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_fit_every_target(target, dtype) -> None:
    for m in (1, 16, 17, 64, 65, 4096):
        for n, k in ((2048, 1024), (64, 64), (4304, 1152), (12288, 4096)):
            for activation in ACTIVATIONS:
                fits(gemm_config(target, dtype, m, n, k, activation), target, dtype)
            pixels = patch_embed_config(target, dtype, m, n, k)
            fits(pixels, target, dtype)
            assert pixels.n <= 128
    # Few rows get the smallest block: rows that are not there cost as much as others.
    assert gemm_config(target, dtype, 1, 64, 64).m == 16
