"""A head start for the small embedder: what words mean, what pictures show, and how to pass it on.

A transformer of this size needs many hundred steps until its last token, the same in every prompt,
says anything about what came before it. Much of what it has to know is learned faster without it:

- what each token means: a text is the mean of its tokens' vectors, and is told apart by the
  anchors, one vector an emoji (:func:`learn_tokens`);
- what the vision tower sees: a picture is the mean of its visual tokens, told apart by the same
  anchors (:func:`learn_pictures`).

:func:`start` makes the last layer take these means.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import small_model as small
from .emoji_data import SEED
from .training import CANVASES, Log, Run, Setting, draw_canvas, train

TOKEN_STEPS, TEXTS, TOKEN_RATE = 2500, 768, 0.02
PICTURE_STEPS, PICTURES, PICTURE_RATE = 2500, 192, 5e-3
# Steps: words for plain pictures are learned in a hundred, for varied ones not even begun by then.
PLAIN_UNTIL, VARIED_FROM = 150, 800
TOKEN_DROPOUT = 0.15
LENGTHS = (192, 64, 32)
TOKENS, TOKEN_LOG = "tokens.pt", "tokens.csv"
ROW = 0.3  # root mean square of a token's row
SCALE = 20.0
COPIED = 12.0  # how much the last layer makes of what it copies
QUIET = 0.05  # of what other layers say at first
TEMPLATE_ROW = 4 * ROW  # so that the little that is added to template tokens does not matter


@dataclass(frozen=True)
class Meaning:
    """What the bags of tokens taught.

    Attributes:
        table: ``[V, D]``, for the token embedding.
        anchors: ``[N, D]``, one an emoji.
        basis: ``[head_dim, D]`` orthonormal rows: where the tokens' meanings are.
    """

    table: Tensor
    anchors: Tensor
    basis: Tensor


def make_head_start(out: Path, setting: Setting, count: int) -> Tensor:
    """Give the setting's new model its head start; return the anchors ``[count, D]``.

    What is done already is in ``out``.
    """
    tokens = out / TOKENS
    if not tokens.exists() and setting.team.leads:
        log = out / TOKEN_LOG
        log.unlink(missing_ok=True)
        torch.save(vars(learn_tokens(setting, count, Log(log))), tokens)
    setting.team.wait()
    meaning = Meaning(**torch.load(tokens, weights_only=True))
    learn_pictures(out, setting, meaning)
    start(setting.model, meaning)
    return meaning.anchors


def forget(out: Path) -> None:
    """Begin anew."""
    (out / TOKENS).unlink(missing_ok=True)
    _picture_run(out).forget()


def _picture_run(out: Path) -> Run:
    return Run(out, "pictures", PICTURE_STEPS, PICTURE_RATE, is_even=True)


def learn_tokens(setting: Setting, count: int, log: Log) -> Meaning:
    """Learn tokens and anchors from the names and keywords of ``count`` emoji."""
    config = setting.text.config
    width, head = config.hidden_size, config.head_dim
    generator = torch.Generator().manual_seed(SEED)
    basis = torch.linalg.qr(torch.randn(width, head, generator=generator))[0].T
    template = torch.from_numpy(setting.prompt_text("").ids.astype("int64"))
    last = template[-1]
    table = torch.nn.Parameter(torch.randn(config.vocab_size, head, generator=generator) * 0.3)
    anchors = torch.nn.Parameter(torch.randn(count, head, generator=generator) * 0.3)
    mask = torch.ones(config.vocab_size, dtype=torch.bool)
    mask[template] = False
    optimizer = torch.optim.AdamW(
        [table, anchors], lr=TOKEN_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    bags: dict[str, Tensor] = {}
    begun, losses = time.perf_counter(), []
    for step in range(TOKEN_STEPS):
        rng = random.Random(f"bag {SEED} {step}")
        for group in optimizer.param_groups:
            group["lr"] = TOKEN_RATE * max(0.02, 1 - step / TOKEN_STEPS)
        labels = [rng.randrange(count) for _ in range(TEXTS)]
        drawn = [setting.words.draw(i, rng) for i in labels]
        ids, weights = _bags(setting, [text for text, _ in drawn], bags)
        keep = torch.rand(ids.shape, generator=generator) > TOKEN_DROPOUT
        weights = weights * mask[ids] * keep
        rows = F.normalize(table, dim=-1)
        texts = (rows[ids] * weights[..., None]).sum(1) @ basis
        others = torch.zeros((TEXTS, count), dtype=torch.bool)
        for row, (label, (_, targets)) in enumerate(zip(labels, drawn, strict=True)):
            others[row, [t for t in targets if t != label]] = True
        loss = _told_apart(texts, anchors @ basis, labels, SCALE, others)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            seconds = time.perf_counter() - begun
            log.add({"step": step + 1, "seconds": seconds, "loss": sum(losses) / len(losses)})
            losses = []
    with torch.no_grad():
        inside = F.normalize(table, dim=-1) @ basis
        outside = torch.randn(len(inside), width, generator=generator)
        outside -= outside @ basis.T @ basis
        inside *= ROW * width**0.5
        outside = F.normalize(outside, dim=-1) * TEMPLATE_ROW * width**0.5
        outside[last] *= ROW / TEMPLATE_ROW
        rows = torch.where(mask[:, None], inside, outside)
        return Meaning(rows, F.normalize(anchors @ basis, dim=-1), basis)


def _bags(setting: Setting, texts: list[str], known: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids ``[T, L]`` of the texts' prompts, and 1 where they are no padding."""
    for text in texts:
        if text not in known:
            known[text] = torch.from_numpy(setting.prompt_text(text).ids.astype("int64"))
    ids = torch.nn.utils.rnn.pad_sequence([known[t] for t in texts], True, padding_value=-1)
    return ids.clamp(min=0), (ids >= 0).float()


def learn_pictures(out: Path, setting: Setting, meaning: Meaning) -> None:
    """Train the vision tower to see the anchors in pictures."""
    _look(setting)
    scale = torch.nn.Parameter(torch.tensor(math.log(5.0)))
    team, count = setting.team, len(setting.sprites)

    def loss(step: int) -> Tensor:
        rng = random.Random(f"pictures {SEED} {step} {team.rank}")
        shown = rng.sample(range(count), PICTURES // team.size)
        variety = min(1.0, max(0.0, (step - PLAIN_UNTIL) / (VARIED_FROM - PLAIN_UNTIL)))
        tokens = setting.see(setting.draw(shown, draw_canvas(step), rng, variety))[0]
        mean = F.rms_norm(tokens, tokens.shape[-1:]).mean(1)
        copied = mean @ meaning.basis.T @ meaning.basis
        return _told_apart(copied, meaning.anchors, shown, scale.exp())

    train(team, _picture_run(out), setting.vision, {"scale": scale}, loss, dict)


@torch.no_grad()
def _look(setting: Setting) -> None:
    """Begin with the principal components of patches, and tokens of mean zero."""
    rng = random.Random(f"pictures {SEED}")
    shown = rng.sample(range(len(setting.sprites)), 3 * PICTURES)
    drawn = [setting.draw(shown, canvas, rng) for canvas in CANVASES]
    patches = torch.cat([small.patchify(pictures).flatten(0, 1) for pictures in drawn])
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    embed = setting.vision.patch_embed.proj
    count, frames = embed.weight.shape[0], embed.weight.shape[2]
    weight = (vectors / values.clamp(min=1e-6).sqrt())[:, -count:].T
    halves = weight.view(count, 3, 1, *embed.weight.shape[3:]) / frames
    embed.weight.copy_(halves.expand_as(embed.weight))
    embed.bias.copy_(-weight @ mean)
    tokens = setting.see(drawn[0])[0]
    setting.vision.merger.linear_fc2.bias.sub_(tokens.mean((0, 1)))


def _told_apart(
    vectors: Tensor,
    anchors: Tensor,
    labels: list[int],
    scale: Tensor | float,
    others: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over the anchors, averaged over the Matryoshka lengths.

    Args:
        others: ``[B, N]`` bool, anchors that are neither right nor wrong.
    """
    own = torch.tensor(labels)
    loss = vectors.new_zeros(())
    for size in LENGTHS:
        left, right = (F.normalize(x[:, :size], dim=-1) for x in (vectors, anchors))
        scores = scale * left @ right.T
        if others is not None:
            scores = scores.masked_fill(others, -1e4)
        loss = loss + F.cross_entropy(scores, own)
    return loss / len(LENGTHS)


@torch.no_grad()
def start(model: Any, meaning: Meaning) -> None:
    """Give the model the tokens, and a last layer that takes the mean of what it is about.

    Template tokens have no part in the directions that the layer copies, so the mean is over the
    text or the picture alone.
    """
    text = model.model.language_model
    text.embed_tokens.weight.copy_(meaning.table)
    for layer in text.layers:
        quieten(layer)
    for merger in model.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.mul_(QUIET)
    attention = text.layers[-1].self_attn
    attention.q_norm.weight.fill_(0.3)
    attention.k_norm.weight.fill_(1.0)
    attention.v_proj.weight.copy_(meaning.basis)
    heads = attention.o_proj.weight.shape[1] // len(meaning.basis)
    attention.o_proj.weight.copy_(meaning.basis.T.repeat(1, heads) * (COPIED / heads))


@torch.no_grad()
def quieten(layer: Any) -> None:
    """Let a layer of the text model say little at first."""
    layer.self_attn.o_proj.weight.mul_(QUIET)
    layer.mlp.down_proj.weight.mul_(QUIET)
