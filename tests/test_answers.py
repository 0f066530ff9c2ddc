"""Answers kept across batches: the same values, for equal prompts only, and nothing computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvlfast import Embedder, Reranker
from qvlfast.cache import AnswerCache
from qvlfast.errors import InputError
from qvlfast.lane import Planned
from qvlfast.pixels import Patches
from qvlfast.prompt import Prompt
from qvlfast.request import DEFAULT_TERMS, Terms
from qvlfast.runner import Sharing
from tests.samples import picture
from tests.stand_in import Serving, prompt, until

SHARING = Sharing(prefixes=True, cache_bytes=1 << 20, vision_cache_bytes=1 << 20)
ENTRY = 256  # bytes beside the answer's own


@pytest.fixture
def serving() -> Iterator[Serving]:
    made = Serving(sharing=SHARING)
    yield made
    made.close()


def pictured(*ids: int, shade: int, place: int = 0) -> Prompt:
    """A picture of one visual token, which stands at ``place``."""
    patches = Patches(np.full((4, 12), shade, np.uint8), (1, 2, 2), 1)
    whole = prompt(*ids)
    return Prompt(whole.ids, whole.positions, (patches,), np.array([place], np.int32))


def ask(serving: Serving, asked: Prompt, terms: Terms = DEFAULT_TERMS) -> float:
    return float(serving.submit(lambda: asked, terms).result(10).value[0])


def test_vectors_and_scores_come_back_as_copies() -> None:
    cache = AnswerCache(1 << 10)
    row = np.arange(3, dtype=np.float32)
    for name, value in ((b"vector", row), (b"score", np.float32(0.25))):
        assert cache.get(name) is None
        cache.put(name, value)
    row += 100
    first = cache.get(b"vector")
    assert first is not None and first.tolist() == [0, 1, 2]
    first += 100
    again, score = cache.get(b"vector"), cache.get(b"score")
    assert again is not None and again.tolist() == [0, 1, 2]
    assert score is not None and score.shape == () and score.dtype == np.float32
    assert (cache.counts.hits, cache.counts.misses, cache.counts.entries) == (3, 2, 2)
    assert cache.counts.bytes == 12 + 4 + 2 * ENTRY
    cache.clear()
    assert cache.get(b"vector") is None and cache.counts.bytes == cache.counts.entries == 0


def test_answers_that_are_not_finite_are_not_kept() -> None:
    cache = AnswerCache(1 << 10)
    cache.put(b"vector", np.array([1, np.inf], np.float32))
    cache.put(b"score", np.float32(np.nan))
    assert cache.counts.entries == 0


def test_small_answers_do_not_take_more_than_the_budget() -> None:
    """The bytes of a score are the least of what it takes."""
    cache = AnswerCache(10 * (ENTRY + 4) + 3)
    for i in range(50):
        cache.put(b"%d" % i, np.float32(i))
    assert (cache.counts.entries, cache.counts.evictions) == (10, 40)
    assert cache.counts.bytes <= cache.budget
    assert cache.get(b"39") is None and cache.get(b"40") == 40
    cache.put(b"large", np.zeros(1000, np.float32))
    assert cache.get(b"large") is None and cache.counts.entries == 10
    for i in range(100, 150):  # a long run of what never comes back
        cache.put(b"%d" % i, np.float32(i))
    assert cache.get(b"40") == 40 and cache.get(b"41") is None


def test_a_digest_is_that_of_the_whole_prompt() -> None:
    different = [
        prompt(1, 2, 3),
        prompt(1, 2),
        prompt(1, 2, 4),
        pictured(1, 2, 3, shade=0),
        pictured(1, 2, 3, shade=1),
        pictured(1, 2, 3, shade=0, place=1),
    ]
    assert len({p.digest for p in different}) == len(different)
    assert prompt(1, 2, 3).digest == different[0].digest
    assert pictured(1, 2, 3, shade=1).digest == different[4].digest


def test_a_known_prompt_is_not_computed_again(serving: Serving) -> None:
    for _ in range(3):
        assert ask(serving, prompt(1, 2, 3)) == 3
        assert ask(serving, pictured(1, 2, 4, shade=5)) == 4
        gc.collect()  # nobody holds the picture but the cache
    assert serving.model.begun == [[3], [4]]
    metrics = serving.metrics()
    assert (metrics.answered, metrics.batches) == (6, 2)
    assert (metrics.tokens, metrics.tokens_computed, metrics.tokens_cached) == (18, 6, 12)
    assert (metrics.patches, metrics.patches_computed) == (12, 4)
    counts = metrics.answer_cache
    assert (counts.hits, counts.misses, counts.entries) == (4, 2, 2)
    assert counts.bytes == 2 * (12 + ENTRY)


def test_a_batch_runs_without_what_is_known(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its speed is that of what ran."""
    finished: list[Planned[Any]] = []
    usual = serving.engine._scheduler.finished

    def note(batch: Planned[Any], now: float, seconds: float) -> None:
        finished.append(batch)
        usual(batch, now, seconds)

    monkeypatch.setattr(serving.engine._scheduler, "finished", note)
    assert ask(serving, prompt(*range(10))) == 9
    serving.model.gate.clear()
    held = serving.submit(lambda: prompt(50))
    until(lambda: len(serving.model.begun) == 2)
    asked = [prompt(*range(10)), prompt(60, 61), prompt(*range(10)), prompt(70, 71)]
    futures = [serving.submit(lambda p=p: p) for p in asked]
    until(lambda: serving.metrics().waiting == 4)
    serving.model.gate.set()
    assert [f.result(10).value[0] for f in (held, *futures)] == [50, 9, 61, 9, 71]
    assert sorted(serving.model.begun[2]) == [61, 71]
    serving.close()
    assert [len(batch.jobs) for batch in finished] == [1, 1, 2]
    assert [batch.tokens for batch in finished] == [10, 1, 4]


def test_answers_from_the_cache_say_nothing_about_speed(serving: Serving) -> None:
    assert ask(serving, prompt(*range(10))) == 9
    until(lambda: serving.served.lane.speed > 0)
    rate = serving.served.lane.speed
    for _ in range(20):
        assert ask(serving, prompt(*range(10))) == 9
    serving.close()
    assert serving.served.lane.speed == rate and serving.metrics().batches == 1


def test_failures_are_not_kept(serving: Serving) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="NaN"):
            ask(serving, prompt(800))
        with pytest.raises(RuntimeError, match="bad batch"):
            ask(serving, prompt(900))
    assert serving.model.begun.count([800]) == serving.model.begun.count([900]) == 2
    assert serving.metrics().answer_cache.entries == 0


def test_running_out_of_memory_drops_answers(serving: Serving) -> None:
    assert ask(serving, prompt(1)) == 1
    assert ask(serving, prompt(902)) == 902
    assert serving.metrics().answer_cache.entries == 1
    assert ask(serving, prompt(1)) == 1
    assert serving.model.begun[-1] == [1]


@pytest.mark.parametrize(
    "sharing",
    [
        Sharing(prefixes=False, cache_bytes=1 << 20),
        Sharing(prefixes=True, cache_bytes=0, vision_cache_bytes=1 << 20),
    ],
    ids=["share_prefixes=False", "cache_bytes=0"],
)
def test_off(sharing: Sharing) -> None:
    serving = Serving(sharing=sharing)
    for _ in range(2):
        assert ask(serving, prompt(1, 2)) == 2
    serving.close()
    assert serving.model.begun == [[2], [2]]
    counts = serving.metrics().answer_cache
    assert (counts.hits, counts.misses, counts.entries) == (0, 0, 0)


def test_pictures_of_a_call_can_stay_out(serving: Serving) -> None:
    private = Terms(vision_cache=False)
    for terms in (private, DEFAULT_TERMS, private):
        assert ask(serving, pictured(1, 2, shade=0), terms) == 2
        assert ask(serving, prompt(1, 3), terms) == 3
    # The text is computed once, and the picture of a private call is neither kept nor looked for.
    assert serving.model.begun == [[2], [3], [2], [2]]
    assert serving.metrics().answer_cache.entries == 2


def test_the_budget_is_a_part_of_that_for_beginnings() -> None:
    serving = Serving(sharing=Sharing(prefixes=True, cache_bytes=512 << 20))
    runner: Any = serving.runner
    assert runner._answers.budget == 32 << 20
    assert runner._answers.budget + runner._prefixes.budget == 512 << 20
    serving.close()


def test_vectors_of_every_form(tiny_checkpoint: Path) -> None:
    """An answer is kept for each size that the model was asked for; what a call does with its own
    changes nothing."""
    items = ["a text", {"image": picture(64, 64), "text": "caption"}, "a text that goes on"]
    forms: list[dict[str, Any]] = [
        {},
        {"normalize": False},
        {"dimensions": 16},
        {"dimensions": 16, "normalize": False},
        {"output": "int8"},
        {},
    ]
    known = [0, 0, 0, 1, 2, 3]  # forms so far that were answered from what is kept
    with (
        Embedder.from_pretrained(tiny_checkpoint) as on,
        Embedder.from_pretrained(tiny_checkpoint, cache_bytes=0) as off,
    ):
        for form, hits in zip(forms, known, strict=True):
            got = on.encode(items, **form)
            assert np.array_equal(got, off.encode(items, **form))
            got[:] = 0  # it is the caller's
            metrics = on.metrics()
            assert metrics.answer_cache.hits == hits * len(items)
        assert metrics.answer_cache.entries == 3 * len(items)
        # Other instructions and other pictures are other prompts.
        on.encode("a text", instruction="Find what is like it")
        on.encode({"image": picture(64, 64, seed=1), "text": "caption"})
        assert on.metrics().answer_cache.entries == 3 * len(items) + 2
        assert off.metrics().answer_cache.entries == 0


def test_usage_is_that_of_the_request(tiny_checkpoint: Path) -> None:
    """Texts that are cut to the same tokens have one answer, but lost more or less."""
    with Embedder.from_pretrained(tiny_checkpoint, max_length=60) as embedder:
        with pytest.warns(UserWarning, match="longer than max_length"):
            found = [embedder.encode(["word " * n], details=True) for n in (100, 200)]
        assert embedder.metrics().answer_cache.hits == 1
    assert np.array_equal(found[0].vectors, found[1].vectors)
    short, long = (f.usage[0] for f in found)
    assert short.tokens == long.tokens and short.truncated_tokens < long.truncated_tokens


def test_a_repeated_rerank_call(tiny_checkpoint: Path) -> None:
    query = {"text": "which", "image": picture(64, 64)}
    documents = ["one", "two words", {"image": picture(64, 64)}]
    with (
        Reranker.from_pretrained(tiny_checkpoint) as on,
        Reranker.from_pretrained(tiny_checkpoint, share_prefixes=False) as off,
    ):
        expected = off.rank(query, documents)
        assert on.rank(query, documents) == expected
        computed = on.metrics().tokens_computed
        assert on.rank(query, documents) == expected
        assert on.rank(query, documents[::-1])[0]["score"] == expected[0]["score"]
        assert on.predict((query, "one")) == off.predict((query, "one"))
        metrics = on.metrics()
        assert metrics.tokens_computed == computed
        assert (metrics.answer_cache.hits, metrics.answer_cache.entries) == (7, 3)
        on.rank("another query", documents[:1])
        assert on.metrics().tokens_computed > computed
