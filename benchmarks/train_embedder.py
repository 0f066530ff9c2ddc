"""Train the small embedder from nothing: pictures and what they are called, told apart."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import small_model as small
from .emoji_data import SEED, list_emoji, read_wordings, split_wordings
from .training import (
    CANVASES,
    Setting,
    embed_gallery,
    embed_pictures,
    embed_texts,
    make_setting,
    ranks,
    run,
)

MATRYOSHKA = {192: 1.0, 128: 0.5, 64: 0.5, 32: 0.5}
PICTURES, TEXTS_EACH = 160, 3  # of a step
CENTRED_UNTIL, CENTRED_FADE = 500, 250


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


def centre(vectors: Tensor, step: int) -> Tensor:
    """Take the batch's mean out of unit vectors, fully at first, not at all in the end.

    The last token of every prompt is the same, so at first all vectors are nearly one, and what
    they have in common follows whatever the batch is about instead of what tells them apart.
    """
    share = min(1.0, max(0.0, (CENTRED_UNTIL - step) / CENTRED_FADE))
    return F.normalize(vectors - share * vectors.mean(0), dim=-1) if share else vectors


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
    rng = random.Random(f"embedder {SEED} {step}")
    canvas = CANVASES[rng.random() < 0.3]
    shown = rng.sample(range(len(setting.sprites)), PICTURES)
    labels = [i for i in shown for _ in range(TEXTS_EACH)]
    words = [setting.words.draw(i, rng) for i in labels]
    fits = torch.zeros((len(labels), len(anchors)), dtype=torch.bool)
    for row, (_, targets) in enumerate(words):
        fits[row, list(targets)] = True
    pictures = embed_pictures(setting, setting.draw(shown, canvas, rng))
    texts = embed_texts(setting, [text for text, _ in words])
    drawn = Drawn(torch.tensor(shown), torch.tensor(labels), fits)
    inverse = scale.exp().clamp(max=100)
    texts, pictures = (centre(x, step) for x in (texts, pictures))
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


def train_embedder(out: Path, steps: int, peak: float, resume: bool) -> None:
    """Run the training from its beginning or from its last saved state."""
    emoji = list_emoji()
    splits = split_wordings(read_wordings(emoji))
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / "log.csv").unlink(missing_ok=True)
        small.write_frame(out, small.train_tokenizer(w.text for w in splits.train))
    setting = make_setting(out, small.make_model(out, SEED), emoji, splits)
    scale = torch.nn.Parameter(torch.tensor(math.log(5.0)))
    anchors = torch.nn.Parameter(torch.randn(len(emoji), small.SHAPE.hidden) * 0.1)
    run(
        out,
        setting,
        {"anchors": anchors, "scale": scale},
        lambda step: embedder_step(setting, anchors, scale, step),
        lambda: report_embedder(setting, embed_gallery(setting, SEED + 1)),
        steps=steps,
        peak=peak,
        resume=resume,
    )
