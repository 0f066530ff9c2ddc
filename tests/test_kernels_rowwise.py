"""Triton's row-wise kernels, in the interpreter, against float64 written from the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import LAUNCHES, RefusalError, RowConfig, row_config
from qvlfast.kernels.embed import add_rows, embed
from qvlfast.kernels.norm import layer_norm, rms_norm
from qvlfast.kernels.pool import pool, score
from qvlfast.kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables

from qvlfast.ops import Ops
from qvlfast.ops.rows import quantise_rows
from tests.guards import between_guards, inside_poison

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
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_norms_quantise_in_the_same_pass(dtype, form) -> None:
    """The same bits as rounding to the dtype, storing, and quantising that."""
    x, weight = draw(7, 130, dtype=dtype), draw(130, seed=1, dtype=dtype).contiguous()
    x[3] = 0
    x[4, 77] = torch.inf
    LAUNCHES.clear()
    for norm, vectors in ((rms_norm, (weight,)), (layer_norm, (weight, weight))):
        values, scale = norm(x, *vectors, 1e-6, form, config=BLOCKS)
        plain = norm(x, *vectors, 1e-6, config=BLOCKS)
        expected = quantise_rows(plain, form)
        assert torch.equal(values.view(torch.int8), expected.values.view(torch.int8))
        assert torch.equal(scale.nan_to_num(-1), expected.scale.nan_to_num(-1))
        assert scale.isnan().tolist() == [False] * 4 + [True] + [False] * 2
    assert LAUNCHES == {"rms_norm": 2, "layer_norm": 2}


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
    cos, sin = between_guards(angle.cos()), between_guards(angle.sin())
    blocks = RowConfig(rows=4, columns=64, warps=4)
    wide = x.double().numpy()
    check(rope(x, cos, sin, config=blocks), rotate(wide, cos, sin), dtype)
    scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    normed = wide * scale * weight.double().numpy()
    got = norm_rope(x, weight, cos, sin, 1e-6, config=blocks)
    check(got, rotate(normed, cos, sin), dtype, 3.0)
    # In place, between values of others.
    fused = torch.full((tokens, heads + 2, dim), 7.0, dtype=dtype)
    fused[:, 1:-1] = x
    norm_rope(fused[:, 1:-1], weight, cos, sin, 1e-6, config=blocks, out=fused[:, 1:-1])
    assert torch.equal(fused[:, 1:-1], got)
    assert (fused[:, [0, -1]] == 7.0).all()


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 128])
@pytest.mark.parametrize("read", [None, [], [5], [4, 0, 4, 2, 1]])
def test_pool_and_score(dtype, columns, read) -> None:
    x, weight = draw(6, columns, dtype=dtype), draw(columns, seed=1, dtype=dtype).contiguous()
    answers = draw(2, columns, seed=2)
    index = None if read is None else torch.tensor(read, dtype=torch.int64)
    wide = x.double().numpy()[slice(None) if read is None else read]
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight.double().numpy()
    check(pool(x, weight, 1e-6, read=index, config=BLOCKS), normed, torch.float32)
    for size in {1, columns // 2 + 1, columns}:
        unit = normed[:, :size] / np.linalg.norm(normed[:, :size], axis=1, keepdims=True)
        got = pool(x, weight, 1e-6, read=index, size=size, config=BLOCKS)
        check(got, unit, torch.float32)
    logit = normed @ (answers[0] - answers[1]).double().numpy()
    got = score(x, weight, 1e-6, answers, read=index, config=BLOCKS)
    check(got, 1 / (1 + np.exp(-logit)), torch.float32, 20.0)  # a sum of up to 128 terms


def test_pooling_at_the_ends() -> None:
    zeros, weight = torch.zeros(1, 8), torch.ones(8)
    assert pool(zeros, weight, 1e-6, size=4).tolist() == [[0.0] * 4]
    answers = torch.stack((torch.full((8,), 1e4), torch.zeros(8)))
    certain = score(torch.stack((weight, -weight)), weight, 1e-6, answers)
    assert certain.tolist() == [1.0, 0.0]
    for bad in (torch.nan, torch.inf):
        x = torch.ones(2, 8)
        x[1, 3] = bad
        assert pool(x, weight, 1e-6, size=8).isnan().any(dim=1).tolist() == [False, True]
        assert score(x, weight, 1e-6, answers).isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("places", [[], [3], [6, 0, 4, 1, 2]])
def test_add_rows(dtype, kind, places) -> None:
    x, rows = draw(7, 33, dtype=dtype), draw(len(places), 33, seed=1, dtype=dtype)
    index = torch.tensor(places, dtype=kind)
    expected = x.clone()
    expected[index.long()] += rows
    around = x.new_full((9, 35), 7.0)
    inner = around[1:-1, 1:-1]
    inner.copy_(x)
    add_rows(inner, index, rows, config=RowConfig(rows=4, columns=64, warps=4))
    assert torch.equal(inner, expected)
    inner.fill_(7.0)
    assert (around == 7.0).all(), "a kernel wrote outside its rows"


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


def test_refusals_name_operand_and_reason() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(RefusalError, match=r"rms_norm: x is torch.int32, not float32"):
        rms_norm(x.int(), torch.ones(4), 1e-6)
    with pytest.raises(RefusalError, match=r"rms_norm: weight \(5,\) for rows of 4"):
        rms_norm(x, torch.ones(5), 1e-6)
    with pytest.raises(RefusalError, match=r"one dtype, got x torch.float32, rows torch.float16"):
        add_rows(x, torch.tensor([0]), x[:1].half())
    with pytest.raises(RefusalError, match=r"rows \(2, 4\) at 1 places of x \(2, 4\)"):
        add_rows(x, torch.tensor([0]), x)
    with pytest.raises(RefusalError, match=r"rows in 'int3', not one of int8, fp8"):
        rms_norm(x, torch.ones(4), 1e-6, "int3")
    with pytest.raises(RefusalError, match="the last must be 1"):
        embed(torch.tensor([0]), torch.zeros(4, 4).T)
    with pytest.raises(RefusalError, match=r"ids are torch.float32"):
        embed(x[0], x)
    with pytest.raises(RefusalError, match=r"answers \(2, 4\) torch.float16, not \(2, 4\) float32"):
        score(x, torch.ones(4), 1e-6, x.half())
    with pytest.raises(RefusalError, match="size is 5, rows have 4 values"):
        pool(x, torch.ones(4), 1e-6, size=5)


def test_launches_are_counted_and_empty_ones_do_not_happen() -> None:
    LAUNCHES.clear()
    pool(torch.zeros(0, 4), torch.ones(4), 1e-6)
    assert LAUNCHES["pool"] == 0
    pool(torch.zeros(1, 4), torch.ones(4), 1e-6)
    assert LAUNCHES == {"pool": 1}


@pytest.mark.parametrize("columns", [1, 128, 1024, 4096, 5120, 12288])
def test_row_config(columns) -> None:
    for target in ("interpreter", "sm_80", "sm_120"):
        config = row_config(target, columns)
        assert config.columns >= columns
        assert config.columns & (config.columns - 1) == 0
        # Registers: a thread holds its share of the block, in float32, about three times over.
        assert target == "interpreter" or config.rows * config.columns / (32 * config.warps) <= 64
