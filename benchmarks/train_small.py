"""Train small models on emoji, on the CPU, from nothing: the embedder that the package ships.

    python -m benchmarks.train_small embedder --out RUN
    python -m benchmarks.train_small reranker --out RUN2 --embedder RUN

Each step's data depends on the seed and the step's number alone, so ``--resume`` goes on as if
nothing had happened. ``OUT`` holds the checkpoint in bfloat16 (renewed at every report), the state
of the training, and ``log.csv``. No reranker is shipped: 300 steps of this recipe leave one near
chance, and more have not been tried.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qvlfast.inputs import Item
from qvlfast.prompt import Prompt, Prompter

from . import small_model as small
from .emoji_data import (
    LANGUAGES,
    SEED,
    Splits,
    Wording,
    draw_sprites,
    list_emoji,
    read_wordings,
    render,
    split_wordings,
)

LENGTH = 8192
CANVASES = (64, 96)
MATRYOSHKA = {192: 1.0, 128: 0.5, 64: 0.5, 32: 0.5}
LANGUAGE_WEIGHTS = [2.0 if language == "en" else 1.0 for language in LANGUAGES]
NAME_SHARE, JOINED_SHARE, CASE_SHARE = 0.45, 0.15, 0.1
PICTURES, TEXTS_EACH = 160, 3  # of a step of the embedder
CENTRED_UNTIL, CENTRED_FADE = 500, 250
POOL, LISTS, LIST_LENGTH = 64, 40, 8  # of a step of the reranker: pictures, queries, documents
REPORT_EVERY = 100
RERANKED, REPORTED = 20, 60
HARD_FROM = 100  # before, a reranker tells pictures of different kinds apart


class Words:
    """Draws what to call an emoji."""

    def __init__(self, train: Sequence[Wording], count: int) -> None:
        self._by_emoji: list[dict[str, list[Wording]]] = [defaultdict(list) for _ in range(count)]
        self._targets: dict[str, set[int]] = defaultdict(set)
        for w in train:
            self._targets[w.text.casefold()] |= set(w.targets)
            for t in w.targets:
                self._by_emoji[t][w.language].append(w)

    def targets(self, wording: Wording) -> set[int]:
        """The emoji that any language calls so."""
        return self._targets[wording.text.casefold()]

    def draw(self, emoji: int, rng: random.Random) -> tuple[str, set[int]]:
        """A text for an emoji, and all emoji that it fits."""
        by_language = self._by_emoji[emoji]
        weights = [
            w if by_language[k] else 0.0 for k, w in zip(LANGUAGES, LANGUAGE_WEIGHTS, strict=True)
        ]
        known = by_language[rng.choices(LANGUAGES, weights)[0]]
        first = self._pick(known, rng)
        text, targets = first.text, self.targets(first)
        if rng.random() < JOINED_SHARE:
            second = self._pick(known, rng)
            if second is not first:
                text = text + rng.choice((" ", ", ")) + second.text
                targets = targets & self.targets(second)
        if rng.random() < CASE_SHARE:
            text = rng.choice((str.lower, str.capitalize))(text)
        return text, targets

    @staticmethod
    def _pick(known: Sequence[Wording], rng: random.Random) -> Wording:
        names = [w for w in known if w.is_name]
        if names and rng.random() < NAME_SHARE:
            return rng.choice(names)
        return rng.choices(known, [len(w.targets) ** -0.5 for w in known])[0]


@dataclass(frozen=True)
class Setting:
    """What every part of a training run needs."""

    sprites: list[Image.Image]
    words: Words
    splits: Splits
    prompter: Prompter
    model: Any
    grids: dict[int, small.Grid]

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    @property
    def vision(self) -> Any:
        return self.model.model.visual

    def prompt_text(self, text: str) -> Prompt:
        return self.prompter.embed(_item(text), (), LENGTH)

    def prompt_picture(self, canvas: int) -> Prompt:
        return self.prompter.embed(_item(None), [small.blank_patches(canvas)], LENGTH)

    def prompt_pair(self, text: str, canvas: int) -> Prompt:
        document = [small.blank_patches(canvas)]
        return self.prompter.rerank(_item(text), (), _item(None), document, LENGTH)

    def draw(self, emoji: Sequence[int], canvas: int, rng: random.Random) -> np.ndarray:
        """uint8 ``[B, canvas, canvas, 3]``; some were drawn at another size and resized."""
        pictures = []
        for i in emoji:
            size = canvas if rng.random() < 0.7 else rng.randint(56, 128)
            picture = render(self.sprites[i], size, rng)
            pictures.append(np.asarray(picture.resize((canvas, canvas), Image.Resampling.BICUBIC)))
        return np.stack(pictures)

    def see(self, pictures: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        return small.see(self.vision, small.patchify(pictures), self.grids[pictures.shape[1]])


def _item(text: str | None) -> Item:
    texts, images = ((), ("",)) if text is None else ((text,), ())
    return Item(videos=(), images=images, texts=texts, instruction=None, fps=None, max_frames=None)


def read_many(
    setting: Setting, prompts: Sequence[Prompt], prefix: int, cache: list[small.KeyValue]
) -> Tensor:
    """Final hidden states of text prompts in their order, read in groups of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    size = max(32, len(prompts) // 4)
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    hidden = [
        small.read(setting.text, small.stack_rows([prompts[i] for i in g], prefix), cache, None)[0]
        for g in groups
    ]
    return torch.cat(hidden)[torch.tensor(order).argsort()]


def embed_texts(setting: Setting, texts: Sequence[str]) -> Tensor:
    """Unit vectors ``[N, hidden]``."""
    prompts = [setting.prompt_text(t) for t in texts]
    prefix = small.common_prefix([*prompts, setting.prompt_picture(64)])
    cache = small.read_prefix(setting.text, prompts[0], prefix)
    return F.normalize(read_many(setting, prompts, prefix, cache), dim=-1)


def embed_pictures(setting: Setting, pictures: np.ndarray) -> Tensor:
    """Unit vectors ``[N, hidden]``."""
    prompt = setting.prompt_picture(pictures.shape[1])
    prefix = small.common_prefix([prompt, setting.prompt_text("a")])
    cache = small.read_prefix(setting.text, prompt, prefix)
    rows = small.stack_rows([prompt] * len(pictures), prefix)
    return F.normalize(small.read(setting.text, rows, cache, setting.see(pictures))[0], dim=-1)


@torch.no_grad()
def embed_gallery(setting: Setting, seed: int, canvas: int = 96) -> Tensor:
    """Unit vectors of one rendering of every emoji."""
    rng = random.Random(seed)
    pictures = setting.draw(range(len(setting.sprites)), canvas, rng)
    return torch.cat([embed_pictures(setting, part) for part in np.array_split(pictures, 12)])


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


def judge(
    setting: Setting, texts: Sequence[str], documents: Tensor, pictures: np.ndarray
) -> Tensor:
    """The reranker's logits ``[Q, L]``: ``documents`` ``[Q, L]`` are indices of ``pictures``."""
    canvas = pictures.shape[1]
    prompts = [setting.prompt_pair(text, canvas) for text in texts]
    prefix = small.common_prefix([*prompts, setting.prompt_pair("a", 64)])
    cache = small.read_prefix(setting.text, prompts[0], prefix)
    seen, deep = setting.see(pictures)
    yes, no = (setting.prompter.token_id(t) for t in ("yes", "no"))
    table = setting.text.embed_tokens.weight
    direction = table[yes] - table[no]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    length = documents.shape[1]
    groups = [order[i : i + 10] for i in range(0, len(order), 10)]
    logits = []
    for group in groups:
        rows = small.stack_rows([prompts[i] for i in group for _ in range(length)], prefix)
        at = documents[group].flatten()
        hidden, _ = small.read(setting.text, rows, cache, (seen[at], [d[at] for d in deep]))
        logits.append((hidden @ direction).view(len(group), length))
    return torch.cat(logits)[torch.tensor(order).argsort()]


def reranker_step(setting: Setting, near: Tensor, step: int) -> Tensor:
    """Yes or no for every pair, and the right document first in each list.

    The pictures of a step are neighbours in the embedder's space, ``near`` ``[N, K]``, so that
    what a query must be told apart from is what the embedder takes for it.
    """
    rng = random.Random(f"reranker {SEED} {step}")
    canvas = CANVASES[rng.random() < 0.3]
    count = len(setting.sprites)
    pool: dict[int, None] = {}
    while len(pool) < POOL:
        start = rng.randrange(count)
        group = [start, *rng.sample(near[start].tolist(), 7)]
        pool |= dict.fromkeys(group)
    shown = list(pool)[:POOL]
    place = {emoji: i for i, emoji in enumerate(shown)}
    texts, documents, targets = [], [], []
    for emoji in rng.sample(shown, LISTS):
        text, fits = setting.words.draw(emoji, rng)
        close = [place[e] for e in near[emoji].tolist() if e in place and e not in fits]
        close = close if step >= HARD_FROM else []
        far = [place[e] for e in shown if e not in fits and place[e] not in close]
        wrong = rng.sample(close, min(len(close), LIST_LENGTH - 3))
        wrong += rng.sample(far, LIST_LENGTH - 1 - len(wrong))
        texts.append(text)
        documents.append([place[emoji], *wrong])
        targets.append(0)
    pictures = setting.draw(shown, canvas, rng)
    logits = judge(setting, texts, torch.tensor(documents), pictures)
    answers = torch.zeros_like(logits)
    answers[:, 0] = 1
    weight = torch.where(answers > 0, LIST_LENGTH - 1.0, 1.0) / LIST_LENGTH
    pairs = F.binary_cross_entropy_with_logits(logits, answers, weight)
    return pairs + F.cross_entropy(logits, torch.tensor(targets))


def ranks(scores: Tensor, wordings: Sequence[Wording]) -> np.ndarray:
    """The place, from 1, of the best relevant candidate of each query."""
    best = torch.stack(
        [row[list(w.targets)].max() for row, w in zip(scores, wordings, strict=True)]
    )
    return (scores > best[:, None]).sum(1).numpy() + 1


@torch.no_grad()
def report_embedder(setting: Setting, gallery: Tensor) -> dict[str, float]:
    found = {}
    for group in ("seen", "unseen", "pairs"):
        wordings = getattr(setting.splits, group)[:400]
        place = ranks(embed_texts(setting, [w.text for w in wordings]) @ gallery.T, wordings)
        found[f"{group}_r1"] = float((place <= 1).mean())
        found[f"{group}_r10"] = float((place <= 10).mean())
    return found


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
            logits = judge(setting, [w.text for w in part], places, pictures[used.numpy()])
            best = documents.gather(1, logits.argmax(1, keepdim=True))[:, 0].tolist()
            hits += sum(b in w.targets for b, w in zip(best, part, strict=True))
            before += sum(
                d in w.targets for d, w in zip(documents[:, 0].tolist(), part, strict=True)
            )
        found[f"{group}_before"], found[f"{group}_r1"] = before / len(top), hits / len(top)
    return found


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Jordan et al., 2024), in float32.

    Updates are as large as those of AdamW at the same rate (Liu et al., 2025).
    """

    def __init__(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad)
                update = orthogonal(p.grad + 0.95 * momentum)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrix, about: five steps of Newton and Schulz."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def make_optimizers(
    model: Any, extra: list[torch.nn.Parameter], rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; rare tokens' rows learn faster."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    table = [p for n, p in named.items() if "embed_tokens" in n]
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
    known = {id(p) for p in (*table, *matrices)}
    rest = [p for p in named.values() if id(p) not in known]
    groups = [{"params": [*table, *extra], "factor": 3.0}, {"params": rest, "factor": 1.0}]
    muon = Muon(matrices, rate, 0.05)
    muon.param_groups[0]["factor"] = 1.0
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adam]


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 60) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Log:
    """``log.csv``: one line a report."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, row: dict[str, float]) -> None:
        is_new = not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow({k: round(v, 5) for k, v in row.items()})
        print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), flush=True)


def neighbours(setting: Setting, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """From a trained embedder: the 24 pictures nearest to each emoji's names, and the documents
    that reports rerank."""
    embedder = Setting(
        setting.sprites,
        setting.words,
        setting.splits,
        setting.prompter,
        load_model(folder),
        setting.grids,
    )
    with torch.no_grad():
        gallery = embed_gallery(embedder, SEED + 1)
        by_emoji = torch.zeros_like(gallery)
        names = [w for w in setting.splits.train if w.is_name]
        for start in range(0, len(names), 1024):
            part = names[start : start + 1024]
            vectors = embed_texts(embedder, [w.text for w in part])
            for vector, w in zip(vectors, part, strict=True):
                by_emoji[list(w.targets)] += vector
        scores = F.normalize(by_emoji, dim=-1) @ gallery.T + gallery @ gallery.T
        near = scores.fill_diagonal_(-9).topk(24).indices
        tops = {}
        for group in ("seen", "unseen"):
            texts = [w.text for w in getattr(setting.splits, group)[:REPORTED]]
            tops[group] = (embed_texts(embedder, texts) @ gallery.T).topk(RERANKED).indices
    return near, tops


def freeze_below(model: Any) -> None:
    """Leave only the last layer and the final norm to be trained: steps are twice as fast, and
    what the embedder knows is not torn down by answers that were never learned."""
    text = model.model.language_model
    model.requires_grad_(False)
    text.layers[-1].requires_grad_(True)
    text.norm.requires_grad_(True)


def load_model(folder: Path) -> Any:
    """The trained model of a run, in float32."""
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def train(
    kind: str, out: Path, embedder: Path | None, steps: int, peak: float, resume: bool
) -> None:
    """Run a training from its beginning or from its last saved state."""
    emoji = list_emoji()
    splits = split_wordings(read_wordings(emoji))
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / "log.csv").unlink(missing_ok=True)
        small.write_frame(out, small.train_tokenizer(w.text for w in splits.train))
    start_from = embedder if kind == "reranker" else None
    model = load_model(start_from) if start_from else small.make_model(out, SEED)
    grids = {canvas: small.make_grid(canvas) for canvas in CANVASES}
    words = Words(splits.train, len(emoji))
    setting = Setting(draw_sprites(emoji), words, splits, small.load_prompter(out), model, grids)
    if start_from:
        freeze_below(model)
    model.train()
    scale = torch.nn.Parameter(torch.tensor(math.log(5.0)))
    anchors = torch.nn.Parameter(torch.randn(len(emoji), small.SHAPE.hidden) * 0.1)
    optimizers = make_optimizers(model, [anchors, scale], peak)
    near, tops = neighbours(setting, start_from) if start_from else (torch.empty(0), {})
    log, first, spent = Log(out / "log.csv"), 0, 0.0
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scale.data.copy_(state["scale"])
        anchors.data.copy_(state["anchors"])
        first, spent = state["step"], state["seconds"]
    begun, losses = time.perf_counter() - spent, []
    for step in range(first, steps):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = learning_rate(step, steps, peak) * group["factor"]
        loss = (
            reranker_step(setting, near, step)
            if start_from
            else embedder_step(setting, anchors, scale, step)
        )
        model.zero_grad(set_to_none=True)
        anchors.grad = scale.grad = None
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} loss {np.mean(losses[-20:]):.4f}", flush=True)
        if (step + 1) % REPORT_EVERY and step + 1 < steps:
            continue
        seconds = time.perf_counter() - begun
        if start_from:
            found = report_reranker(setting, tops)
        else:
            found = report_embedder(setting, embed_gallery(setting, SEED + 1))
        log.add({"step": step + 1, "seconds": seconds, "loss": float(np.mean(losses)), **found})
        losses = []
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        state |= {
            "anchors": anchors.data,
            "scale": scale.data,
            "step": step + 1,
            "seconds": seconds,
        }
        torch.save(state, out / "state.tmp")
        (out / "state.tmp").replace(out / "state.pt")
        small.save_weights(model, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_small")
    parser.add_argument("kind", choices=("embedder", "reranker"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--embedder", type=Path, help="the trained embedder a reranker starts from")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    if (options.kind == "reranker") != (options.embedder is not None):
        parser.error("a reranker, and only a reranker, needs --embedder")
    torch.set_num_threads(options.threads)
    train(options.kind, options.out, options.embedder, options.steps, options.rate, options.resume)


if __name__ == "__main__":
    main()
