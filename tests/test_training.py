"""The recipe of the small models: its forward pass, its going on, what the reranker begins with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

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
    setting: training.Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(head_start, "TOKEN_STEPS", 60)
    log = training.Log(tmp_path / "tokens.csv")
    meaning = head_start.learn_tokens(setting, len(NAMES), log)
    head_start.start(setting.model, meaning)
    with torch.no_grad():
        scores = training.embed_texts(setting, NAMES) @ meaning.anchors.T
    assert scores.argmax(1).tolist() == list(range(len(NAMES)))


def compared(setting: training.Setting) -> comparison.Judged:
    """Four queries with six documents each, read after the comparison was set."""
    documents = torch.arange(24).reshape(4, 6)
    drawn = pictures(24, 64)
    comparison.reserve(setting)
    comparison.set_comparison(setting, list(NAMES[:4]), documents, drawn)
    with torch.no_grad():
        return comparison.judge(setting, list(NAMES[:4]), documents, drawn)


def test_the_comparison_orders_documents_by_the_cosine(
    setting: training.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer alone, on states of one size: prompts of five tokens, the second before the
    query, the fourth behind it."""
    measured = torch.tensor([[0.6] + 5 * [0.1]] * 4)  # as after some training
    monkeypatch.setattr(comparison.Judged, "cosines", lambda _: measured)
    compared(setting)
    count, width = 200, comparison.SHAPE.hidden
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, 5, width, generator=generator)
    content = torch.nn.functional.normalize(states[..., : comparison.COORDINATES], dim=-1)
    cosines = torch.linspace(-0.9, 0.95, count)
    asked, other = content[:, 3], content[:, 4]
    across = torch.nn.functional.normalize(
        other - (other * asked).sum(-1, keepdim=True) * asked, dim=-1
    )
    content[:, 4] = cosines[:, None] * asked + (1 - cosines**2).sqrt()[:, None] * across
    states[..., : comparison.COORDINATES] = 8 * content
    states[..., -comparison.RESERVED :] = 0
    kinds = (comparison.OTHER, comparison.SINK, comparison.OTHER, comparison.MARK, comparison.OTHER)
    for place, channel in enumerate(kinds):
        states[:, place, channel] = 1
    text = setting.text
    last = SimpleNamespace(
        embed_tokens=lambda _: states,
        rotary_emb=text.rotary_emb,
        layers=text.layers[comparison.COMPARED :],
        norm=text.norm,
    )
    positions = torch.tensor([0, 10, 20, 30, 60]).expand(3, count, 5)
    ids = torch.zeros((count, 5), dtype=torch.int64)
    rows = small.Rows(ids, positions, torch.full((count,), 4), ids[:, :0])
    with torch.no_grad():
        final = small.read(last, rows, [], None)[0]
        logits = final @ comparison.answer_direction(setting)
    assert logits[0] < -4 and logits[-1] > 4
    places = logits.argsort().argsort()
    assert np.corrcoef(places, np.arange(count))[0, 1] > 0.98


def test_no_layer_writes_to_the_channels_of_the_comparison(setting: training.Setting) -> None:
    judged = compared(setting)
    asked, shown = (x[..., -comparison.RESERVED :] for x in (judged.asked, judged.shown))
    mark, sink, other, answer, level = range(comparison.RESERVED)
    assert asked[..., mark].min() > 0 and shown[..., other].min() > 0
    assert not asked[..., [sink, other, answer, level]].any()
    assert not shown[..., [mark, sink, answer, level]].any()


def test_a_query_is_read_alike_with_and_without_a_document(setting: training.Setting) -> None:
    judged = compared(setting)
    with torch.no_grad():
        alone = comparison.ask(setting, list(NAMES[:4]))
    assert (judged.asked - alone).abs().max() < FORWARD


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
