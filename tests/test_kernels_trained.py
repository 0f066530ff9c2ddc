"""The trained models through Triton's interpreter: the same answers, not only small distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from qvlfast.kernels.common import LAUNCHES

from qvlfast import Embedder, Reranker
from qvlfast.gallery import EMBEDDER, RERANKER, load_gallery
from qvlfast.ops import Ops

# Two float32 implementations that add in different orders.
TOLERANCE = 1e-5
PICTURES = [
    next(e.picture() for e in load_gallery() if e.character == character) for character in "🍕🐟🚲"
]
FRAMES = [PICTURES[0], PICTURES[0], PICTURES[1], PICTURES[1]]
QUERIES = ["pizza", "Fisch", "bicycle"]
ITEMS: list[Any] = [*QUERIES, *({"image": p} for p in PICTURES), {"video": FRAMES}]
KERNELS = {name for name, entry in vars(Ops).items() if isinstance(entry, staticmethod)}
KERNELS -= {"prepare", "add_linear"}
FORMS: list[tuple[str, str | None]] = [
    ("float32", None),
    ("bfloat16", None),
    ("float32", "int8"),
    ("float32", "fp8"),
]


def vectors(backend: str, dtype: str, form: str | None) -> np.ndarray:
    with Embedder.from_pretrained(
        EMBEDDER, device="cpu", backend=backend, dtype=dtype, quantization=form
    ) as embedder:
        return embedder.encode(ITEMS)


def logits(backend: str, dtype: str, form: str | None) -> np.ndarray:
    """Scores before the sigmoid, which hides what is far from a half: ``[queries, pictures]``."""
    with Reranker.from_pretrained(
        RERANKER, device="cpu", backend=backend, dtype=dtype, quantization=form
    ) as reranker:
        pairs: list[Any] = [(q, {"image": p}) for q in QUERIES for p in PICTURES]
        scores = np.array(reranker.predict(pairs), np.float64)
    return np.log(scores / (1 - scores)).reshape(len(QUERIES), -1)


def compare(
    run: Callable[[str, str, str | None], np.ndarray], dtype: str, form: str | None, most: float
) -> tuple[np.ndarray, set[str]]:
    """The answers, which must be the reference's: to rounding in float32, and else no more than
    ``most`` times as far from the truth, which is float32, as the reference is."""
    LAUNCHES.clear()
    got = run("triton", dtype, form)
    launched = set(LAUNCHES)
    truth = run("reference", "float32", None)
    if (dtype, form) == ("float32", None):
        np.testing.assert_allclose(got, truth, atol=TOLERANCE * np.abs(truth).max())
    else:
        allowed = np.abs(run("reference", dtype, form) - truth).mean()
        assert 0 < np.abs(got - truth).mean() <= most * allowed
    return got, launched


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_the_embedder_finds_the_same_pictures(dtype: str, form: str | None) -> None:
    count = len(QUERIES)
    # A thousand values, over which chance evens out.
    got, launched = compare(vectors, dtype, form, 1.25)
    found = got[:count] @ got[count : 2 * count].T
    assert found.argmax(axis=1).tolist() == list(range(count))
    expected = KERNELS - {"score"}
    if form is not None:
        expected |= {f"linear_{form}", f"gated_linear_{form}", "quantise_rows"}
        expected -= {"gated_linear"}
    assert launched == expected, "an op was computed by something else"


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_the_reranker_prefers_the_same_pictures(dtype: str, form: str | None) -> None:
    # Nine values, of which rounding moves some ten times as far as others.
    got, launched = compare(logits, dtype, form, 2.0)
    assert got.argmax(axis=1).tolist() == list(range(len(QUERIES)))
    assert "score" in launched and "pool" not in launched
