"""The small models that ship, the data they are judged by, and the arithmetic of the scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import emoji_data, quality
from benchmarks.emoji_data import Wording, read_evaluation, split_wordings
from qvlfast import Embedder, Reranker
from qvlfast.gallery import EMBEDDER, RERANKER, SPRITE_SIZE, Emoji, featured, load_gallery
from tests.reference import load_reference, reference_scores, reference_vectors

# Words that name one thing only, in languages of different scripts.
EASY = {
    "elephant": "🐘",
    "слон": "🐘",
    "香蕉": "🍌",
    "rocket": "🚀",
    "غيتار": "🎸",
    "snowman": "⛄",
}
MODELS = [EMBEDDER, RERANKER]
MOST_PARAMETERS = 4_000_000
MOST_BYTES = 16_000_000


@pytest.fixture(scope="module")
def reranker() -> Iterator[Reranker]:
    with Reranker.from_pretrained(RERANKER, dtype="float32") as model:
        yield model


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with Embedder.from_pretrained(EMBEDDER, dtype="float32") as model:
        yield model


def shown(character: str) -> Emoji:
    return next(emoji for emoji in load_gallery() if emoji.character == character)


def made_up_wordings() -> list[Wording]:
    """Sixty emoji in two languages, each with a name and two keywords of words that recur."""
    made = []
    for language in ("en", "de"):
        for i in range(60):
            made.append(Wording(language, f"{language} name {i}", (i,), is_name=True))
            made.append(Wording(language, f"{language} thing {i}", (i,), is_name=False))
        for i in range(0, 60, 2):
            made.append(Wording(language, f"thing name {language} {i}", (i, i + 1), False))
    return made


def test_the_splits_are_disjoint_and_repeatable() -> None:
    wordings = made_up_wordings()
    splits = split_wordings(wordings)
    assert splits == split_wordings(wordings)
    trained = {w.text.casefold() for w in splits.train}
    assert splits.unseen and splits.pairs
    for wording in (*splits.unseen, *splits.pairs):
        assert wording.text.casefold() not in trained
    assert all(w.text.casefold() in trained for w in splits.seen)
    known = {(w.language, word) for w in splits.train for word in emoji_data.words(w)}
    for wording in splits.unseen:
        assert all((wording.language, word) in known for word in emoji_data.words(wording))


def test_another_seed_gives_other_splits() -> None:
    wordings = made_up_wordings()
    assert split_wordings(wordings, seed=1).pairs != split_wordings(wordings, seed=2).pairs


def test_the_committed_queries_are_disjoint_and_many() -> None:
    groups = read_evaluation()
    texts = {name: {(w.language, w.text) for w in rows} for name, rows in groups.items()}
    assert not texts["seen"] & texts["unseen"]
    assert not texts["seen"] & texts["pairs"]
    assert not texts["unseen"] & texts["pairs"]
    assert sum(map(len, groups.values())) >= 2000
    count = len(load_gallery())
    assert all(0 <= t < count for rows in groups.values() for w in rows for t in w.targets)


def test_ranks_count_ties_against_the_model() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [0.2, 0.1, 0.9]], np.float32)
    wordings = [Wording("en", "w", t, True) for t in ((2,), (1,), (0, 2))]
    assert quality.rank_of_answers(scores, wordings).tolist() == [2, 3, 1]


def test_scores_of_known_ranks() -> None:
    ranks = np.array([1, 2, 10, 11])
    assert quality.recall(ranks, 1).mean() == 0.25
    assert quality.recall(ranks, 10).mean() == 0.75
    assert quality.reciprocal(ranks).mean() == pytest.approx((1 + 0.5 + 0.1 + 1 / 11) / 4)


def test_intervals_hold_the_mean_and_narrow_with_more_queries() -> None:
    rng = np.random.default_rng(0)
    few, many = (rng.random(n) for n in (50, 5000))
    mean, low, high = quality.interval(few)
    assert low < mean < high
    _, lower, higher = quality.interval(many)
    assert higher - lower < high - low
    assert quality.interval(np.ones(9)) == (1.0, 1.0, 1.0)


class Oracle:
    """Scores a pair by whether the picture is the first of the gallery."""

    def __init__(self, right: Any) -> None:
        self._right = right

    def predict(self, pairs: list[Any], **_: Any) -> np.ndarray:
        return np.array([float(d["image"] is self._right) for _, d in pairs], np.float32)


def test_reranking_moves_only_what_it_was_given() -> None:
    pictures: list[Any] = [object() for _ in range(40)]
    scores = np.linspace(1, 0, 40, dtype=np.float32)[None].repeat(2, axis=0)
    wordings = [Wording("en", "w", t, True) for t in ((15,), (30,))]
    found = quality.rerank(Oracle(pictures[15]), pictures, scores, wordings)  # type: ignore[arg-type]
    assert found.tolist() == [1, 31]


def test_the_gallery_is_whole() -> None:
    gallery = load_gallery()
    assert len(gallery) >= 1000
    assert len({emoji.character for emoji in gallery}) == len(gallery)
    assert 300 <= len(featured()) <= 500
    for emoji in featured():
        assert set(emoji.names) == set(emoji_data.LANGUAGES)
        assert emoji.sprite.size == (SPRITE_SIZE, SPRITE_SIZE)
        assert emoji.sprite.getchannel("A").getbbox() is not None
    picture = shown("🍕").picture("navy")
    assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (0, 0, 128))


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_the_shipped_models_are_small_and_of_the_real_layout(folder: Path) -> None:
    model = load_reference(folder, torch.float32)
    text, vision = model.config.text_config, model.config.vision_config
    assert sum(p.numel() for p in model.parameters()) <= MOST_PARAMETERS
    assert text.head_dim == 128
    assert vision.hidden_size // vision.num_heads == 64
    assert len(vision.deepstack_visual_indexes) >= 2


def test_everything_that_ships_fits() -> None:
    files = [path for path in EMBEDDER.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


def test_the_embedder_agrees_with_transformers(embedder: Embedder) -> None:
    items: list[Any] = ["pizza", "Hund", "арбуз", "自転車", {"image": shown("🍕").picture()}]
    items += [{"image": shown("🐙").picture("navy"), "text": "octopus"}]
    got = embedder.encode(items)
    prompts = [embedder._prepare(item, None) for item in items]
    expected = reference_vectors(load_reference(EMBEDDER, torch.float32), prompts)
    assert (got * expected).sum(axis=1).min() > 0.999


def test_easy_words_find_their_emoji(embedder: Embedder) -> None:
    gallery = featured()
    documents = embedder.encode([{"image": emoji.picture()} for emoji in gallery])
    scores = embedder.similarity(embedder.encode(list(EASY)), documents)
    for row, answers in zip(scores, EASY.values(), strict=True):
        first = {gallery[i].character for i in np.argsort(-row)[:10]}
        assert first & set(answers)


def test_the_reranker_agrees_with_transformers(reranker: Reranker) -> None:
    pairs: list[Any] = [
        (text, {"image": shown(character).picture(ground)})
        for text in ("pizza", "Tintenfisch", "自転車")
        for character, ground in (("🍕", "white"), ("🐙", "navy"))
    ]
    got = reranker.predict(pairs)
    prompts = [reranker._prepare_pair(pair, None) for pair in pairs]
    answers = reranker._runtime.prompter.token_id("yes"), reranker._runtime.prompter.token_id("no")
    expected = reference_scores(load_reference(RERANKER, torch.float32), prompts, answers)
    assert np.abs(got - expected).max() < 1e-3


def test_the_reranker_says_yes_to_what_was_asked_for(reranker: Reranker) -> None:
    right = [(text, {"image": shown(emoji).picture()}) for text, emoji in EASY.items()]
    wrong = [(a, b) for i, (a, _) in enumerate(right) for j, (_, b) in enumerate(right) if i != j]
    assert np.median(reranker.predict(right)) > 0.5
    assert np.mean(reranker.predict(wrong)) < 0.1


def test_reranking_finds_more_at_once(embedder: Embedder, reranker: Reranker) -> None:
    """The gain in full is in the model's card; here of a hundred queries."""
    wordings = read_evaluation()["seen"][:100]
    pictures = quality.draw_gallery()
    documents = embedder.encode([{"image": picture} for picture in pictures])
    scores = embedder.similarity(embedder.encode([w.text for w in wordings]), documents)
    before = quality.rank_of_answers(scores, wordings)
    after = quality.rerank(reranker, pictures, scores, wordings)
    assert np.mean(after == 1) > np.mean(before == 1)
