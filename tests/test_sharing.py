"""Common beginnings: the tree is right for any set of prompts, and results do not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlfast import Embedder, Reranker
from qvlfast.batch import pack
from qvlfast.cost import Budget, Cost
from qvlfast.scheduler import Scheduler
from qvlfast.sharing import Keys, Tree, no_sharing, prefix_tree
from tests.samples import frames, picture

CPU = torch.device("cpu")
# The same sums in blocks of other sizes: see test_parity.test_any_order_and_grouping.
TOLERANCE = 1e-5

# Two symbols and short lengths, so that most sets have beginnings, duplicates and prefixes in
# common; the factor makes shared runs long enough to be worth a segment.
sequences = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=7).map(lambda x: np.repeat(x, 5)), max_size=12
)


def tree_of(keys: list[np.ndarray]) -> Tree:
    return prefix_tree([Keys.of(own) for own in keys])


def unfold(tree: Tree, keys: list[np.ndarray], prompt: int) -> np.ndarray:
    """The tokens of a prompt, read from its last segment up to the root."""
    parts = []
    segment = tree.last[prompt]
    while segment >= 0:
        s = tree.segments[segment]
        parts.append(keys[s.prompt][s.start : s.stop])
        segment = s.parent
    return np.concatenate(parts[::-1])


@given(sequences)
def test_every_prompt_is_a_path_from_a_root(keys: list[np.ndarray]) -> None:
    tree = tree_of(keys)
    for i, own in enumerate(keys):
        assert (unfold(tree, keys, i) == own).all() and len(unfold(tree, keys, i)) == len(own)
    for i, segment in enumerate(tree.segments):
        assert segment.parent < i and segment.stop > segment.start
        if segment.parent >= 0:
            assert tree.segments[segment.parent].stop == segment.start
    computed = sum(s.stop - s.start for s in tree.segments)
    assert computed <= sum(len(k) for k in keys)
    assert len(tree.segments) <= 2 * len(keys)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6).map(np.array), max_size=12))
def test_short_beginnings_are_not_worth_a_segment(keys: list[np.ndarray]) -> None:
    tree = tree_of(keys)
    for i, own in enumerate(keys):
        assert unfold(tree, keys, i).tolist() == own.tolist()


@given(
    st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=12).map(lambda x: np.repeat(x, 3)),
        max_size=14,
    ),
    st.integers(5, 80),
)
def test_no_batch_is_larger_than_the_scheduler_thinks(keys: list[np.ndarray], most: int) -> None:
    """It compares hashes at a few lengths, and must not count on sharing that does not happen."""
    scheduler: Scheduler[Keys] = Scheduler()
    lane = scheduler.add_lane(Budget(tokens=most))
    for own in map(Keys.of, keys):
        lane.admit()
        scheduler.push(lane, own, Cost(len(own.tokens), (), own.prefixes()), 0.0)
    found = 0
    while (batch := scheduler.pop(0.0)) is not None:
        tree = prefix_tree(batch.jobs)
        computed = sum(s.stop - s.start for s in tree.segments)
        assert computed <= batch.tokens
        assert batch.tokens <= most or len(batch.jobs) == 1
        found += len(batch.jobs)
    assert found == len(keys)


def test_equal_prompts_are_one() -> None:
    tree = tree_of([np.arange(30)] * 5)
    assert len(tree.segments) == 1 and set(tree.last) == {0}


def test_thousands_of_nested_prompts() -> None:
    tree = tree_of([np.zeros(10 * n, dtype=np.int64) for n in range(1, 2000)])
    assert len(tree.segments) == 1999
    assert sum(s.stop - s.start for s in tree.segments) == 19_990


def test_without_sharing_each_prompt_is_a_root() -> None:
    tree = no_sharing([3, 1])
    assert [(s.start, s.stop, s.parent) for s in tree.segments] == [(0, 3, -1), (0, 1, -1)]


@pytest.fixture(scope="module")
def embedders(tiny_checkpoint: Path) -> Iterator[tuple[Embedder, Embedder]]:
    with (
        Embedder.from_pretrained(tiny_checkpoint) as sharing,
        Embedder.from_pretrained(tiny_checkpoint, share_prefixes=False) as plain,
    ):
        yield sharing, plain


def inputs() -> list[Any]:
    photo, other, film = picture(96, 64), picture(96, 64, seed=1), frames(4, 64, 64)
    return [
        "a text",
        "a text",
        "a text that goes on",
        {"image": photo},
        {"image": photo.copy(), "text": "caption"},
        {"image": [photo, other]},
        {"image": [other, photo], "text": "the other way round"},
        {"image": [photo, photo]},
        {"video": film},
        {"video": film, "image": photo},
        {"text": "a text", "instruction": "Find it"},
        {},
    ]


def test_vectors_do_not_change(embedders: tuple[Embedder, Embedder]) -> None:
    sharing, plain = embedders
    items = inputs()
    order = np.random.default_rng(0).permutation(len(items))
    got = sharing.encode([items[i] for i in order])
    assert np.abs(got - plain.encode(items)[order]).max() < TOLERANCE


def test_work_is_shared(embedders: tuple[Embedder, Embedder]) -> None:
    embedder = embedders[0]
    prompts = [embedder._prepare(item, None) for item in inputs()]
    shared, plain = (pack(prompts, 2, CPU, share=share) for share in (True, False))
    assert len(shared.batch.ids) < 0.6 * len(plain.batch.ids)
    assert shared.batch.vision is not None and plain.batch.vision is not None
    assert len(plain.batch.vision.stills) == 9 * 24
    assert len(shared.batch.vision.stills) == 2 * 24
    assert len(plain.batch.vision.videos) == 2 * len(shared.batch.vision.videos)
    assert shared.rows[0] == shared.rows[1] and len(plain.batch.read) == len(prompts)
    model = embedder._runtime.model
    results = [model.forward(p.batch)[p.rows] for p in (shared, plain)]
    torch.testing.assert_close(*results, atol=TOLERANCE, rtol=TOLERANCE)


def test_different_pictures_of_one_size_are_not_shared(
    embedders: tuple[Embedder, Embedder],
) -> None:
    embedder = embedders[0]
    prompts = [embedder._prepare({"image": picture(96, 64, seed=i)}, None) for i in range(3)]
    assert all((p.ids == prompts[0].ids).all() for p in prompts)
    packed = pack(prompts, 2, CPU, share=True)
    assert len(set(packed.rows.tolist())) == 3
    assert packed.batch.vision is not None and len(packed.batch.vision.grids) == 3


def test_a_query_with_a_picture_is_computed_once(tiny_checkpoint: Path) -> None:
    query = {"text": "which of these", "image": picture(128, 128)}
    documents: list[Any] = [
        "one",
        "two words",
        picture(64, 64),
        {"text": "and", "image": picture(64, 64)},
    ]
    with (
        Reranker.from_pretrained(tiny_checkpoint) as sharing,
        Reranker.from_pretrained(tiny_checkpoint, share_prefixes=False) as plain,
    ):
        prompts = [sharing._prepare_pair((query, d), None) for d in documents]
        packed = pack(prompts, 2, CPU, share=True).batch
        assert packed.vision is not None
        assert packed.vision.grids == ((1, 8, 8), (1, 4, 4))
        assert len(packed.ids) < 0.5 * sum(len(p.ids) for p in prompts)
        pairs = [(query, d) for d in documents]
        np.testing.assert_allclose(sharing.predict(pairs), plain.predict(pairs), atol=TOLERANCE)
