"""What the trainings of the small models share: data, model, optimizers, the loop and its log."""

from __future__ import annotations

import csv
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
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
from .emoji_data import LANGUAGES, SEED, Splits, Wording, draw_sprites, render
from .team import Team

LENGTH = 8192
CANVASES = (64, 96)
LANGUAGE_WEIGHTS = [2.0 if language == "en" else 1.0 for language in LANGUAGES]
NAME_SHARE, JOINED_SHARE, CASE_SHARE = 0.45, 0.15, 0.1
REPORT_EVERY = 100


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
    team: Team

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

    def draw(
        self, emoji: Sequence[int], canvas: int, rng: random.Random, variety: float = 1.0
    ) -> np.ndarray:
        """uint8 ``[B, canvas, canvas, 3]``; some were drawn at another size and resized."""
        pictures = []
        for i in emoji:
            size = canvas if rng.random() < 0.7 else rng.randint(56, 128)
            picture = render(self.sprites[i], size, rng, variety)
            pictures.append(np.asarray(picture.resize((canvas, canvas), Image.Resampling.BICUBIC)))
        return np.stack(pictures)

    def see(self, pictures: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        return small.see(self.vision, small.patchify(pictures), self.grids[pictures.shape[1]])


def draw_canvas(step: int) -> int:
    """The size of a step's pictures, the same for the whole team, or one would wait for others."""
    return random.Random(f"canvas {SEED} {step}").choice(CANVASES)


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


def ranks(scores: Tensor, wordings: Sequence[Wording]) -> np.ndarray:
    """The place, from 1, of the best relevant candidate of each query."""
    best = torch.stack(
        [row[list(w.targets)].max() for row, w in zip(scores, wordings, strict=True)]
    )
    return (scores > best[:, None]).sum(1).numpy() + 1


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Jordan et al., 2024), in float32.

    Updates are as large as those of AdamW at the same rate (Liu et al., 2025).
    """

    def __init__(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
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
    patches = [p for n, p in named.items() if "patch_embed" in n]  # of small weights
    known = {id(p) for p in (*table, *matrices, *patches)}
    rest = [p for p in named.values() if id(p) not in known]
    groups = [
        {"params": [*table, *extra], "factor": 3.0},
        {"params": rest, "factor": 1.0},
        {"params": patches, "factor": 0.1},
    ]
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
    """A CSV file with one line a report."""

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


def make_setting(
    team: Team, out: Path, model: Any, emoji: Sequence[str], splits: Splits
) -> Setting:
    """The setting of a run whose frame is in ``out``."""
    grids = {canvas: small.make_grid(canvas) for canvas in CANVASES}
    words = Words(splits.train, len(emoji))
    prompter = small.load_prompter(out)
    return Setting(draw_sprites(emoji), words, splits, prompter, model, grids, team)


@dataclass(frozen=True)
class Run:
    """A training of ``steps`` steps at the learning rate ``peak``.

    ``OUT/NAME.pt`` holds its state, ``OUT/NAME.csv`` its log; both are renewed at every report.

    Attributes:
        is_even: everything learns at the same rate, see :func:`make_optimizers`.
    """

    out: Path
    name: str
    steps: int
    peak: float
    is_even: bool = False

    @property
    def state(self) -> Path:
        return self.out / f"{self.name}.pt"

    @property
    def log(self) -> Path:
        return self.out / f"{self.name}.csv"

    def forget(self) -> None:
        """Begin anew."""
        self.state.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)


def train(
    team: Team,
    run: Run,
    model: Any,
    extra: dict[str, torch.nn.Parameter],
    loss_of: Callable[[int], Tensor],
    report: Callable[[], dict[str, float]],
    after_report: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train a model, from its beginning or from where the run was stopped.

    Args:
        extra: what is trained besides the model.
        loss_of: the loss of a step, by its number alone.
        report: scores to log beside the loss.
        after_report: called when the state is written.
        after_step: called when the optimizers have changed the weights.
    """
    model.train()
    optimizers = make_optimizers(model, list(extra.values()), run.peak)
    log, first, spent = Log(run.log), 0, 0.0
    if run.state.exists():
        state = torch.load(run.state, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, p in extra.items():
            p.data.copy_(state[name])
        first, spent = state["step"], state["seconds"]
    team.wait()
    begun, losses = time.perf_counter() - spent, []
    for step in range(first, run.steps):
        for group in (g for o in optimizers for g in o.param_groups):
            factor = 1.0 if run.is_even else group["factor"]
            group["lr"] = learning_rate(step, run.steps, run.peak) * factor
        loss = loss_of(step)
        model.zero_grad(set_to_none=True)
        for p in extra.values():
            p.grad = None
        loss.backward()
        team.average((*model.parameters(), *extra.values()))
        for optimizer in optimizers:
            optimizer.step()
        after_step()
        losses.append(loss.item())
        if not team.leads:
            continue
        if (step + 1) % 20 == 0:
            print(f"{run.name}: step {step + 1} loss {np.mean(losses[-20:]):.4f}", flush=True)
        if (step + 1) % REPORT_EVERY and step + 1 < run.steps:
            continue
        seconds = time.perf_counter() - begun
        log.add({"step": step + 1, "seconds": seconds, "loss": float(np.mean(losses)), **report()})
        losses = []
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        state |= {name: p.data for name, p in extra.items()}
        new = run.state.with_suffix(".tmp")
        torch.save(state | {"step": step + 1, "seconds": seconds}, new)
        new.replace(run.state)
        after_report()
    team.wait()


def load_model(folder: Path) -> Any:
    """The trained model of a run, in float32."""
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
