"""Triton's attention, in the interpreter, against float64, query by query."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from qvlfast.kernels.attention import AttentionConfig, attention, attention_config
from qvlfast.kernels.common import RefusalError

from benchmarks.aot import SHARED_KB
from qvlfast.ops import Forest, Ops
from tests.guards import inside_poison
from tests.test_attention import naive, random_forest

pytestmark = pytest.mark.usefixtures("guarded_outputs")

# A running softmax over up to a hundred terms of size one, then the rounding of the result; in
# 16 bits the weights are rounded too, as on a GPU.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
BLOCKS = AttentionConfig(m=16, n=16, warps=4, stages=1)


def draw(rng, forest, heads, kv_heads, dim, dtype=torch.float32, scale=1.0):
    """q, k, v as views into poisoned buffers."""
    rows = ((forest.cu_q[-1], heads), (forest.cu_k[-1], kv_heads), (forest.cu_k[-1], kv_heads))
    return [
        inside_poison(torch.from_numpy(rng.standard_normal((*r, dim)) * scale).to(dtype))
        for r in rows
    ]


def check(q, k, v, forest, causal, scale, config=BLOCKS):
    got = attention(q, k, v, forest, causal=causal, scale=scale, config=config)
    assert got.dtype == q.dtype
    expected = naive(q, k, v, forest, causal, scale)
    np.testing.assert_allclose(got.double().numpy(), expected, atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_forests(seed, causal) -> None:
    """Depth 3, resident segments, segments with queries for their last keys only."""
    rng = np.random.default_rng(seed)
    forest = random_forest(rng, segments=6, depth=3)
    kv_heads = int(rng.integers(1, 3))
    heads = kv_heads * (1, 2, 3, 4, 5, 8)[seed]
    dim = (64, 72, 128)[seed % 3]
    q, k, v = draw(rng, forest, heads, kv_heads, dim)
    check(q, k, v, forest, causal, dim**-0.5)


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_at_tile_edges(causal) -> None:
    rng = np.random.default_rng(0)
    lengths = [0, 1, 15, 16, 17, 0, 31, 33]
    forest = Forest.plain(lengths)
    q, k, v = draw(rng, forest, 2, 2, 64)
    check(q, k, v, forest, causal, 0.125)
    # The same pieces as one chain: every edge between segments is off the key blocks.
    chain = replace(forest, parent=np.arange(-1, len(lengths) - 1, dtype=np.int32))
    check(q, k, v, chain, causal, 0.125)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype) -> None:
    rng = np.random.default_rng(1)
    forest = random_forest(rng, segments=6, depth=3)
    q, k, v = draw(rng, forest, 4, 2, 72, dtype)
    check(q, k, v, forest, True, 0.12)


@pytest.mark.parametrize("config", [None, AttentionConfig(32, 64, 4, 1)])
def test_other_blocks_and_the_chosen_one(config) -> None:
    rng = np.random.default_rng(2)
    forest = random_forest(rng, segments=7, depth=3)
    q, k, v = draw(rng, forest, 6, 2, 64)
    check(q, k, v, forest, True, 0.125, config)


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_flat_and_sharp_softmax(scale) -> None:
    """Logits all alike, and so far apart that one key takes all: no overflow, no NaN."""
    rng = np.random.default_rng(3)
    forest = random_forest(rng, segments=4, depth=2)
    q, k, v = draw(rng, forest, 2, 1, 64)
    q *= scale
    got = attention(q, k, v, forest, causal=True, scale=0.125, config=BLOCKS)
    expected = naive(q, k, v, forest, True, 0.125)
    # A float32 logit of size x is off by x · 2⁻²⁴, several times over; so is the weight of a key.
    np.testing.assert_allclose(got.numpy(), expected, atol=3e-6 * max(1.0, scale), rtol=1e-5)


def test_shared_beginning_equals_full_recompute() -> None:
    rng = np.random.default_rng(4)
    heads, kv_heads, dim = 4, 2, 64
    tails = [3, 18, 1]
    shared = Forest(
        *(np.cumsum([0, 21, *tails]).astype(np.int32) for _ in range(2)),
        parent=np.array([-1, 0, 0, 0], dtype=np.int32),
    )
    q, k, v = draw(rng, shared, heads, kv_heads, dim)
    got = attention(q, k, v, shared, causal=True, scale=0.125, config=BLOCKS)
    for i, tail in enumerate(tails):
        mine = slice(int(shared.cu_q[i + 1]), int(shared.cu_q[i + 2]))
        whole = [torch.cat((x[:21], x[mine])) for x in (q, k, v)]
        alone = attention(
            *whole, Forest.plain([21 + tail]), causal=True, scale=0.125, config=BLOCKS
        )
        torch.testing.assert_close(got[mine], alone[21:], atol=2e-6, rtol=0)


def test_order_of_segments_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    lengths = [5, 17, 1, 30]
    forest = Forest.plain(lengths)
    q, k, v = draw(rng, forest, 2, 1, 64)
    got = attention(q, k, v, forest, causal=True, scale=0.125, config=BLOCKS)
    order = [2, 0, 3, 1]
    rows = np.concatenate([np.arange(forest.cu_q[s], forest.cu_q[s + 1]) for s in order])
    moved = Forest.plain([lengths[s] for s in order])
    shuffled = attention(
        *(x[rows] for x in (q, k, v)), moved, causal=True, scale=0.125, config=BLOCKS
    )
    assert torch.equal(shuffled, got[rows])


def test_segments_see_nothing_of_each_other() -> None:
    rng = np.random.default_rng(6)
    forest = Forest.plain([5, 1, 20])
    q, k, v = draw(rng, forest, 2, 1, 64)
    clean = attention(q, k, v, forest, causal=False, scale=0.125, config=BLOCKS)
    k[5:], v[5:] = torch.nan, torch.nan
    poisoned = attention(q, k, v, forest, causal=False, scale=0.125, config=BLOCKS)
    assert torch.equal(clean[:5], poisoned[:5])
    assert poisoned[5:].isnan().all()


def test_reading_some_tokens_equals_reading_all() -> None:
    rng = np.random.default_rng(7)
    forest = random_forest(rng, segments=8, depth=3)
    q, k, v = draw(rng, forest, 4, 2, 64)
    everything = attention(q, k, v, forest, causal=True, scale=0.125, config=BLOCKS)
    count = len(q)
    for read in (
        np.sort(rng.choice(count, size=count // 2, replace=False)),
        np.array([count - 1]),
        np.array([], dtype=np.int64),
        np.arange(count),
    ):
        some = attention(q[read], k, v, forest, causal=True, scale=0.125, read=read)
        torch.testing.assert_close(some, everything[read], atol=2e-6, rtol=0)


def test_plans_are_not_mixed_up() -> None:
    """Forests made and dropped one after the other get plans of their own."""
    rng = np.random.default_rng(8)
    for lengths in ([3, 4], [4, 3], [7], [1, 6], [2, 2, 3], [6, 1], [5, 2], [2, 5], [1, 1, 5]):
        forest = Forest.plain(lengths)
        q, k, v = draw(rng, forest, 1, 1, 64)
        got = attention(q, k, v, forest, causal=True, scale=0.125)
        expected = Ops.attention(q, k, v, forest, causal=True, scale=0.125)
        torch.testing.assert_close(got, expected, atol=3e-6, rtol=0)


def test_refusals_name_operand_and_reason() -> None:
    forest = Forest.plain([4])
    q, k = torch.zeros(4, 4, 64), torch.zeros(4, 2, 64)
    for args, message in (
        ((q, k[:3], k[:3]), r"4 queries and 3 keys, the forest has 4 and 4"),
        ((q, k, k[..., :32]), r"k and v must be alike"),
        ((q[:, :3], k, k), r"a multiple of Hk"),
        ((q.double(), k.double(), k.double()), r"q is torch.float64"),
        ((torch.zeros(4, 1, 512),) * 3, r"heads of 512 values"),
        ((torch.zeros(4, 64, 64), k[:, :1], k[:, :1]), r"64 query heads a key head"),
    ):
        with pytest.raises(RefusalError, match=message):
            attention(*args, forest, causal=True, scale=1.0, config=BLOCKS)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize(
    "target", ["sm_80", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120"]
)
def test_config_fits_the_target(target, dim, dtype) -> None:
    for longest in (1, 2, 16, 17, 200, 4096):
        config = attention_config(target, dtype, dim, longest)
        assert config.m >= 16
        padded = 1 << (dim - 1).bit_length()
        shared = (config.m + 2 * config.n * config.stages) * padded * dtype.itemsize
        assert shared <= SHARED_KB[target] * 1024
