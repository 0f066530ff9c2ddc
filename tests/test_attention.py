"""ops.attention against a plain float64 computation, query by query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvlfast.ops import Forest, Ops

# float32 products and a softmax over up to a few hundred terms of size one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def naive(q, k, v, forest, causal, scale):
    """[Tq, Hq, D] float64: each query looks up its chain of segments and adds it all up."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for s in range(len(forest.parent)):
        ancestors = []
        for a in forest.chain(s)[:-1]:
            ancestors += range(forest.cu_k[a], forest.cu_k[a + 1])
        own = list(range(forest.cu_k[s], forest.cu_k[s + 1]))
        count = forest.cu_q[s + 1] - forest.cu_q[s]
        for i in range(count):
            seen = ancestors + (own[: len(own) - count + i + 1] if causal else own)
            row = forest.cu_q[s] + i
            for head in range(q.shape[1]):
                logits = k[seen, head // group] @ q[row, head] * scale
                weights = np.exp(logits - logits.max())
                out[row, head] = weights / weights.sum() @ v[seen, head // group]
    return out


def random_forest(rng, segments, depth):
    parent, level, lengths_q, lengths_k = [], [], [], []
    for s in range(segments):
        options = [p for p in range(s) if level[p] < depth - 1]
        parent.append(int(rng.choice([*options, -1])) if options else -1)
        level.append(level[parent[-1]] + 1 if parent[-1] >= 0 else 0)
        keys = int(rng.integers(1, 12))
        lengths_k.append(keys)
        lengths_q.append(int(rng.choice([0, keys, rng.integers(1, keys + 1)])))
    cu = [np.concatenate(([0], np.cumsum(x))).astype(np.int32) for x in (lengths_q, lengths_k)]
    return Forest(cu[0], cu[1], np.array(parent, dtype=np.int32))


def random_qkv(rng, forest, heads, kv_heads, dim, dtype=torch.float32):
    shapes = [(forest.cu_q[-1], heads), (forest.cu_k[-1], kv_heads), (forest.cu_k[-1], kv_heads)]
    return [torch.from_numpy(rng.standard_normal((*s, dim))).to(dtype) for s in shapes]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("causal", [True, False])
def test_random_forests(seed: int, causal: bool) -> None:
    rng = np.random.default_rng(seed)
    forest = random_forest(rng, segments=int(rng.integers(1, 9)), depth=3)
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.choice([1, 2, 4, 8]))
    dim = int(rng.choice([64, 72, 128]))
    q, k, v = random_qkv(rng, forest, heads, kv_heads, dim)
    scale = dim**-0.5
    got = Ops.attention(q, k, v, forest, causal=causal, scale=scale)
    expected = naive(q, k, v, forest, causal, scale)
    np.testing.assert_allclose(got.numpy(), expected, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    forest = random_forest(rng, segments=6, depth=3)
    q, k, v = random_qkv(rng, forest, 4, 2, 64, dtype)
    got = Ops.attention(q, k, v, forest, causal=True, scale=0.125)
    assert got.dtype == dtype
    expected = naive(q, k, v, forest, True, 0.125)
    np.testing.assert_allclose(got.float().numpy(), expected, atol=TOLERANCE[dtype])


def test_reading_some_tokens_equals_reading_all() -> None:
    rng = np.random.default_rng(2)
    forest = random_forest(rng, segments=8, depth=3)
    q, k, v = random_qkv(rng, forest, 4, 2, 64)
    everything = Ops.attention(q, k, v, forest, causal=True, scale=0.125)
    read = np.sort(rng.choice(len(q), size=len(q) // 2, replace=False)).astype(np.int64)
    some = Ops.attention(q[read], k, v, forest, causal=True, scale=0.125, read=read)
    torch.testing.assert_close(some, everything[read], atol=2e-6, rtol=0)


def test_segments_see_nothing_of_each_other() -> None:
    rng = np.random.default_rng(3)
    forest = Forest.plain([5, 1, 7])
    q, k, v = random_qkv(rng, forest, 2, 1, 64)
    clean = Ops.attention(q, k, v, forest, causal=False, scale=0.125)
    k[5:], v[5:] = torch.nan, torch.nan
    poisoned = Ops.attention(q, k, v, forest, causal=False, scale=0.125)
    assert torch.equal(clean[:5], poisoned[:5])
    assert poisoned[5:].isnan().all()


def test_long_segments_are_worked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    cu = np.array([0, 40, 73], dtype=np.int32)
    forest = Forest(cu, cu, np.array([-1, 0], dtype=np.int32))
    q, k, v = random_qkv(rng, forest, 4, 2, 64)
    whole = Ops.attention(q, k, v, forest, causal=True, scale=0.125)
    # The package names the function `attention` too, so the module is fetched by its name.
    import sys

    monkeypatch.setattr(sys.modules["qvlfast.ops.attention"], "_CHUNK_ROWS", 7)
    chunked = Ops.attention(q, k, v, forest, causal=True, scale=0.125)
    torch.testing.assert_close(chunked, whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "parent", "message"),
    [
        ([0, 2], [0, 2], [0], "parent must be"),
        ([0, 2], [0, 2], [-2], "parent must be"),
        ([0, 3], [0, 2], [-1], "keys >= queries"),
        ([0, 2, 1], [0, 2, 4], [-1, -1], "never fall"),
        ([1, 2], [0, 2], [-1], "start at 0"),
        ([0, 2], [0, 2, 3], [-1], r"S \+ 1 = 2"),
    ],
)
def test_bad_forests(cu_q, cu_k, parent, message) -> None:
    arrays = [np.array(x, dtype=np.int32) for x in (cu_q, cu_k, parent)]
    with pytest.raises(ValueError, match=message):
        Forest(*arrays)
