"""Train the small reranker from a trained embedder: does this picture show what was asked for?

A yes or no for a pair says too little to learn words and pictures from, so the reranker is the
embedder with two more layers, and is told what it reads: behind the query which emoji was asked
for, at the last token which one is shown. Once it can say both, for which its prompt is new to it,
its last layer is set to multiply the two (:mod:`benchmarks.comparison`), so that it begins about
as good as the embedder. From then on it puts documents that the embedder finds in order.
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
from torch import Tensor

from . import small_model as small
from .comparison import SHAPE, Judged, add_comparison, judge
from .emoji_data import SEED, Wording, list_emoji, read_wordings, split_wordings
from .head_start import quieten
from .team import Team
from .train_embedder import TIGHT, TIGHTENING
from .training import (
    CANVASES,
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
PREPARED, GROUPS, GROUP = 400, 24, 6
LISTS, LIST_LENGTH = 20, 8  # of a step
TOP = 20  # documents of the embedder that a list is drawn from
# Shares of the loss, besides what is told: small, or lists undo what the layers below know. The
# last layer learns from them alone, and its updates do not depend on the size of a gradient.
FIRST, SURE = 0.1, 0.03
TOLD_LENGTHS = (192, 64)
GALLERIES = 3
REPORTED = 40


@dataclass(frozen=True)
class Found:
    """What the embedder finds.

    Attributes:
        documents: the first for some texts ``[Q, TOP]``, in the gallery of a number.
        alike: ``[N, K]``, for each emoji those with the nearest pictures.
    """

    documents: Callable[[Sequence[str], int], Tensor]
    alike: Tensor


class Told:
    """What training alone has: vectors that say which emoji was asked for and which is shown."""

    def __init__(self, anchors: Tensor) -> None:
        self.anchors = torch.nn.Parameter(anchors.clone())

    def loss(self, judged: Judged, asked: Tensor, shown: Tensor, fits: Tensor) -> Tensor:
        """How badly the emoji asked for ``[Q]`` and shown ``[Q, L]`` are recognised, by the
        anchors and, where each query's emoji is shown somewhere, by one another.

        Args:
            fits: ``[Q, N]`` bool, every emoji that a query fits.
        """
        drawn = shown.flatten()
        besides = fits.scatter(1, asked[:, None], False)  # neither right nor wrong
        own = asked[:, None] == drawn
        matches = own.int().argmax(1)
        loss = self.anchors.new_zeros(())
        for size in TOLD_LENGTHS:
            # Until it meets the picture, the query is the same in all its rows.
            queries, documents, known = (
                F.normalize(x[..., :size], dim=-1)
                for x in (judged.asked[:, 0], judged.shown.flatten(0, 1), self.anchors)
            )
            by_query = (TIGHT * queries @ known.T).masked_fill(besides, -1e4)
            loss = loss + F.cross_entropy(by_query, asked)
            loss = loss + F.cross_entropy(TIGHT * documents @ known.T, drawn)
            pairs = (TIGHT * queries @ documents.T).masked_fill(besides[:, drawn], -1e4)
            loss = loss + F.cross_entropy(pairs, matches)
            loss = loss + F.cross_entropy(pairs[:, matches].T, torch.arange(len(asked)))
        return loss / len(TOLD_LENGTHS)


def reranker_step(setting: Setting, told: Told, found: Found, step: int) -> Tensor:
    """The loss of one step: the right document first in each list, yes or no for each document,
    and what was asked for and shown. Before :data:`PREPARED` only the last, of emoji that are alike
    in a random order."""
    rng = random.Random(f"reranker {SEED} {step} {setting.team.rank}")
    canvas = draw_canvas(step)
    if step < PREPARED:
        groups = draw_groups(found.alike, GROUPS // setting.team.size, rng)
        asked = [emoji for group in groups for emoji in group]
    else:
        asked = rng.sample(range(len(setting.sprites)), LISTS // setting.team.size)
    words = [setting.words.draw(emoji, rng) for emoji in asked]
    texts = [text for text, _ in words]
    fits = torch.zeros((len(asked), len(setting.sprites)), dtype=torch.bool)
    for row, (_, targets) in enumerate(words):
        fits[row, list(targets)] = True
    labels = torch.tensor(asked)
    if step < PREPARED:
        shown = [[emoji] for group in groups for emoji in rng.sample(group, GROUP)]
    else:
        shown = draw_lists(asked, fits, found.documents(texts, step % GALLERIES), rng)
    judged = judge_lists(setting, texts, shown, canvas, rng)
    loss = told.loss(judged, labels, torch.tensor(shown), fits)
    if step < PREPARED:
        return loss
    answers = torch.zeros_like(judged.logits)
    answers[:, 0] = 1
    weight = torch.where(answers > 0, LIST_LENGTH - 1.0, 1.0) / LIST_LENGTH
    sure = F.binary_cross_entropy_with_logits(judged.logits, answers, weight)
    first = F.cross_entropy(judged.logits, torch.zeros(len(asked), dtype=torch.int64))
    return loss + FIRST * first + SURE * sure


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
    asked: Sequence[int], fits: Tensor, found: Tensor, rng: random.Random
) -> list[list[int]]:
    """For each query the emoji asked for, then wrong ones from what was ``found`` ``[Q, K]``."""
    lists = []
    for emoji, right, near in zip(asked, fits, found.tolist(), strict=True):
        wrong = [i for i in near if not right[i] and i != emoji]
        lists.append([emoji, *rng.sample(wrong, LIST_LENGTH - 1)])
    return lists


def judge_lists(
    setting: Setting, texts: list[str], shown: list[list[int]], canvas: int, rng: random.Random
) -> Judged:
    """Draw the emoji ``shown`` ``[Q, L]`` and read them with their queries."""
    drawn, places = np.unique(np.array(shown), return_inverse=True)
    pictures = setting.draw(drawn.tolist(), canvas, rng)
    documents = torch.from_numpy(places.reshape(len(shown), -1))
    return judge(setting, texts, documents, pictures)


@torch.no_grad()
def look_up(setting: Setting) -> Found:
    """What the embedder of a setting finds."""
    galleries = [embed_gallery(setting, SEED + 1 + i) for i in range(GALLERIES)]

    @torch.no_grad()
    def documents(texts: Sequence[str], gallery: int) -> Tensor:
        return (embed_texts(setting, texts) @ galleries[gallery].T).topk(TOP).indices

    return Found(documents, (galleries[0] @ galleries[-1].T).topk(2 * GROUP).indices)


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
            told = F.cosine_similarity(judged.asked, judged.shown, dim=-1)
            orders = (-torch.arange(TOP).expand(len(part), -1), told, judged.logits)
            for i, order in enumerate(orders):
                best = documents.gather(1, order.argmax(1, keepdim=True))[:, 0].tolist()
                hits[i] += sum(b in w.targets for b, w in zip(best, part, strict=True))
        for name, value in zip(("before", "told", "r1"), hits / len(top), strict=True):
            scores[f"{group}_{name}"] = float(value)
    return scores


def grow(out: Path, embedder: Any) -> Any:
    """The embedder with two more layers that say little yet."""
    model = small.make_model(out, SEED)
    model.load_state_dict(embedder.state_dict(), strict=False)
    for layer in model.model.language_model.layers[small.SHAPE.layers :]:
        quieten(layer)
    return model


def train_reranker(
    team: Team, out: Path, embedder: Path, steps: int, peak: float, resume: bool
) -> None:
    """Run the training from its beginning or from its last saved state.

    Args:
        embedder: folder of the embedder's training.
    """
    emoji = list_emoji()
    splits = split_wordings(read_wordings(emoji))
    run = Run(out, "training", steps, peak)
    if not resume and team.leads:
        out.mkdir(parents=True, exist_ok=True)
        run.forget()
        small.write_frame(out, small.train_tokenizer(w.text for w in splits.train), SHAPE)
    first = load_model(embedder)
    team.wait()
    setting = make_setting(team, out, grow(out, first), emoji, splits)
    found = look_up(replace(setting, model=first))
    state = torch.load(embedder / f"{TIGHTENING}.pt", weights_only=True)
    told = Told(state["anchors"])
    tops = {}
    for group in ("seen", "unseen"):
        wordings = getattr(splits, group)[:REPORTED]
        tops[group] = (wordings, found.documents([w.text for w in wordings], 0))

    def loss(step: int) -> Tensor:
        if step == PREPARED:
            begin_comparison(setting, found)
        return reranker_step(setting, told, found, step)

    train(
        team,
        run,
        setting.model,
        {"anchors": told.anchors},
        loss,
        lambda: report_reranker(setting, tops),
        lambda: small.save_weights(setting.model, out),
    )


def begin_comparison(setting: Setting, found: Found) -> None:
    """Set the last layer by what the model makes of some lists."""
    rng = random.Random(f"comparison {SEED}")
    asked = rng.sample(range(len(setting.sprites)), LISTS)
    texts = [setting.words.draw(emoji, rng)[0] for emoji in asked]
    documents = found.documents(texts, 0)[:, :LIST_LENGTH]
    drawn, places = documents.unique(return_inverse=True)
    pictures = setting.draw(drawn.tolist(), CANVASES[0], rng)
    add_comparison(setting, texts, places, pictures)
