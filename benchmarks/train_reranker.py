"""Train the small reranker from the embedder that ships: does a picture show what was asked for?

A yes or no for a pair says too little to learn words and pictures from, so the reranker is the
embedder with a layer more, and is told what it reads: behind the query which emoji was asked for,
at the last token which one is shown. One more layer compares the two and answers
(:mod:`benchmarks.comparison`). After :data:`PREPARED` steps it also puts in order what the
embedder finds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from . import small_model as small
from .comparison import (
    COMPARED,
    COORDINATES,
    OTHER,
    RESERVED,
    SHAPE,
    Judged,
    ask,
    judge,
    reserve,
    set_comparison,
)
from .emoji_data import SEED, Wording, list_emoji, read_wordings, split_wordings
from .head_start import quieten
from .team import Team
from .training import (
    CANVASES,
    REPORT_EVERY,
    Run,
    Setting,
    draw_canvas,
    embed_gallery,
    embed_texts,
    load_model,
    make_setting,
    train,
)

# Steps without lists; in each so many groups of so many emoji that are alike.
PREPARED, GROUPS, GROUP = 600, 24, 6
LISTS, LIST_LENGTH = 16, 8  # of a step
ASIDE = 144  # queries of a step that are read without documents
MEASURED, MEASURED_LENGTH = 64, 5  # lists that the comparison is set by
TOP = 20  # documents of the embedder that a list is drawn from
FIRST, SURE = 1.0, 0.3  # shares of the loss, besides what is told
EVEN = 20.0  # another share: thresholds are as exact as states are of one size
TIGHT = 10.0  # inverse temperature of what is told
TOLD_LENGTHS = (SHAPE.hidden - RESERVED, COORDINATES)
GALLERIES = 3
WORDINGS = 4  # of each emoji, for the anchors' beginning
REPORTED = 60


@dataclass(frozen=True)
class Found:
    """What the embedder finds.

    Attributes:
        documents: the first for some texts ``[Q, TOP]``, in the gallery of a number.
        anchors: ``[N, hidden]`` unit vectors, the middle of each emoji's pictures and wordings.
        alike: ``[N, K]``, for each emoji those with the nearest anchors.
    """

    documents: Callable[[Sequence[str], int], Tensor]
    anchors: Tensor
    alike: Tensor


@dataclass(frozen=True)
class Asked:
    """Queries of a step.

    Attributes:
        texts: Q texts.
        emoji: ``[Q]``, the one that each text was drawn for.
        fits: ``[Q, N]`` bool, every emoji that a text fits.
    """

    texts: list[str]
    emoji: Tensor
    fits: Tensor


def told_loss(anchors: Tensor, asked: Tensor, what: Asked, shown: Tensor, drawn: Tensor) -> Tensor:
    """How badly the emoji asked for and shown are recognised, by the anchors and by one another.

    Args:
        anchors: ``[N, hidden]``, which training alone has.
        asked: ``[Q, hidden]`` of the queries ``what``; all that they ask for is shown somewhere.
        shown: ``[R, hidden]`` of documents with the emoji ``drawn`` ``[R]``.
    """
    besides = what.fits.scatter(1, what.emoji[:, None], False)  # neither right nor wrong
    matches = what.emoji[:, None] == drawn  # [Q, R]
    used = matches.any(0)
    loss = anchors.new_zeros(())
    for size in TOLD_LENGTHS:
        queries, documents, known = (
            F.normalize(x[:, :size], dim=-1) for x in (asked, shown, anchors)
        )
        by_query = (TIGHT * queries @ known.T).masked_fill(besides, -1e4)
        loss = loss + F.cross_entropy(by_query, what.emoji)
        loss = loss + F.cross_entropy(TIGHT * documents @ known.T, drawn)
        pairs = (TIGHT * queries @ documents.T).masked_fill(besides[:, drawn], -1e4)
        right = pairs.masked_fill(~matches, -1e4)
        loss = loss + (pairs.logsumexp(1) - right.logsumexp(1)).mean()
        loss = loss + (pairs.logsumexp(0) - right.logsumexp(0))[used].mean()
    return loss / len(TOLD_LENGTHS)


def reranker_step(setting: Setting, anchors: Tensor, found: Found, step: int) -> Tensor:
    """The loss of one step: what was asked for and what is shown, of emoji that are alike in a
    random order; from :data:`PREPARED` on of lists instead, and the right document first in each,
    yes or no for each document."""
    rng = random.Random(f"reranker {SEED} {step} {setting.team.rank}")
    canvas, size = draw_canvas(step), setting.team.size
    if step < PREPARED:
        groups = draw_groups(found.alike, GROUPS // size, rng)
        asked = draw_queries(setting, [emoji for group in groups for emoji in group], rng)
        shown = [[emoji] for group in groups for emoji in rng.sample(group, GROUP)]
    else:
        emoji = rng.sample(range(len(setting.sprites)), LISTS // size)
        asked = draw_queries(setting, emoji, rng)
        shown = draw_lists(asked, found.documents(asked.texts, step % GALLERIES), rng)
    drawn = torch.tensor(shown).flatten()
    aside = draw_queries(setting, rng.choices(drawn.tolist(), k=ASIDE // size), rng)
    judged = judge_lists(setting, asked.texts, shown, canvas, rng, step >= PREPARED)
    both = Asked(
        asked.texts + aside.texts,
        torch.cat((asked.emoji, aside.emoji)),
        torch.cat((asked.fits, aside.fits)),
    )
    states = torch.cat((judged.asked, ask(setting, aside.texts)))
    loss = told_loss(anchors, states, both, judged.shown.flatten(0, 1), drawn)
    size_of = judged.shown[..., :COORDINATES].norm(dim=-1) / judged.shown[..., OTHER]
    loss = loss + EVEN * size_of.log().var()
    if judged.logits is None:
        return loss
    answers = torch.zeros_like(judged.logits)
    answers[:, 0] = 1
    weight = torch.where(answers > 0, LIST_LENGTH - 1.0, 1.0) / LIST_LENGTH
    sure = F.binary_cross_entropy_with_logits(judged.logits, answers, weight)
    first = F.cross_entropy(judged.logits, torch.zeros(len(shown), dtype=torch.int64))
    return loss + FIRST * first + SURE * sure


def draw_queries(setting: Setting, emoji: list[int], rng: random.Random) -> Asked:
    """A text for each of these emoji."""
    words = [setting.words.draw(i, rng) for i in emoji]
    fits = torch.zeros((len(emoji), len(setting.sprites)), dtype=torch.bool)
    for row, (_, targets) in enumerate(words):
        fits[row, list(targets)] = True
    return Asked([text for text, _ in words], torch.tensor(emoji), fits)


def draw_groups(alike: Tensor, count: int, rng: random.Random) -> list[list[int]]:
    """Groups of :data:`GROUP` emoji that are alike; none is in two."""
    groups: list[list[int]] = []
    taken: set[int] = set()
    for emoji in rng.sample(range(len(alike)), len(alike)):
        near = [i for i in alike[emoji].tolist() if i not in taken and i != emoji]
        if len(groups) < count and emoji not in taken and len(near) >= GROUP - 1:
            groups.append([emoji, *rng.sample(near, GROUP - 1)])
            taken.update(groups[-1])
    return groups


def draw_lists(
    asked: Asked, found: Tensor, rng: random.Random, length: int = LIST_LENGTH
) -> list[list[int]]:
    """For each query the emoji asked for, then wrong ones from what was ``found`` ``[Q, K]``."""
    lists = []
    for emoji, right, near in zip(asked.emoji.tolist(), asked.fits, found.tolist(), strict=True):
        wrong = [i for i in near if not right[i] and i != emoji]
        lists.append([emoji, *rng.sample(wrong, length - 1)])
    return lists


def judge_lists(
    setting: Setting,
    texts: list[str],
    shown: list[list[int]],
    canvas: int,
    rng: random.Random,
    answer: bool,
) -> Judged:
    """Draw the emoji ``shown`` ``[Q, L]`` and read them with their queries."""
    drawn, places = np.unique(np.array(shown), return_inverse=True)
    pictures = setting.draw(drawn.tolist(), canvas, rng)
    documents = torch.from_numpy(places.reshape(len(shown), -1))
    return judge(setting, texts, documents, pictures, answer)


@torch.no_grad()
def look_up(setting: Setting) -> Found:
    """What the embedder of a setting finds."""
    galleries = [embed_gallery(setting, SEED + 1 + i) for i in range(GALLERIES)]
    rng = random.Random(f"anchors {SEED}")
    called = torch.zeros_like(galleries[0])
    for _ in range(WORDINGS):
        texts = [setting.words.draw(i, rng)[0] for i in range(len(called))]
        called += embed_texts(setting, texts)
    pictured = torch.stack(galleries).sum(0)
    anchors = F.normalize(F.normalize(called, dim=-1) + F.normalize(pictured, dim=-1), dim=-1)

    @torch.no_grad()
    def documents(texts: Sequence[str], gallery: int) -> Tensor:
        return (embed_texts(setting, texts) @ galleries[gallery].T).topk(TOP).indices

    return Found(documents, anchors, (anchors @ anchors.T).topk(3 * GROUP).indices)


@torch.no_grad()
def report_reranker(
    setting: Setting, tops: dict[str, tuple[Sequence[Wording], Tensor]]
) -> dict[str, float]:
    """Recall@1 among the embedder's first documents: in its order, by what is told, reranked."""
    scores: dict[str, float] = {}
    pictures = setting.draw(range(len(setting.sprites)), 96, random.Random(SEED + 1))
    for group, (wordings, top) in tops.items():
        hits = np.zeros(3)
        for start in range(0, len(top), 10):
            part, documents = wordings[start : start + 10], top[start : start + 10]
            used, places = documents.unique(return_inverse=True)
            judged = judge(setting, [w.text for w in part], places, pictures[used.numpy()])
            assert judged.logits is not None
            orders = (
                -torch.arange(TOP).expand(len(part), -1),
                judged.cosines(),
                judged.logits,
            )
            for i, order in enumerate(orders):
                best = documents.gather(1, order.argmax(1, keepdim=True))[:, 0].tolist()
                hits[i] += sum(b in w.targets for b, w in zip(best, part, strict=True))
        for name, value in zip(("before", "told", "r1"), hits / len(top), strict=True):
            scores[f"{group}_{name}"] = float(value)
    return scores


def grow(out: Path, embedder: Any) -> Any:
    """The embedder with a layer more that says little yet, and one that is not trained; a few units
    of its feed-forward nets are left out."""
    model = small.make_model(out, SEED)
    own, state = model.state_dict(), embedder.state_dict()
    corners = {n: tuple(slice(size) for size in p.shape) for n, p in own.items() if n in state}
    model.load_state_dict({n: state[n][corner] for n, corner in corners.items()}, strict=False)
    text = model.model.language_model
    quieten(text.layers[COMPARED - 1])
    last = text.layers[COMPARED]
    # States are compared as the embedder's vectors are.
    last.input_layernorm.weight.data.copy_(text.norm.weight)
    for module in (last, text.norm):
        module.requires_grad_(False)
    return model


def train_reranker(
    team: Team, out: Path, embedder: Path, steps: int, peak: float, resume: bool
) -> None:
    """Run the training from its beginning or from its last saved state.

    Args:
        embedder: folder of the embedder to begin with.
    """
    emoji = list_emoji()
    splits = split_wordings(read_wordings(emoji))
    run = Run(out, "training", steps, peak)
    if not resume and team.leads:
        out.mkdir(parents=True, exist_ok=True)
        run.forget()
        small.write_frame(out, Tokenizer.from_file(str(embedder / "tokenizer.json")), SHAPE)
    first = load_model(embedder)
    team.wait()
    setting = make_setting(team, out, grow(out, first), emoji, splits)
    reserve(setting)
    found = look_up(replace(setting, model=first))
    anchors = torch.nn.Parameter(found.anchors.clone())
    tops = {}
    for group in ("seen", "unseen"):
        wordings = getattr(splits, group)[:REPORTED]
        tops[group] = (wordings, found.documents([w.text for w in wordings], 0))

    def loss(step: int) -> Tensor:
        if step % REPORT_EVERY == 0:
            measure_comparison(setting, found)
        return reranker_step(setting, anchors, found, step)

    def save() -> None:
        small.save_weights(setting.model, out)

    train(
        team,
        run,
        setting.model,
        {"anchors": anchors},
        loss,
        lambda: report_reranker(setting, tops),
        save,
        lambda: reserve(setting),
    )
    measure_comparison(setting, found)
    if team.leads:
        save()
    team.wait()


def measure_comparison(setting: Setting, found: Found) -> None:
    """Set the last layer by what the model makes of some lists of the training's."""
    rng = random.Random(f"comparison {SEED}")
    asked = draw_queries(setting, rng.sample(range(len(setting.sprites)), MEASURED), rng)
    lists = draw_lists(asked, found.documents(asked.texts, 0), rng, MEASURED_LENGTH)
    drawn, places = np.unique(np.array(lists), return_inverse=True)
    pictures = setting.draw(drawn.tolist(), CANVASES[-1], rng)
    documents = torch.from_numpy(places.reshape(MEASURED, -1))
    set_comparison(setting, asked.texts, documents, pictures)
