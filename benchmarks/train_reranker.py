"""Train the small reranker from a trained embedder: does this picture show what was asked for?

A yes or no for a pair says too little to learn words and pictures from, so the reranker begins
with the embedder's layers, gets two more, and is told at two places what it reads: behind the
query which emoji was asked for, at the last token which one is shown. Only training has the
vectors, one an emoji, that these answers are chosen from; they come from the embedder as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import small_model as small
from .emoji_data import SEED, list_emoji, read_wordings, split_wordings
from .training import (
    CANVASES,
    Setting,
    embed_gallery,
    embed_texts,
    load_model,
    make_setting,
    run,
)

SHAPE = replace(small.SHAPE, layers=small.SHAPE.layers + 2)
LISTS, LIST_LENGTH, HARD = 36, 6, 3  # of a step: queries, documents each, near ones among them
ALONE = 144  # queries of a step without documents
NEAR = 24
TOLD_UNTIL, TOLD_FADE = 1200, 600
RERANKED, REPORTED = 20, 100


@dataclass(frozen=True)
class Judged:
    """What a reranker makes of Q queries with L documents each.

    Attributes:
        logits: ``[Q, L]``, yes against no.
        asked: ``[Q, L, hidden]`` after the embedder's layers, behind the query.
        shown: ``[Q, L, hidden]`` there, at the last token.
        both: ``[Q, L, hidden]`` at the last token, one layer from the end.
    """

    logits: Tensor
    asked: Tensor
    shown: Tensor
    both: Tensor


def judge(setting: Setting, texts: list[str], documents: Tensor, pictures: np.ndarray) -> Judged:
    """Read all pairs; ``documents`` ``[Q, L]`` are indices of ``pictures``."""
    canvas = pictures.shape[1]
    prompts = [setting.prompt_pair(text, canvas) for text in texts]
    prefix = small.common_prefix([*prompts, setting.prompt_pair("a", 64)])
    cache = small.read_prefix(setting.text, prompts[0], prefix)
    seen, deep = setting.see(pictures)
    yes, no = (setting.prompter.token_id(t) for t in ("yes", "no"))
    table = setting.text.embed_tokens.weight
    direction = table[yes] - table[no]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    length, size = documents.shape[1], max(8, len(prompts) // 4)
    parts: list[list[Tensor]] = [[], [], [], []]
    for group in (order[i : i + size] for i in range(0, len(order), size)):
        rows = small.stack_rows([prompts[i] for i in group for _ in range(length)], prefix)
        at = documents[group].flatten()
        every = torch.arange(len(at))
        kept: dict[int, Tensor] = {}
        hidden, _ = small.read(
            setting.text, rows, cache, (seen[at], [d[at] for d in deep]), kept.__setitem__
        )
        made = (
            hidden @ direction,
            kept[small.SHAPE.layers - 1][every, rows.pads[:, 0] - 1],
            kept[small.SHAPE.layers - 1][every, rows.last],
            kept[SHAPE.layers - 2][every, rows.last],
        )
        for part, value in zip(parts, made, strict=True):
            part.append(value.view(len(group), length, *value.shape[1:]))
    back = torch.tensor(order).argsort()
    return Judged(*(torch.cat(part)[back] for part in parts))


def read_queries(setting: Setting, texts: list[str]) -> Tensor:
    """``[Q, hidden]`` after the embedder's layers, behind the query, where no document follows."""
    whole = [setting.prompt_pair(text, 64) for text in texts]
    prefix = small.common_prefix([*whole, setting.prompt_pair("a", 64)])
    cache = small.read_prefix(setting.text, whole[0], prefix)
    prompts = []
    for prompt in whole:
        end = int(prompt.visual_index[0])
        ids, positions = prompt.ids[:end], prompt.positions[:, :end]
        none = prompt.visual_index[:0]
        prompts.append(replace(prompt, ids=ids, positions=positions, visual_index=none))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    groups = [order[i : i + 48] for i in range(0, len(order), 48)]
    rows = [small.stack_rows([prompts[i] for i in group], prefix) for group in groups]
    depth = small.SHAPE.layers
    hidden = [small.read(setting.text, r, cache, None, depth=depth)[0] for r in rows]
    return torch.cat(hidden)[torch.tensor(order).argsort()]


def reranker_step(setting: Setting, told: Told, near: Tensor, step: int) -> Tensor:
    """The loss of one step: yes or no for every pair, the right document first in each list, and
    what was asked for and shown.

    Some wrong documents are neighbours in the embedder's space, ``near`` ``[N, K]``, which is what
    a reranker gets to see.
    """
    rng = random.Random(f"reranker {SEED} {step}")
    canvas = CANVASES[rng.random() < 0.3]
    count = len(setting.sprites)
    asked = rng.sample(range(count), LISTS + ALONE)
    drawn_words = [setting.words.draw(emoji, rng) for emoji in asked]
    fits = torch.zeros((len(asked), count), dtype=torch.bool)
    for row, (_, targets) in enumerate(drawn_words):
        fits[row, list(targets)] = True
    texts, shown = [], []
    for emoji, (text, targets) in zip(asked[:LISTS], drawn_words, strict=False):
        close = [e for e in near[emoji].tolist() if e not in targets]
        wrong = rng.sample(close, min(HARD, len(close)))
        while len(wrong) < LIST_LENGTH - 1:
            other = rng.randrange(count)
            if other not in targets and other not in wrong:
                wrong.append(other)
        texts.append(text)
        shown.append([emoji, *wrong])
    drawn, places = np.unique(np.array(shown), return_inverse=True)
    pictures = setting.draw(drawn.tolist(), canvas, rng)
    documents = torch.from_numpy(places.reshape(LISTS, LIST_LENGTH))
    judged = judge(setting, texts, documents, pictures)
    answers = torch.zeros_like(judged.logits)
    answers[:, 0] = 1
    weight = torch.where(answers > 0, LIST_LENGTH - 1.0, 1.0) / LIST_LENGTH
    loss = F.binary_cross_entropy_with_logits(judged.logits, answers, weight)
    loss = loss + F.cross_entropy(judged.logits, torch.zeros(LISTS, dtype=torch.int64))
    share = min(1.0, max(0.1, (TOLD_UNTIL + TOLD_FADE - step) / TOLD_FADE))
    alone = read_queries(setting, [text for text, _ in drawn_words[LISTS:]])
    labels = torch.tensor(asked)
    others = fits.scatter(1, labels[:, None], False)
    return loss + share * told.loss(judged, alone, labels, torch.tensor(shown), others)


@dataclass(frozen=True)
class Told:
    """What training alone has.

    Attributes:
        anchors: ``[N, hidden]``, one an emoji.
        scale: logarithm of the inverse temperature.
        asked, shown: ``[hidden, hidden]``, which make the query and the document again out of the
            hidden state one layer from the end.
    """

    anchors: torch.nn.Parameter
    scale: torch.nn.Parameter
    asked: torch.nn.Parameter
    shown: torch.nn.Parameter

    def loss(
        self, judged: Judged, alone: Tensor, asked: Tensor, shown: Tensor, others: Tensor
    ) -> Tensor:
        """How badly the emoji asked for ``[Q + A]`` and shown ``[Q, L]`` are recognised.

        Args:
            alone: ``[A, hidden]``, queries besides those that were judged.
            others: ``[Q + A, N]`` bool, what a query fits besides: neither right nor wrong.
        """
        anchors = F.normalize(self.anchors, dim=-1)
        count, lists = shown.shape

        def recognised(hidden: Tensor, labels: Tensor, besides: Tensor | None) -> Tensor:
            scores = self.scale.exp() * F.normalize(hidden.flatten(0, -2), dim=-1) @ anchors.T
            if besides is not None:
                scores = scores.masked_fill(besides, -1e4)
            return F.cross_entropy(scores, labels.flatten())

        asked_each = asked[:count, None].expand(-1, lists)
        others_each = others[:count, None].expand(-1, lists, -1).flatten(0, 1)
        # Until it meets the picture, the query is the same in all its rows.
        loss = recognised(torch.cat((judged.asked[:, 0], alone)), asked, others)
        loss = loss + recognised(judged.shown, shown, None)
        loss = loss + recognised(judged.both @ self.asked, asked_each, others_each)
        return 0.25 * (loss + recognised(judged.both @ self.shown, shown, None))


def neighbours(setting: Setting) -> tuple[Tensor, dict[str, Tensor]]:
    """By a trained embedder: the pictures nearest to each emoji's names ``[N, NEAR]``, and the
    documents that reports rerank."""
    with torch.no_grad():
        gallery = embed_gallery(setting, SEED + 1)
        by_emoji = torch.zeros_like(gallery)
        names = [w for w in setting.splits.train if w.is_name]
        for start in range(0, len(names), 1024):
            part = names[start : start + 1024]
            vectors = embed_texts(setting, [w.text for w in part])
            for vector, w in zip(vectors, part, strict=True):
                by_emoji[list(w.targets)] += vector
        scores = F.normalize(by_emoji, dim=-1) @ gallery.T + gallery @ gallery.T
        near = scores.fill_diagonal_(-9).topk(NEAR).indices
        tops = {}
        for group in ("seen", "unseen"):
            texts = [w.text for w in getattr(setting.splits, group)[:REPORTED]]
            tops[group] = (embed_texts(setting, texts) @ gallery.T).topk(RERANKED).indices
    return near, tops


@torch.no_grad()
def report_reranker(setting: Setting, tops: dict[str, Tensor]) -> dict[str, float]:
    """Recall@1 among the embedder's first 20 documents before and after reranking."""
    found = {}
    rng = random.Random(SEED + 1)
    pictures = setting.draw(range(len(setting.sprites)), 96, rng)
    for group, top in tops.items():
        wordings = getattr(setting.splits, group)[: len(top)]
        hits = before = 0
        for start in range(0, len(top), 10):
            part, documents = wordings[start : start + 10], top[start : start + 10]
            used, places = documents.unique(return_inverse=True)
            logits = judge(setting, [w.text for w in part], places, pictures[used.numpy()]).logits
            best = documents.gather(1, logits.argmax(1, keepdim=True))[:, 0].tolist()
            hits += sum(b in w.targets for b, w in zip(best, part, strict=True))
            first = documents[:, 0].tolist()
            before += sum(d in w.targets for d, w in zip(first, part, strict=True))
        found[f"{group}_before"], found[f"{group}_r1"] = before / len(top), hits / len(top)
    return found


def grow(out: Path, embedder: Any) -> Any:
    """The embedder with two more layers, whose feed-forward nets can compare from the start.

    Pairs of units with gates of opposite sign make a product, for silu(a) − silu(−a) = a: together
    they are a bilinear form of what the hidden state says of query and document.
    """
    model = small.make_model(out, SEED)
    model.load_state_dict(embedder.state_dict(), strict=False)
    mlp = model.model.language_model.layers[-1].mlp
    half = mlp.gate_proj.weight.shape[0] // 2
    with torch.no_grad():
        mlp.gate_proj.weight[half:] = -mlp.gate_proj.weight[:half]
        mlp.up_proj.weight[half:] = mlp.up_proj.weight[:half]
        mlp.down_proj.weight[:, half:] = -mlp.down_proj.weight[:, :half]
    return model


def train_reranker(out: Path, embedder: Path, steps: int, peak: float, resume: bool) -> None:
    """Run the training from its beginning or from its last saved state.

    Args:
        embedder: folder of the embedder's training.
    """
    emoji = list_emoji()
    splits = split_wordings(read_wordings(emoji))
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / "log.csv").unlink(missing_ok=True)
        small.write_frame(out, small.train_tokenizer(w.text for w in splits.train), SHAPE)
    first = load_model(embedder)
    setting = make_setting(out, grow(out, first), emoji, splits)
    near, tops = neighbours(replace(setting, model=first))
    state = torch.load(embedder / "state.pt", weights_only=True)
    eye = torch.eye(SHAPE.hidden)
    told = Told(
        torch.nn.Parameter(state["anchors"].clone()),
        torch.nn.Parameter(state["scale"].clone()),
        torch.nn.Parameter(eye.clone()),
        torch.nn.Parameter(eye.clone()),
    )
    run(
        out,
        setting,
        {f"told_{name}": p for name, p in vars(told).items()},
        lambda step: reranker_step(setting, told, near, step),
        lambda: report_reranker(setting, tops),
        steps=steps,
        peak=peak,
        resume=resume,
    )
