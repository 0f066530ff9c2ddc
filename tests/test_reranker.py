"""What a user of ``Reranker`` sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvlfast import BatchError, InputError, Reranker, TruncationWarning
from tests.samples import picture

DOCUMENTS: list[Any] = ["a cat", {"text": "a dog"}, picture(64, 40), {"image": picture(40, 64)}]


@pytest.fixture(scope="module")
def reranker(tiny_checkpoint: Path) -> Iterator[Reranker]:
    with Reranker.from_pretrained(tiny_checkpoint) as made:
        yield made


def test_rank_is_sorted_and_complete(reranker: Reranker) -> None:
    ranked = reranker.rank("a pet", DOCUMENTS)
    scores = [r["score"] for r in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    assert sorted(r["index"] for r in ranked) == [0, 1, 2, 3]
    assert all(set(r) == {"index", "score"} for r in ranked)
    best = reranker.rank("a pet", DOCUMENTS, top_k=2)
    assert [r["index"] for r in best] == [r["index"] for r in ranked[:2]]
    with_documents = reranker.rank("a pet", DOCUMENTS, return_documents=True)
    assert all(r["document"] is DOCUMENTS[r["index"]] for r in with_documents)


def test_predict_equals_rank(reranker: Reranker) -> None:
    scores = reranker.predict([("a pet", d) for d in DOCUMENTS])
    assert scores.shape == (4,) and scores.dtype == np.float32
    for r in reranker.rank("a pet", DOCUMENTS):
        assert abs(scores[r["index"]] - r["score"]) < 1e-6
    single = reranker.predict(("a pet", "a cat"))
    assert isinstance(single, float) and abs(single - scores[0]) < 1e-6
    assert reranker.predict([]).shape == (0,)


def test_official_method(reranker: Reranker) -> None:
    inputs = {
        "instruction": "Find the pet",
        "query": {"text": "a pet"},
        "documents": [{"text": "a cat"}, {"image": picture(64, 40)}],
        "fps": 1.0,
        "max_frames": 64,
    }
    scores = reranker.process(inputs)
    expected = reranker.predict(
        [("a pet", "a cat"), ("a pet", picture(64, 40))], instruction="Find the pet"
    )
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert all(isinstance(score, float) for score in scores)
    assert reranker.process({**inputs, "query": {}}) == []
    assert reranker.process({"query": {"text": "a"}}) == []
    with pytest.raises(InputError, match="querry"):
        reranker.process({"querry": {}})


@pytest.mark.parametrize("query", [None, "", {}])
def test_an_empty_query_gives_an_empty_list(reranker: Reranker, query: Any) -> None:
    assert reranker.rank(query, DOCUMENTS) == []
    assert reranker.rank("a", []) == []


def test_instructions(reranker: Reranker) -> None:
    pair = ("a pet", "a cat")
    default = reranker.predict(pair)
    task = reranker.predict(pair, "Find the pet")
    assert abs(default - task) > 1e-5
    own = reranker.predict(({"text": "a pet", "instruction": "Find the pet"}, "a cat"), "Other")
    assert abs(own - task) < 1e-6
    with pytest.raises(InputError, match="a document has no instruction"):
        reranker.predict(("a", {"text": "b", "instruction": "c"}))


def test_bad_documents_cost_no_others(reranker: Reranker) -> None:
    documents = ["a cat", {"image": "nowhere.png"}, "a dog", 5]
    with pytest.raises(BatchError) as caught:
        reranker.rank("a pet", documents)
    assert set(caught.value.errors) == {1, 3}
    ranked = reranker.rank("a pet", documents, on_error="return")
    assert [r["index"] for r in ranked[2:]] == [1, 3]
    assert all(math.isnan(r["score"]) and "error" in r for r in ranked[2:])
    good = {r["index"]: r["score"] for r in reranker.rank("a pet", ["a cat", "a dog"])}
    assert abs(ranked[0]["score"] - max(good.values())) < 1e-6
    scored = reranker.predict([("a pet", d) for d in documents], on_error="return")
    assert np.isnan(scored.vectors[[1, 3]]).all() and set(scored.errors) == {1, 3}


def test_a_bad_query_is_its_own_error(reranker: Reranker) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png"):
        reranker.rank({"image": "nowhere.png"}, DOCUMENTS)


@pytest.mark.parametrize("pair", ["text", ("a",), ("a", "b", "c"), 5, None])
def test_bad_pairs(reranker: Reranker, pair: Any) -> None:
    scored = reranker.predict([("a", "b"), pair], on_error="return")
    assert "expected (query, document)" in str(scored.errors[1])
    assert np.isfinite(scored.vectors[0])


def test_truncation_cuts_the_document(tiny_checkpoint: Path) -> None:
    with (
        Reranker.from_pretrained(tiny_checkpoint, max_length=120) as reranker,
        pytest.warns(TruncationWarning, match="1 of 2"),
    ):
        reranker.rank("query", ["short", "long " * 500])
    with (
        Reranker.from_pretrained(tiny_checkpoint, max_length=20) as reranker,
        pytest.raises(InputError, match="max_length 20"),
    ):
        reranker.predict(("query", "document"))


def test_instructions_are_texts(reranker: Reranker) -> None:
    wrong: Any = 0
    with pytest.raises(InputError, match="the instruction is an int"):
        reranker.rank("a", DOCUMENTS, wrong)
    with pytest.raises(InputError, match="the instruction is an int"):
        reranker.predict([("a", "b")], wrong)


def test_top_k_must_be_positive(reranker: Reranker) -> None:
    with pytest.raises(ValueError, match="top_k is 0"):
        reranker.rank("a", DOCUMENTS, top_k=0)
    wrong: Any
    for wrong in (1.5, True, "1"):
        with pytest.raises(TypeError, match=f"top_k is {wrong!r}"):
            reranker.rank("a", DOCUMENTS, top_k=wrong)
