"""Train the small embedder from nothing: pictures and what they are called, told apart."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import head_start
from . import small_model as small
from .emoji_data import SEED, list_emoji, read_wordings, split_wordings
from .team import Team
from .training import (
    Run,
    Setting,
    draw_canvas,
    embed_gallery,
    embed_pictures,
    embed_texts,
    make_setting,
    ranks,
    train,
)

MATRYOSHKA = {192: 1.0, 128: 0.5, 64: 0.5, 32: 0.5}
PICTURES, TEXTS_EACH = 160, 2  # of a step
TIGHTENING, TIGHT_STEPS, TIGHT = "tightening", 400, 10.0  # the last is the inverse temperature


def contrast(
    texts: Tensor, pictures: Tensor, anchors: Tensor, drawn: Drawn, scale: Tensor
) -> Tensor:
    """The loss of one batch, averaged over the Matryoshka lengths.

    Texts and pictures are each told apart by the anchors, one learned vector an emoji that only
    training has, and by each other: InfoNCE in both directions.

    Args:
        texts: ``[T, D]`` unit vectors.
        pictures: ``[I, D]`` unit vectors.
        anchors: ``[N, D]``, of any length.
        scale: inverse temperature.
    """
    own = F.one_hot(drawn.labels, len(anchors)).bool()
    others = drawn.fits & ~own  # [T, N], what a text fits besides: neither right nor wrong
    loss = texts.new_zeros(())
    for size, weight in MATRYOSHKA.items():
        left, right, middle = (F.normalize(x[:, :size], dim=-1) for x in (texts, pictures, anchors))
        by_text = (scale * left @ middle.T).masked_fill(others, -1e4)
        part = F.cross_entropy(by_text, drawn.labels)
        part = part + F.cross_entropy(scale * right @ middle.T, drawn.shown)
        logits = (scale * left @ right.T).masked_fill(others[:, drawn.shown], -1e4)  # [T, I]
        matches = own[:, drawn.shown]
        found = logits.masked_fill(~matches, -1e4)
        part = part + F.cross_entropy(logits, matches.int().argmax(1))
        part = part + (logits.logsumexp(0) - found.logsumexp(0)).mean()
        loss = loss + weight * part
    return loss / sum(MATRYOSHKA.values())


@dataclass(frozen=True)
class Drawn:
    """What one batch is about: I pictures and T texts.

    Attributes:
        shown: ``[I]`` the emoji of each picture.
        labels: ``[T]`` the emoji that each text was drawn for.
        fits: ``[T, N]`` bool, every emoji that a text fits.
    """

    shown: Tensor
    labels: Tensor
    fits: Tensor


def embedder_step(setting: Setting, anchors: Tensor, scale: Tensor, step: int) -> Tensor:
    """The loss of one step."""
    rng = random.Random(f"embedder {SEED} {step} {setting.team.rank}")
    canvas = draw_canvas(step)
    shown = rng.sample(range(len(setting.sprites)), PICTURES // setting.team.size)
    labels = [i for i in shown for _ in range(TEXTS_EACH)]
    words = [setting.words.draw(i, rng) for i in labels]
    fits = torch.zeros((len(labels), len(anchors)), dtype=torch.bool)
    for row, (_, targets) in enumerate(words):
        fits[row, list(targets)] = True
    pictures = embed_pictures(setting, setting.draw(shown, canvas, rng))
    texts = embed_texts(setting, [text for text, _ in words])
    drawn = Drawn(torch.tensor(shown), torch.tensor(labels), fits)
    inverse = scale.exp().clamp(max=100)
    return contrast(texts, pictures, anchors, drawn, inverse)


@torch.no_grad()
def report_embedder(setting: Setting, gallery: Tensor) -> dict[str, float]:
    found = {}
    for group in ("seen", "unseen", "pairs"):
        wordings = getattr(setting.splits, group)[:400]
        place = ranks(embed_texts(setting, [w.text for w in wordings]) @ gallery.T, wordings)
        found[f"{group}_r1"] = float((place <= 1).mean())
        found[f"{group}_r10"] = float((place <= 10).mean())
    return found


def train_embedder(team: Team, out: Path, steps: int, peak: float, resume: bool) -> None:
    """Run the training from its beginning or from its last saved state."""
    emoji = list_emoji()
    splits = split_wordings(read_wordings(emoji))
    run = Run(out, "training", steps, peak)
    tightening = Run(out, TIGHTENING, TIGHT_STEPS, peak)
    if not resume and team.leads:
        out.mkdir(parents=True, exist_ok=True)
        head_start.forget(out)
        run.forget()
        tightening.forget()
        small.write_frame(out, small.train_tokenizer(w.text for w in splits.train))
    team.wait()
    setting = make_setting(team, out, small.make_model(out, SEED), emoji, splits)
    scale = torch.nn.Parameter(torch.tensor(math.log(head_start.SCALE)))
    anchors = torch.nn.Parameter(head_start.make_head_start(out, setting, len(emoji)))
    tight = torch.tensor(math.log(TIGHT))

    def report() -> dict[str, float]:
        return report_embedder(setting, embed_gallery(setting, SEED + 1))

    def save() -> None:
        small.save_weights(setting.model, out)

    def loss(step: int) -> Tensor:
        return embedder_step(setting, anchors, scale, step)

    def tight_loss(step: int) -> Tensor:
        return embedder_step(setting, anchors, tight, steps + step)

    train(team, run, setting.model, {"anchors": anchors, "scale": scale}, loss, report, save)
    # Texts and pictures that are nearer to their anchor than to others may still be far from one
    # another; a high temperature asks for more than that.
    train(team, tightening, setting.model, {"anchors": anchors}, tight_loss, report, save)
