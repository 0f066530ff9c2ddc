"""Triton's row-wise kernels, in the interpreter, against float64 written from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from qvlfast.kernels.activation import gelu_erf, gelu_tanh, swiglu
from qvlfast.kernels.common import LAUNCHES, RefusalError, RowConfig, row_config
from qvlfast.kernels.embed import embed
from qvlfast.kernels.norm import layer_norm, rms_norm
from qvlfast.kernels.pool import pool, score
from qvlfast.kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables

from qvlfast.ops import Ops
from tests.guards import inside_poison

pytestmark = pytest.mark.usefixtures("guarded_outputs")

# Rounding of the result to its dtype, relative to it; float32 also sums in another order.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = list(ROUNDING)
# Rows of 1, a block ± 1, and none; columns of one, off and on powers of two.
SHAPES = [(0, 8), (1, 1), (3, 72), (4, 16), (5, 130)]
BLOCKS = RowConfig(rows=4, columns=256, warps=4)


def draw(*shape, seed=0, dtype=torch.float32):
    values = np.random.default_rng(seed).standard_normal(shape)
    return inside_poison(torch.from_numpy(values).to(dtype))


def check(got, expected, dtype, spread=1.0):
    """``spread``: size of the terms that a result is the sum of."""
    assert got.dtype == dtype
    tolerance = ROUNDING[dtype]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        got.double().numpy(), expected, rtol=tolerance, atol=tolerance * spread + smallest
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(dtype, shape) -> None:
    x, columns = draw(*shape, dtype=dtype), shape[-1]
    weight = draw(columns, seed=1, dtype=dtype).contiguous()
    bias = draw(columns, seed=2, dtype=dtype).contiguous()
    wide, w, b = (t.double().numpy() for t in (x, weight, bias))
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * w
    check(rms_norm(x, weight, 1e-6, config=BLOCKS), rms, dtype, 1e-3)
    check(pool(x, weight, 1e-6, config=BLOCKS), rms, torch.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w + b
    check(layer_norm(x, weight, bias, 1e-6, config=BLOCKS), layer, dtype, 3.0)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_norms_of_small_and_large_rows(scale) -> None:
    x, weight = (draw(3, 2, 80) * scale).contiguous(), draw(80, seed=1).contiguous()
    bias = torch.zeros(80)
    wide, w = x.double().numpy(), weight.double().numpy()
    check(
        rms_norm(x, weight, 1e-6),
        wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * w,
        torch.float32,
        1e-3,
    )
    # A mean far from zero: one pass over the squares would cancel.
    x += 1000 * scale
    wide = x.double().numpy()
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w
    got = layer_norm(x, weight, bias, 1e-6)
    np.testing.assert_allclose(got.double().numpy(), expected, atol=2e-3)
    reference = Ops.layer_norm(x, weight, bias, 1e-6)
    np.testing.assert_allclose(got.numpy(), reference.numpy(), atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e4])
@pytest.mark.parametrize("shape", [(0, 4), (5, 33), (9, 16)])
def test_activations(dtype, scale, shape) -> None:
    x = inside_poison((draw(*shape) * scale).to(dtype))
    up = draw(*shape, seed=1, dtype=dtype)
    wide = x.double().numpy()
    blocks = RowConfig(rows=4, columns=16, warps=4)
    erf = np.vectorize(math.erf, otypes=[np.float64])
    spread = min(scale, 1.0) * 1e-1  # deep in the negative tail the result is a small difference
    check(gelu_erf(x, config=blocks), wide / 2 * (1 + erf(wide / math.sqrt(2))), dtype, spread)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    check(gelu_tanh(x, config=blocks), wide / 2 * (1 + np.tanh(inner)), dtype, spread)
    with np.errstate(over="ignore"):
        silu = wide / (1 + np.exp(-wide))
    check(swiglu(x, up, config=blocks), silu * up.double().numpy(), dtype, spread)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = cos.double().numpy()[:, None], sin.double().numpy()[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 1, 64), (1, 3, 72), (3, 5, 128)])
def test_rope(dtype, tokens, heads, dim) -> None:
    x = draw(tokens, heads, dim, dtype=dtype)
    weight = draw(dim, seed=1, dtype=dtype).contiguous()
    angle = draw(tokens, dim // 2, seed=2) * 9
    cos, sin = angle.cos(), angle.sin()
    blocks = RowConfig(rows=4, columns=64, warps=4)
    wide = x.double().numpy()
    check(rope(x, cos, sin, config=blocks), rotate(wide, cos, sin), dtype)
    scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    normed = wide * scale * weight.double().numpy()
    got = norm_rope(x, weight, cos, sin, 1e-6, config=blocks)
    check(got, rotate(normed, cos, sin), dtype, 3.0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_tables_equal_the_reference(kind, tokens) -> None:
    positions = np.random.default_rng(0).integers(0, 40_000, (3, tokens))
    places = inside_poison(torch.from_numpy(positions).to(kind))
    blocks = RowConfig(rows=4, columns=64, warps=4)
    for section in [(24, 20, 20), (26, 19, 19), (10, 3, 3)]:
        args = (2 * sum(section), 5e6, section)
        got = mrope_tables(places, *args, config=blocks)
        torch.testing.assert_close(got, Ops.mrope_tables(places, *args), atol=3e-7, rtol=0)
    for dim in (64, 72):
        got = vision_rope_tables(places[:2], dim, 1e4, config=blocks)
        expected = Ops.vision_rope_tables(places[:2], dim, 1e4)
        torch.testing.assert_close(got, expected, atol=3e-7, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype) -> None:
    table = draw(11, 33, dtype=dtype)
    for ids in ([], [10, 0, 3, 3, 7]):
        index = torch.tensor(ids, dtype=torch.int64)
        got = embed(index, table, config=RowConfig(rows=4, columns=64, warps=4))
        assert torch.equal(got, table[index])
    outside = embed(torch.tensor([-1, 11, 4], dtype=torch.int32), table)
    assert outside[:2].isnan().all()
    assert torch.equal(outside[2], table[4])


@pytest.mark.parametrize("rows", [0, 1, 4, 5])
def test_score(rows) -> None:
    pooled, answers = draw(rows, 33), draw(2, 33, seed=1)
    logit = pooled.double().numpy() @ (answers[0] - answers[1]).double().numpy()
    got = score(pooled, answers, config=RowConfig(rows=4, columns=64, warps=4))
    check(got, 1 / (1 + np.exp(-logit)), torch.float32)
    certain = score(pooled * 1e4, answers)
    assert certain.isfinite().all()
    np.testing.assert_array_equal(certain.numpy(), (logit > 0).astype(np.float32))


def test_bfloat16_results_are_rounded_to_nearest() -> None:
    """The interpreter's own cast cuts off; the truth here is torch's rounding."""
    x = draw(64, 64).contiguous()
    wide = Ops.rms_norm(x, torch.ones(64), 0.0)
    got = rms_norm(x.bfloat16(), torch.ones(64), 0.0)
    expected = Ops.rms_norm(x.bfloat16(), torch.ones(64), 0.0)
    assert torch.equal(got, expected)
    error = (got.double() - wide.double()) / wide.double().abs()
    # Cutting off would pull every value towards zero by a quarter of a per cent on average.
    assert abs(float((error * wide.sign()).mean())) < 2e-4


def test_not_a_number_stays_one() -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, -torch.inf]])
    for dtype in DTYPES:
        got = gelu_erf(x.to(dtype))
        assert got[0, 1].isnan()
        assert got[1, 0] == torch.inf


def test_refusals_name_operand_and_reason() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(RefusalError, match=r"rms_norm: x is torch.int32, not float32"):
        rms_norm(x.int(), torch.ones(4), 1e-6)
    with pytest.raises(RefusalError, match=r"rms_norm: weight \(5,\) for rows of 4"):
        rms_norm(x, torch.ones(5), 1e-6)
    with pytest.raises(RefusalError, match=r"swiglu: gate is \(2, 4\) and up \(2, 3\)"):
        swiglu(x, x[:, :3])
    with pytest.raises(RefusalError, match=r"one dtype, got gate torch.float32, up torch.float16"):
        swiglu(x, x.half())
    with pytest.raises(RefusalError, match="the last must be 1"):
        embed(torch.tensor([0]), torch.zeros(4, 4).T)
    with pytest.raises(RefusalError, match=r"ids are torch.float32"):
        embed(x[0], x)
    with pytest.raises(RefusalError, match="both must be float32"):
        score(x.half(), x)


def test_launches_are_counted_and_empty_ones_do_not_happen() -> None:
    LAUNCHES.clear()
    gelu_tanh(torch.zeros(0, 4))
    assert LAUNCHES["gelu_tanh"] == 0
    gelu_tanh(torch.zeros(1, 4))
    assert LAUNCHES == {"gelu_tanh": 1}


@pytest.mark.parametrize("columns", [1, 128, 1024, 4096, 5120, 12288])
def test_row_config(columns) -> None:
    for target in ("interpreter", "sm_80", "sm_120"):
        config = row_config(target, columns)
        assert config.columns >= columns
        assert config.columns & (config.columns - 1) == 0
        # Registers: a thread holds its share of the block, in float32, about three times over.
        assert target == "interpreter" or config.rows * config.columns / (32 * config.warps) <= 64
