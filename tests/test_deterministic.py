"""The same input gives the same bits: alone, in any batch and order, whatever is shared or cached,
in one piece or in many."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvlfast import BackendError, Embedder, Reranker
from qvlfast.batch import PieceLimits, cut_windows, group_frames
from qvlfast.ops import Forest, Ops
from tests.samples import frames, picture
from tests.stand_in import forget_answers

# Smaller than most of the inputs, so that layers are cut where lengths are odd.
SMALL_PIECES = PieceLimits(rows=37, pairs=1500, patches=30)


def inputs() -> list[Any]:
    """More short ones than a vector register holds, and some of every kind."""
    items: list[Any] = [f"text number {i} " * (i % 5 + 1) for i in range(40)]
    items += ["words in one long text " * 40, "", {}]
    photo = picture(96, 64)
    items += [
        {"image": photo},
        {"image": [photo, picture(64, 96, seed=1)], "text": "two"},
        {"video": frames(4, 64, 64), "image": photo, "instruction": "Find it"},
    ]
    return items


@pytest.fixture(scope="module")
def folder(odd_checkpoint: Path) -> Path:
    return odd_checkpoint


@pytest.fixture(
    scope="module",
    params=["float32", "int8", pytest.param("bfloat16", marks=pytest.mark.slow)],
)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "int8":
        return {"dtype": "bfloat16", "quantization": "int8"}
    return {"dtype": request.param}


@pytest.fixture(scope="module")
def plain(folder: Path, options: dict[str, Any]) -> Iterator[np.ndarray]:
    """Vectors of every input on its own, with nothing shared or kept, in one piece."""
    off = {"share_prefixes": False, "vision_cache_bytes": 0}
    with Embedder.from_pretrained(folder, deterministic=True, **off, **options) as embedder:
        embedder._runtime.served.runner._limits = PieceLimits(1 << 30, 1 << 60, 1 << 30)
        yield embedder.encode(inputs(), batch_tokens=1)


@pytest.mark.parametrize("pieces", [None, SMALL_PIECES], ids=["usual pieces", "small pieces"])
def test_equal_bits(
    folder: Path, options: dict[str, Any], plain: np.ndarray, pieces: PieceLimits | None
) -> None:
    items = inputs()
    rng = np.random.default_rng(0)
    with Embedder.from_pretrained(folder, deterministic=True, **options) as embedder:
        if pieces:
            embedder._runtime.served.runner._limits = pieces
        for batch_tokens in (None, 300):
            forget_answers(embedder)
            order = rng.permutation(len(items))
            got = embedder.encode([items[i] for i in order], batch_tokens=batch_tokens)
            assert np.array_equal(got, plain[order])
        before = embedder.metrics()
        assert np.array_equal(embedder.encode(items), plain)
        after = embedder.metrics()
        assert after.answer_cache.hits - before.answer_cache.hits == len(items)
        assert after.tokens_computed == before.tokens_computed
        assert embedder.metrics().prefix_cache.hits and embedder.metrics().vision_cache.hits


def test_equal_scores(folder: Path, options: dict[str, Any]) -> None:
    query = {"text": "which", "image": picture(64, 64)}
    documents = [f"document {i} " * (i % 4 + 1) for i in range(36)]
    pairs = [(query, document) for document in documents]
    off = {"share_prefixes": False, "vision_cache_bytes": 0}
    with (
        Reranker.from_pretrained(folder, deterministic=True, **off, **options) as plain,
        Reranker.from_pretrained(folder, deterministic=True, **options) as sharing,
    ):
        alone = plain.predict(pairs, batch_tokens=1)
        for batch_tokens in (None, 300):
            forget_answers(sharing)
            assert np.array_equal(sharing.predict(pairs, batch_tokens=batch_tokens), alone)


@pytest.mark.parametrize(
    "wrong", [{"backend": "reference"}, {"dtype": "float16"}], ids=["reference", "float16"]
)
def test_other_backends_refuse(tiny_checkpoint: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"does not promise equal bits.*backend='native'"):
        Embedder.from_pretrained(tiny_checkpoint, deterministic=True, device="cpu", **wrong)


def test_windows_of_any_forest_are_the_whole() -> None:
    """The windows ask every query once, and each sees what it does in the whole forest."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        count = int(rng.integers(1, 8))
        queries = rng.integers(1, 30, count)
        resident = int(rng.integers(0, count))
        lengths = queries.copy()
        queries[:resident] = 0
        parent = np.array([rng.integers(-1, s) if s else -1 for s in range(count)], np.int32)
        forest = Forest(
            np.cumsum([0, *queries]).astype(np.int32),
            np.cumsum([0, *lengths]).astype(np.int32),
            parent,
        )
        total, keys = int(queries.sum()), int(lengths.sum())
        q, k, v = (
            torch.from_numpy(rng.standard_normal((n, 2, 8))).float() for n in (total, keys, keys)
        )
        whole = Ops.attention(q, k, v, forest, causal=True, scale=0.3)
        seen = forest.visible()
        limits = PieceLimits(int(rng.integers(1, 40)), int(rng.integers(1, 600)), 1)
        windows = cut_windows(forest, limits)
        if not windows:
            assert total <= limits.rows and seen.sum() <= limits.pairs
            continue
        covered = 0
        for window in windows:
            rows, own = window.rows, window.forest
            assert rows.start == covered
            covered = rows.stop
            length = rows.stop - rows.start
            assert length <= limits.rows
            assert length == 1 or seen[rows].sum() <= limits.pairs
            most = int(own.cu_k[-1])
            part = Ops.attention(q[rows], k[:most], v[:most], own, causal=True, scale=0.3)
            torch.testing.assert_close(part, whole[rows], atol=1e-5, rtol=1e-5)
        assert covered == total


@pytest.mark.parametrize(
    ("frames_of", "most", "expected"),
    [
        ([4], 4, []),
        ([4, 4], 8, []),
        ([4, 4, 4], 8, [[4, 4], [4]]),
        ([9, 1, 1, 9], 4, [[9], [1, 1], [9]]),
        ([3, 3, 2, 8], 8, [[3, 3, 2], [8]]),
    ],
)
def test_frames_in_groups(frames_of: list[int], most: int, expected: list[list[int]]) -> None:
    windows = group_frames(frames_of, most)
    assert [np.diff(w.forest.cu_q).tolist() for w in windows] == expected
    ends = np.cumsum([0, *map(sum, expected)]).tolist()
    assert [(w.rows.start, w.rows.stop) for w in windows] == list(pairwise(ends))
