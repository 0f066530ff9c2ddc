"""The last layer of the small reranker: how it begins to compare a query with a document.

In the state before it, the token behind the query says what was asked for and the last token what
is shown, both in their first coordinates. The layer brings the one to the other and multiplies
them, which a gated feed-forward net can do exactly: silu(a) b - silu(-a) b = a b.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import small_model as small
from .training import Setting

SHAPE = replace(small.SHAPE, layers=small.SHAPE.layers + 2)
COMPARED = SHAPE.layers - 1  # the layer
COORDINATES = 64
BROUGHT = 8.0  # how large the query is beside what was in its place
SPREAD, LIKELY = 2.0, -2.0  # of the answers' logits: deviation within a list, mean
NOISE = 0.4


@dataclass(frozen=True)
class Judged:
    """What a reranker makes of Q queries with L documents each.

    Attributes:
        logits: ``[Q, L]``, yes against no.
        final: ``[Q, L, hidden]``, the final states that they come from.
        asked: ``[Q, L, hidden]`` before the last layer, behind the query.
        shown: ``[Q, L, hidden]`` there, at the last token.
    """

    logits: Tensor
    final: Tensor
    asked: Tensor
    shown: Tensor


def judge(setting: Setting, texts: list[str], documents: Tensor, pictures: np.ndarray) -> Judged:
    """Read all pairs; ``documents`` ``[Q, L]`` are indices of ``pictures``."""
    canvas = pictures.shape[1]
    prompts = [setting.prompt_pair(text, canvas) for text in texts]
    prefix = small.common_prefix([*prompts, setting.prompt_pair("a", 64)])
    cache = small.read_prefix(setting.text, prompts[0], prefix)
    seen, deep = setting.see(pictures)
    direction = answer_direction(setting)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    length, size = documents.shape[1], max(8, len(prompts) // 4)
    parts: list[list[Tensor]] = [[], [], [], []]
    for group in (order[i : i + size] for i in range(0, len(order), size)):
        rows = small.stack_rows([prompts[i] for i in group for _ in range(length)], prefix)
        at = documents[group].flatten()
        every = torch.arange(len(at))
        kept: dict[int, Tensor] = {}
        visual = (seen[at], [d[at] for d in deep])
        hidden, _ = small.read(setting.text, rows, cache, visual, kept.__setitem__)
        made = (
            hidden @ direction,
            hidden,
            kept[COMPARED - 1][every, rows.pads[:, 0] - 1],
            kept[COMPARED - 1][every, rows.last],
        )
        for part, value in zip(parts, made, strict=True):
            part.append(value.view(len(group), length, *value.shape[1:]))
    back = torch.tensor(order).argsort()
    return Judged(*(torch.cat(part)[back] for part in parts))


def answer_direction(setting: Setting) -> Tensor:
    """``[hidden]``, what the final hidden state is multiplied with: yes against no."""
    yes, no = (setting.prompter.token_id(t) for t in ("yes", "no"))
    table: Tensor = setting.text.embed_tokens.weight
    return table[yes] - table[no]


@torch.no_grad()
def add_comparison(
    setting: Setting, texts: list[str], documents: Tensor, pictures: np.ndarray
) -> None:
    """Set the last layer of the setting's model.

    Args:
        texts, documents, pictures: lists as for :func:`judge`, to measure by.
    """
    layer = setting.text.layers[COMPARED]
    attention, mlp = layer.self_attn, layer.mlp
    behind, last, gathered = _states(setting, texts, documents, pictures)
    generator = torch.Generator().manual_seed(0)
    width, head = last.shape[1], attention.head_dim
    # A direction in which the token behind the query differs from all others.
    target = (torch.arange(len(gathered)) < len(behind)).float()
    square = gathered.T @ gathered
    square.diagonal().add_(1e-3 * square.diagonal().mean())
    mark = torch.linalg.solve(square, gathered.T @ target)
    slow = head // 2 - 1  # the coordinate that the rope turns least
    attention.k_proj.weight.normal_(0, NOISE / (head * width) ** 0.5, generator=generator)
    attention.k_proj.weight[slow] = mark
    attention.q_proj.weight[:head] = 0
    attention.q_proj.weight[slow] = last.mean(0) / last.mean(0).square().sum()
    attention.q_norm.weight.fill_(1)
    attention.k_norm.weight.fill_(1)
    here, there = torch.arange(COORDINATES), torch.arange(COORDINATES, 2 * COORDINATES)
    attention.v_proj.weight[:COORDINATES] = torch.eye(width)[:COORDINATES]
    attention.o_proj.weight[:, :head] = 0
    raw = judge(setting, texts, documents, pictures).shown[..., there].square().mean().sqrt()
    brought = behind[:, here].square().mean().sqrt()
    attention.o_proj.weight[there, here] = BROUGHT * raw / brought
    for sign, units in ((1, here), (-1, there)):
        mlp.gate_proj.weight[units] = sign * torch.eye(width)[there]
        mlp.up_proj.weight[units] = torch.eye(width)[here]
        mlp.down_proj.weight[:, units] = 0
    # The answers are read where the final states differ least from one another.
    table = setting.text.embed_tokens.weight
    yes, no = (setting.prompter.token_id(t) for t in ("yes", "no"))
    final = judge(setting, texts, documents, pictures).final.flatten(0, 1)
    quiet = torch.linalg.eigh((final - final.mean(0)).T @ (final - final.mean(0)))[1][:, 0]
    table[yes] = table[no] + quiet * (table[yes] - table[no]).norm()
    for sign, units in ((1, here), (-1, there)):
        mlp.down_proj.weight[:, units] = sign * 0.01 * quiet[:, None]
    for _ in range(3):
        logits = judge(setting, texts, documents, pictures).logits
        spread = (logits - logits.mean(1, keepdim=True)).std()
        mlp.down_proj.weight[:, torch.cat((here, there))] *= SPREAD / spread
    # The bias of the answers is in what all final states have in common.
    judged = judge(setting, texts, documents, pictures)
    common = judged.final.mean((0, 1))
    table[no] += (judged.logits.mean() - LIKELY) * common / common.square().sum()


def _states(
    setting: Setting, texts: list[str], documents: Tensor, pictures: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """What the last layer's attention reads: behind the queries, at the last tokens, and all of
    it, the first of these before everything else; each ``[N, hidden]``."""
    layer = setting.text.layers[COMPARED]
    length = documents.shape[1]
    prompts = [setting.prompt_pair(text, pictures.shape[1]) for text in texts]
    rows = small.stack_rows([p for p in prompts for _ in range(length)], 0)
    seen, deep = setting.see(pictures)
    at, every = documents.flatten(), torch.arange(documents.numel())
    kept: dict[int, Tensor] = {}
    visual = (seen[at], [d[at] for d in deep])
    small.read(setting.text, rows, [], visual, kept.__setitem__)
    states = layer.input_layernorm(kept[COMPARED - 1])
    marked = rows.pads[:, 0] - 1
    behind = states[every, marked]
    places = torch.arange(states.shape[1])
    others = (places <= rows.last[:, None]) & (places != marked[:, None])
    return behind, states[every, rows.last], torch.cat((behind, states[others]))
