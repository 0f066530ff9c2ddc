"""The whole forward pass against transformers' own model, live, on prompts of every kind.

Random checkpoints of odd shapes, one with rope spelled each way, tied and not, in one shard and
in three. The prompts themselves are held to the reference by ``test_goldens.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.checkpoints import write_checkpoint
from qvlfast import Embedder, Reranker
from qvlfast.prompt import Prompt
from tests.reference import load_reference, reference_scores, reference_vectors
from tests.samples import Film, frames, picture, write_film

# Two float32 implementations that sum in different orders agree to about 5e-6 on these
# checkpoints; an error in any part of the model shows as 1e-3 or more.
TOLERANCE = 1e-4

SIZES = [
    (32, 32), (64, 32), (32, 64), (31, 33), (1, 1), (2, 3), (100, 20), (20, 100), (200, 1),
    (1, 200), (640, 32), (32, 640), (123, 457), (457, 123), (48, 48), (80, 80), (96, 160),
    (160, 96), (50, 49), (17, 300), (300, 17), (224, 224), (90, 130), (130, 90), (64, 64),
    (65, 65), (95, 97), (33, 120), (256, 128), (128, 256), (70, 210), (5, 900),
]  # fmt: skip
MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr"]


@dataclass
class Pair:
    """One checkpoint in this package, as both classes, and in transformers."""

    embedder: Embedder
    reranker: Reranker
    reference: Any

    def prompts(self, items: list[Any]) -> list[Prompt]:
        return [self.embedder._prepare(item, None) for item in items]

    def check(self, items: list[Any]) -> None:
        got = self.embedder.encode(items)
        expected = reference_vectors(self.reference, self.prompts(items))
        distance = np.linalg.norm(got - expected, axis=1)
        assert distance.max() < TOLERANCE, dict(enumerate(distance.tolist()))


def load_pair(folder: Path, dtype: str = "float32") -> Pair:
    return Pair(
        Embedder.from_pretrained(folder, dtype=dtype),
        Reranker.from_pretrained(folder, dtype=dtype),
        load_reference(folder, getattr(torch, dtype)),
    )


@pytest.fixture(scope="module", params=["tiny", "odd"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = load_pair(request.getfixturevalue(f"{request.param}_checkpoint"))
    with made.embedder, made.reranker:
        yield made


@pytest.fixture(scope="module")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "film.mp4"
    write_film(path, Film(width=192, height=128, count=70, fps=Fraction(24)))
    return path


def test_texts(pair: Pair) -> None:
    pair.check(
        [
            "a",
            "",
            "A woman playing with her dog on a beach at sunset.",
            "海辺で犬と遊ぶ女性",
            "🐕‍🦺🏖️",
            "word " * 700,
            {"text": "the same text", "instruction": "Retrieve pictures of it"},
            {"text": ["several", "texts", ""]},
            {},
        ]
    )


def test_pictures_of_many_shapes_and_modes(pair: Pair) -> None:
    items = [
        {"image": picture(w, h, MODES[i % len(MODES)], seed=i)} for i, (w, h) in enumerate(SIZES)
    ]
    pair.check(items)


def test_several_pictures_and_text(pair: Pair) -> None:
    pair.check(
        [
            {"image": [picture(90, 60), picture(60, 200, seed=1), picture(33, 33, seed=2)]},
            {"image": [picture(90, 60)], "text": ["before", "after"]},
            {"image": picture(400, 300), "text": "caption", "instruction": "Find the picture."},
        ]
    )


def test_videos(pair: Pair, video_file: Path) -> None:
    pair.check(
        [
            {"video": frames(4, 96, 64)},
            {"video": frames(5, 64, 128)},
            {"video": video_file},
            {"video": video_file, "fps": 4.0, "max_frames": 6},
            {
                "video": [video_file, frames(2, 64, 64)],
                "image": picture(70, 90),
                "text": "all at once",
            },
        ]
    )


def test_scores(pair: Pair, video_file: Path) -> None:
    query = {"text": "the query", "image": picture(64, 96)}
    documents: list[Any] = [
        "a text",
        picture(120, 80, seed=3),
        {"text": "captioned", "image": picture(50, 50, seed=4)},
        {"video": video_file, "max_frames": 4},
        {"video": frames(2, 64, 64), "text": "moving"},
        {},
        "",
    ]
    instruction = "Retrieve what shows the same thing"
    ranked = pair.reranker.rank(query, documents, instruction)
    got = np.empty(len(documents), dtype=np.float32)
    got[[r["index"] for r in ranked]] = [r["score"] for r in ranked]
    prompts = [pair.reranker._prepare_pair((query, d), instruction) for d in documents]
    token_id = pair.reranker._runtime.prompter.token_id
    expected = reference_scores(pair.reference, prompts, (token_id("yes"), token_id("no")))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert np.ptp(expected) > 0.01


def test_any_order_and_grouping(pair: Pair, video_file: Path) -> None:
    items: list[Any] = [
        "short",
        {"image": picture(100, 70)},
        {"video": frames(4, 64, 64), "text": "x"},
        "longer " * 60,
        {"image": [picture(40, 40), picture(80, 40)], "text": "y"},
        {},
    ]
    together = pair.embedder.encode(items)
    single = np.stack([pair.embedder.encode(item) for item in items])
    # One float32 sum in another order moves a vector by about 1e-6.
    assert np.abs(together - single).max() < 1e-5
    order = np.random.default_rng(0).permutation(len(items))
    shuffled = pair.embedder.encode([items[i] for i in order], batch_tokens=100)
    assert np.abs(shuffled - together[order]).max() < 1e-5


@pytest.mark.slow
def test_32k_tokens(tiny_checkpoint: Path) -> None:
    reference = load_reference(tiny_checkpoint, torch.float32)
    with Embedder.from_pretrained(tiny_checkpoint, max_length=40_000) as embedder:
        item = "many different words make " * 8000
        encoded = embedder.encode(item, details=True)
        assert encoded.usage[0].tokens > 32_000
        expected = reference_vectors(reference, [embedder._prepare(item, None)])[0]
    assert np.linalg.norm(encoded.vectors - expected) < TOLERANCE


@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_bfloat16_is_no_further_from_the_truth(tmp_path: Path, shape: str) -> None:
    """The truth is float32 arithmetic on the same bfloat16 weights."""
    folder = write_checkpoint(tmp_path / "model", shape, dtype="bfloat16")
    items: list[Any] = [f"text number {i} " * (i + 1) for i in range(12)]
    items += [{"image": picture(64 + 9 * i, 48 + 7 * i, seed=i), "text": "t"} for i in range(12)]
    with Embedder.from_pretrained(folder) as embedder:
        prompts = [embedder._prepare(item, None) for item in items]
        ours = embedder.encode(items)
    truth = reference_vectors(load_reference(folder, torch.float32), prompts)
    theirs = reference_vectors(load_reference(folder, torch.bfloat16), prompts)
    our_error = np.linalg.norm(ours - truth, axis=1)
    their_error = np.linalg.norm(theirs - truth, axis=1)
    assert our_error.mean() <= their_error.mean()
    assert our_error.max() <= 1.5 * their_error.max()
