"""What is kept from batch to batch: found again exactly, within its bytes, and results unmoved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlfast import Embedder, Reranker
from qvlfast.batch import PieceLimits
from qvlfast.cache import PrefixCache, VisionCache
from qvlfast.plan import Plan, plan_shared
from qvlfast.sharing import Keys, Numbers
from tests.samples import frames, picture
from tests.stand_in import forget_answers

# The same sums in blocks of other sizes: see test_parity.test_any_order_and_grouping.
TOLERANCE = 1e-5

# A batch is a few prompts; a run is a few batches. Two symbols make common beginnings frequent,
# and the factor makes them long enough to be worth a segment.
batches = st.lists(
    st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=7).map(lambda x: np.repeat(x, 4)),
        min_size=1,
        max_size=5,
    ),
    max_size=8,
)


def layers_of(tokens: np.ndarray, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Stand-ins for keys and values, that tell which token they are of and where."""
    values = torch.from_numpy(1000.0 * tokens + start + np.arange(len(tokens))).float()
    return [(values[:, None, None], -values[:, None, None])]


def run(keys: list[np.ndarray], cache: PrefixCache) -> tuple[Plan, int]:
    """Plan a batch, check it against the prompts, and keep what it says; what was computed."""
    prompts = [Keys.of(own) for own in keys]
    plan = plan_shared(prompts, cache)
    there = len(plan.resident)
    for prompt, own in enumerate(keys):
        parts: list[torch.Tensor] = []
        segment = plan.last[prompt] + there
        stop = len(own)
        while segment >= 0:
            if segment >= there:
                part = plan.segments[segment - there]
                assert part.stop == stop > part.start and part.parent < segment
                parts.append(layers_of(keys[part.prompt], 0)[0][0][part.start : part.stop, 0, 0])
                stop, segment = part.start, part.parent
            else:
                resident = plan.resident[segment]
                assert resident.parent < segment
                ((k, v),) = resident.layers
                assert len(k) == resident.length and torch.equal(k, -v)
                parts.append(k[:, 0, 0])
                stop, segment = stop - resident.length, resident.parent
        assert stop == 0 and torch.equal(torch.cat(parts[::-1]), layers_of(own, 0)[0][0][:, 0, 0])
        assert plan.last[prompt] >= 0 and plan.segments[plan.last[prompt]].stop == len(own)
    for index in plan.keep:
        s = plan.segments[index]
        kept = layers_of(keys[s.prompt][s.start : s.stop], s.start)
        cache.insert(prompts[s.prompt], s.start, s.stop, kept)
    check(cache)
    return plan, sum(s.stop - s.start for s in plan.segments)


def check(cache: PrefixCache) -> None:
    nodes = list(cache._nodes)
    assert cache.counts.bytes == sum(node.bytes for node in nodes) <= cache.budget
    assert cache.counts.entries == len(nodes)
    for node in nodes:
        siblings = cache._root if node.parent is None else node.parent.children
        assert siblings[int(node.tokens[0])] is node
        assert node.parent is None or (node.parent.stop == node.start and node.parent in nodes)
        # No view keeps more memory alive than is counted.
        assert all(t.untyped_storage().nbytes() == t.nbytes for kv in node.layers for t in kv)


@given(batches, st.sampled_from([0, 300, 1000, 1 << 20]))
def test_every_plan_is_its_prompts(run_of: list[list[np.ndarray]], budget: int) -> None:
    cache = PrefixCache(budget)
    for keys in run_of:
        _, computed = run(keys, cache)
        assert computed <= sum(map(len, keys))
    assert budget or not cache.counts.entries


def test_a_beginning_is_kept_once_two_prompts_had_it() -> None:
    cache = PrefixCache(1 << 20)
    start = np.arange(100, 120)
    one, two, three = (np.append(start, [i, i, i]) for i in range(3))
    assert run([one], cache)[1] == 23 and cache.counts.entries == 0
    assert run([two], cache)[1] == 23 and cache.counts.entries == 1
    assert run([three], cache)[1] == 3
    assert (cache.counts.hits, cache.counts.misses) == (1, 2)
    # A longer one below it, shared within a batch.
    longer = np.append(start, np.arange(10))
    run([np.append(longer, 70), np.append(longer, 71)], cache)
    assert run([np.append(longer, 72)], cache)[1] == 1
    # One that leaves it half-way cuts it in two.
    run([np.append(start[:12], 80), np.append(start[:12], 81)], cache)
    assert run([np.append(longer, 73)], cache)[1] == 1


def test_a_prompt_known_in_full_still_computes_its_last_token() -> None:
    cache = PrefixCache(1 << 20)
    whole = np.arange(40)
    run([np.append(whole, 50), np.append(whole, 51)], cache)
    plan, computed = run([whole, whole, whole[:30]], cache)
    assert computed == 2 and plan.last[0] == plan.last[1] != plan.last[2]


def test_the_least_recently_used_leaf_goes_first() -> None:
    start = np.arange(100, 110)
    line = [np.concatenate((start, np.repeat(i, 10))) for i in range(4)]
    size = 10 * 8 + 2 * 10 * 4
    cache = PrefixCache(3 * size)
    for own in line[:2]:  # the common start, and two that continue it
        run([np.append(own, 7), np.append(own, 8)], cache)
    assert cache.counts.entries == 3
    run([np.append(line[0], 9)], cache)  # used again: the other one is the oldest
    run([np.append(line[2], 7), np.append(line[2], 8)], cache)
    assert cache.counts.evictions == 1
    assert [cache.match(Keys.of(own))[1] for own in line] == [20, 10, 20, 10]


def test_pictures_are_told_apart_for_as_long_as_they_are_known() -> None:
    numbers = Numbers()
    first, second = numbers.of(b"a"), numbers.of(b"b")
    assert numbers.of(b"a") is first and first.value != second.value
    value = second.value
    del second
    assert numbers.of(b"b").value not in (first.value, value)


def rows(value: float, count: int = 4) -> list[torch.Tensor]:
    return [torch.full((count, 2), value), torch.full((count, 2), -value)]


SIZE = 2 * 4 * 2 * 4


def test_pictures_used_again_outlive_those_used_once() -> None:
    cache = VisionCache(4 * SIZE)
    for name in (b"a", b"b"):
        assert cache.get(name) is None
        cache.put(name, rows(1.0))
    assert torch.equal(cache.get(b"a"), torch.stack(rows(1.0)))
    for i in range(20):  # a long run of pictures that do not come back
        cache.put(b"%d" % i, rows(2.0))
        assert cache.counts.bytes == min(i + 3, 4) * SIZE
    assert cache.get(b"a") is not None and cache.get(b"b") is None
    assert cache.counts.evictions == 18 and cache.counts.entries == 4


def test_protected_pictures_make_room_in_the_end() -> None:
    cache = VisionCache(4 * SIZE)
    for name in (b"a", b"b", b"c", b"d"):
        cache.put(name, rows(1.0))
        cache.get(name)
    for name in (b"e", b"f", b"g"):
        cache.put(name, rows(1.0))
        cache.get(name)
    assert cache.get(b"a") is None and cache.get(b"g") is not None
    assert cache.counts.bytes == 4 * SIZE
    assert cache._protected == sum(t.nbytes for t in cache._again.values())


def test_what_does_not_fit_is_not_kept() -> None:
    cache = VisionCache(SIZE)
    cache.put(b"a", rows(1.0))
    cache.put(b"big", rows(1.0, count=5))
    assert cache.get(b"a") is not None and cache.get(b"big") is None
    assert VisionCache(0).get(b"a") is None


def inputs() -> list[Any]:
    photo, film = picture(96, 64), frames(4, 64, 64)
    return [
        "a text",
        "a text that goes on",
        {"text": "a text that goes on", "instruction": "Find what is like it"},
        {"text": "another", "instruction": "Find what is like it"},
        {"image": photo},
        {"image": photo, "text": "with a caption"},
        {"image": [photo, picture(96, 64, seed=1)], "text": "x"},
        {"video": film, "text": "moving"},
        {"video": film},
        "a text",
    ]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> np.ndarray:
    """Vectors with nothing shared and nothing kept."""
    off = {"share_prefixes": False, "cache_bytes": 0, "vision_cache_bytes": 0}
    with Embedder.from_pretrained(tiny_checkpoint, **off) as embedder:
        return embedder.encode(inputs())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_bytes": 0},
        {"vision_cache_bytes": 0},
        {"share_prefixes": False},
        {"cache_bytes": 40_000, "vision_cache_bytes": 20_000},  # things come and go
    ],
    ids=str,
)
def test_vectors_do_not_change(
    tiny_checkpoint: Path, expected: np.ndarray, options: dict[str, Any]
) -> None:
    """To the bit: the native backend is deterministic always."""
    items = inputs()
    with Embedder.from_pretrained(tiny_checkpoint, **options) as embedder:
        for batch_tokens in (None, 60, 1):
            forget_answers(embedder)
            assert np.array_equal(embedder.encode(items, batch_tokens=batch_tokens), expected)
        metrics = embedder.metrics()
        if not options:
            assert metrics.prefix_cache.hits and metrics.vision_cache.hits
            assert metrics.tokens_computed < 0.7 * metrics.tokens
            assert metrics.patches_computed < 0.3 * metrics.patches
            assert metrics.tokens_cached > 0 and set(metrics.errors) == set()


def test_the_reference_backend_agrees(tiny_checkpoint: Path, expected: np.ndarray) -> None:
    items = inputs()
    with Embedder.from_pretrained(tiny_checkpoint, backend="reference") as embedder:
        for batch_tokens in (None, 1):
            forget_answers(embedder)
            got = embedder.encode(items, batch_tokens=batch_tokens)
            assert np.abs(got - expected).max() < TOLERANCE
        assert embedder.metrics().prefix_cache.hits and embedder.metrics().vision_cache.hits


@pytest.mark.slow
def test_the_triton_backend_agrees(tiny_checkpoint: Path) -> None:
    """With resident segments and in small pieces, in Triton's interpreter."""
    items = ["a text", "a text that", {"image": picture(32, 32)}]
    with (
        Embedder.from_pretrained(tiny_checkpoint, device="cpu", backend="triton") as embedder,
        Embedder.from_pretrained(tiny_checkpoint, share_prefixes=False) as plain,
    ):
        embedder._runtime.served.runner._limits = PieceLimits(rows=12, pairs=300, patches=4)
        for batch_tokens in (None, 1):
            forget_answers(embedder)
            got = embedder.encode(items, batch_tokens=batch_tokens)
            assert np.abs(got - plain.encode(items)).max() < TOLERANCE
        assert embedder.metrics().prefix_cache.hits and embedder.metrics().vision_cache.hits


def test_a_rerank_query_is_there_for_the_next_call(tiny_checkpoint: Path) -> None:
    query = {"text": "which of these", "image": picture(128, 128)}
    documents, others = ([f"{kind} {i}" for i in range(4)] for kind in ("document", "another"))
    with (
        Reranker.from_pretrained(tiny_checkpoint) as on,
        Reranker.from_pretrained(
            tiny_checkpoint, share_prefixes=False, vision_cache_bytes=0
        ) as off,
    ):
        assert on.rank(query, documents) == off.rank(query, documents)
        before = on.metrics()
        assert on.rank(query, others) == off.rank(query, others)
        after = on.metrics()
        assert after.patches_computed == before.patches_computed == 64
        prompt = len(on._prepare_pair((query, documents[0]), None).ids)
        assert after.tokens_computed - before.tokens_computed < prompt


def test_pictures_of_a_call_can_stay_out_of_the_cache(tiny_checkpoint: Path) -> None:
    with Embedder.from_pretrained(tiny_checkpoint, cache_bytes=0) as embedder:
        private = embedder.encode(picture(64, 64), vision_cache=False)
        assert embedder.metrics().vision_cache.entries == 0
        assert np.array_equal(embedder.encode(picture(64, 64)), private)
        assert embedder.metrics().vision_cache.entries == 1
        embedder.encode(picture(64, 64), vision_cache=False)
        assert embedder.metrics().vision_cache.hits == 0


@pytest.mark.parametrize("name", ["cache_bytes", "vision_cache_bytes"])
def test_bad_budgets(tiny_checkpoint: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1: use a whole number from 0 up"):
        Embedder.from_pretrained(tiny_checkpoint, **{name: -1})
