"""Triton's int8 products, in the interpreter: the sums are exact, so are the comparisons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import RefusalError, RowConfig
from qvlfast.kernels.gemm import GemmConfig
from qvlfast.kernels.gemm_int8 import gemm_int8_config, linear_int8, quantise_rows

from tests.guards import inside_poison

pytestmark = pytest.mark.usefixtures("guarded_outputs")

BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
ROWS = RowConfig(rows=4, columns=64, warps=4)


def operands(m, k, n):
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-127, 128, shape, dtype=np.int8) for shape in ((m, k), (n, k)))
    scales = [(10 ** rng.uniform(-6, 0, count)).astype(np.float32) for count in (m, n)]
    bias = rng.standard_normal(n).astype(np.float32)
    tensors = [torch.from_numpy(a) for a in (x, scales[0], weight, scales[1], bias)]
    tensors[0], tensors[2] = inside_poison(tensors[0]), inside_poison(tensors[2])
    product = x.astype(np.int64) @ weight.astype(np.int64).T
    expected = product.astype(np.float32) * scales[0][:, None] * scales[1]
    return tensors, expected


@pytest.mark.parametrize(
    "shape", [(0, 8, 8), (1, 1, 1), (15, 31, 33), (16, 32, 32), (17, 33, 31), (3, 300, 40)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_int8_is_exact(shape, dtype) -> None:
    (x, x_scale, weight, weight_scale, bias), expected = operands(*shape)
    for offset, wide in ((None, expected), (bias, expected + bias.numpy())):
        got = linear_int8(x, x_scale, weight, weight_scale, offset, dtype=dtype, config=BLOCKS)
        assert torch.equal(got, torch.from_numpy(wide).to(dtype))


def test_largest_sums_do_not_overflow() -> None:
    x = torch.full((1, 12288), -127, dtype=torch.int8)
    weight = torch.full((2, 12288), 127, dtype=torch.int8)
    ones = torch.ones(2)
    got = linear_int8(x, ones[:1], weight, ones, dtype=torch.float32)
    assert got.tolist() == [[-(127.0**2) * 12288] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (4, 64)])
def test_quantise_rows(dtype, scale, shape) -> None:
    values = np.random.default_rng(0).standard_normal(shape) * scale
    x = inside_poison(torch.from_numpy(values).to(dtype))
    rows, scales = quantise_rows(x, config=ROWS)
    assert rows.dtype == torch.int8
    wide = x.double().numpy()
    most = np.abs(wide).max(axis=1)
    np.testing.assert_allclose(scales.numpy(), most / 127, rtol=3e-7)
    error = np.abs(rows.double().numpy() * scales.double().numpy()[:, None] - wide)
    assert (error <= 0.5001 * scales.numpy()[:, None]).all()
    assert np.array_equal(np.abs(rows.numpy()).max(axis=1), np.where(most > 0, 127, 0))


def test_rows_of_zeros() -> None:
    rows, scales = quantise_rows(torch.zeros(2, 5))
    assert not rows.any()
    assert (scales > 0).all()


def test_refusals_name_operand_and_reason() -> None:
    (x, x_scale, weight, weight_scale, _), _ = operands(3, 8, 5)
    for args, message in (
        ((x, x_scale, weight[:, :7], weight_scale), r"x \(3, 8\) by weight \(5, 7\)"),
        ((x, x_scale[:2], weight, weight_scale), r"x_scale \(2,\) torch.float32 for 3"),
        ((x.float(), x_scale, weight, weight_scale), r"torch.float32 by torch.int8"),
    ):
        with pytest.raises(RefusalError, match=message):
            linear_int8(*args, dtype=torch.float32)


@pytest.mark.parametrize("m", [1, 17, 4096])
def test_blocks_fit_every_target(m) -> None:
    config = gemm_int8_config("sm_89", m, 4096, 4096)
    assert (config.m + config.n) * config.k * config.stages <= 99 * 1024
