"""The recipe of the small models: its forward pass, its going on, what the reranker begins with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import comparison, head_start, training
from benchmarks import small_model as small
from benchmarks.emoji_data import Splits, Wording
from benchmarks.team import Team

NAMES = ("pizza", "roter Apfel", "火山", "cat", "brown dog", "arc-en-ciel", "слон", "house")


@pytest.fixture
def setting(tmp_path: Path) -> training.Setting:
    """A new reranker that reads, with eight words of training data and no pictures."""
    folder = tmp_path
    small.write_frame(folder, small.train_tokenizer(NAMES), comparison.SHAPE)
    model = small.make_model(folder, 0)
    train = tuple(Wording("en", name, (i,), True) for i, name in enumerate(NAMES))
    grids = {canvas: small.make_grid(canvas) for canvas in training.CANVASES}
    words = training.Words(train, len(NAMES))
    prompter = small.load_prompter(folder)
    splits = Splits(train, (), (), ())
    return training.Setting([], words, splits, prompter, model, grids, Team())


def pictures(count: int, canvas: int) -> np.ndarray:
    return np.random.default_rng(canvas).integers(0, 256, (count, canvas, canvas, 3), np.uint8)


# Sums in another order, on states of size 1.
FORWARD = 1e-4


@pytest.mark.parametrize("canvas", training.CANVASES)
def test_the_forward_pass_is_that_of_transformers(setting: training.Setting, canvas: int) -> None:
    texts = [setting.prompt_text(name) for name in NAMES]
    assert small.check_forward(setting.model, texts, None) < FORWARD
    pairs = [setting.prompt_pair(name, canvas) for name in NAMES]
    assert small.check_forward(setting.model, pairs, pictures(len(pairs), canvas)) < FORWARD


def test_tokens_learn_what_the_last_layer_then_copies(
    setting: training.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_start, "TOKEN_STEPS", 60)
    meaning = head_start.learn_tokens(setting, len(NAMES))
    head_start.start(setting.model, meaning)
    with torch.no_grad():
        scores = training.embed_texts(setting, NAMES) @ meaning.anchors.T
    assert scores.argmax(1).tolist() == list(range(len(NAMES)))


def test_the_comparison_multiplies_query_and_document(setting: training.Setting) -> None:
    documents = torch.arange(24).reshape(4, 6)
    drawn = pictures(24, 64)
    texts = list(NAMES[:4])
    comparison.add_comparison(setting, texts, documents, drawn)
    with torch.no_grad():
        judged = comparison.judge(setting, texts, documents, drawn)
    size = comparison.COORDINATES
    product = (judged.asked[..., :size] * judged.shown[..., :size]).sum(-1)
    for logits, expected in zip(judged.logits, product, strict=True):
        # The norms before and in the layer divide each pair by another number.
        assert np.corrcoef(logits, expected)[0, 1] > 0.8
    assert judged.logits.mean() == pytest.approx(comparison.LIKELY, abs=1)


class KilledError(Exception):
    """Ends a training in the middle."""


def test_a_training_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REPORT_EVERY", 2)

    def train(name: str, killed: int | None) -> torch.Tensor:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        extra = torch.nn.Parameter(torch.ones(4))

        def loss(step: int) -> torch.Tensor:
            if step == killed:
                raise KilledError
            inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            return (model(inputs) * extra).square().sum()

        run = training.Run(folder, "training", steps=5, peak=1e-2)
        training.train(Team(), run, model, {"extra": extra}, loss, dict)
        return torch.cat([p.detach().flatten() for p in (*model.parameters(), extra)])

    whole = train("whole", None)
    with pytest.raises(KilledError):
        train("parts", 3)
    assert torch.equal(train("parts", None), whole)
    # What is done already is not done again.
    assert torch.equal(train("parts", 0), whole)
