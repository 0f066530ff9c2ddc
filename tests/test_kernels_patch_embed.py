"""Triton's patch embedding, in the interpreter: against float64, and its positions too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import RefusalError
from qvlfast.kernels.configs import TARGETS, GemmConfig
from qvlfast.kernels.patch_embed import patch_embed, patch_embed_config

from qvlfast.ops.patch_embed import resample_positions
from tests.guards import inside_poison

pytestmark = pytest.mark.usefixtures("guarded_outputs")

ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = list(ROUNDING)
BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return inside_poison(torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grids", "k", "c"),
    [
        ([], 48, 16),
        ([(1, 2, 2)], 768, 24),
        ([(2, 4, 2), (1, 2, 8)], 96, 33),
        ([(1, 2, 2), (3, 2, 2)], 31, 32),
        ([(1, 10, 14), (1, 14, 10)], 33, 20),
    ],
)
def test_patch_embed(dtype, grids, k, c) -> None:
    rng = np.random.default_rng(0)
    n = sum(t * h * w for t, h, w in grids)
    values = rng.integers(0, 256, (n, k), dtype=np.uint8)
    values[:1, :2] = 255, 0
    pixels = inside_poison(torch.from_numpy(values))
    weight = draw(c, k, seed=1, dtype=dtype, scale=0.01)
    bias, table = draw(c, seed=2).contiguous(), draw(100, c, seed=3, dtype=dtype)
    expected = values.astype(np.float64) @ weight.double().numpy().T + bias.double().numpy()
    expected += resample_positions(table, grids, 2).double().numpy()
    for config in (BLOCKS, None):
        got = patch_embed(pixels, weight, bias, table, grids, 2, config=config)
        assert got.dtype == dtype
        # Terms reach 255 · 0.03, and there are k of them.
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=ROUNDING[dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", [1, 2])
def test_positions_alone(dtype, merge) -> None:
    """Black patches and no bias leave the grid, which was tested against its formula."""
    table = draw(49, 19, dtype=dtype)
    weight, bias = torch.zeros(19, 16, dtype=dtype), torch.zeros(19)
    grids = [(2, 4, 6), (1, 2, 8), (1, 2, 2)]
    n = sum(t * h * w for t, h, w in grids)
    got = patch_embed(torch.zeros(n, 16, dtype=torch.uint8), weight, bias, table, grids, merge)
    expected = resample_positions(table, grids, merge)
    torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=ROUNDING[dtype])


def test_refusals_name_operand_and_reason() -> None:
    x, pixels = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.uint8)
    bias, grids = torch.zeros(4), [(1, 2, 2)]
    for args, message in (
        ((x, x, bias, x, grids), r"pixels are torch.float32"),
        ((pixels, x[:, :7], bias, x[:, :4], grids), r"weight \(4, 7\) for patches of 8 values"),
        ((pixels, x, bias[:3], x[:, :4], grids), r"bias \(3,\) torch.float32, not \(4,\)"),
        ((pixels, x, bias, x[:3, :4], grids), r"table \(3, 4\) is no square grid of 4 channels"),
        ((pixels, x, bias, x[:, :4], [(1, 3, 2)]), r"3 × 2 patches are not whole"),
        ((pixels, x, bias, x[:, :4], [(2, 2, 2)]), r"4 patches for grids of 8"),
    ):
        with pytest.raises(RefusalError, match=message):
            patch_embed(*args, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_blocks(target, dtype) -> None:
    for n in (1, 64, 4096):
        config = patch_embed_config(target, dtype, n, 1152, 768)
        assert config.n <= 64 and config.split == 1 and not config.descriptors
