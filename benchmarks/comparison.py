"""The last layer of the small reranker: it compares what was asked for with what is shown.

In the state before it, the first token behind the query says what was asked for and the last token
what is shown, both in their first coordinates. The last token's query and the other's key are these
coordinates, so their product, normalised as Qwen3 does, is a cosine. A token before the query
has a key whose product is a threshold, and all others have one that is far below: what the last
token attends to is a sigmoid of the cosine, and that is the answer.

Nothing of this is trained. The few channels that it needs belong to it alone: no other layer
writes to them (:func:`reserve`), and what they hold at first depends on a token's id alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qvlfast.prompt import Prompt

from . import small_model as small
from .training import Setting

# Narrower than the embedder, or what ships were too large.
SHAPE = replace(small.SHAPE, layers=small.SHAPE.layers + 2, ffn=416)
COMPARED = SHAPE.layers - 1  # the layer
COORDINATES = 64
# Tokens of the template, each once in a prompt, whatever the query and the instruction are.
ASKED, BEFORE = "<Document", "<Instruct"
RESERVED = 5
MARK, SINK, OTHER, ANSWER, LEVEL = range(-RESERVED, 0)  # channels of the hidden state
# Coordinates of a head. The rope turns those of a state by less than a milliradian a token, the
# others not at all. Pairs that turn together are half a head apart.
_HALF = SHAPE.head_dim // 2
_SLOW = _HALF - COORDINATES // 2 - 4
_STATE = torch.cat([torch.arange(_SLOW, _SLOW + COORDINATES // 2) + i for i in (0, _HALF)])
_THRESHOLD, _REST = _HALF - 4, _HALF - 3
_SHARE = 0.25  # of a threshold of 1 in a query before its norm: little, so that states hardly count
_PURE = 50.0  # a key's mark beside the state in it
_FAR = 25.0  # attention's logits of the tokens that are not compared
_STEEP = 5.0  # the sigmoid's argument over the distance of right and wrong documents
_RANGE = 0.6  # of the answers' logits: within ten times that
_LEVEL_SIZE = 200.0  # so large that the final norm is the same for all states


@dataclass(frozen=True)
class Judged:
    """What a reranker makes of Q queries with L documents each.

    Attributes:
        logits: ``[Q, L]``, yes against no; None where it was not asked for.
        asked: ``[Q, hidden]`` as the last layer reads it, behind the query.
        shown: ``[Q, L, hidden]`` there, at the last token.
    """

    logits: Tensor | None
    asked: Tensor
    shown: Tensor

    def cosines(self) -> Tensor:
        """``[Q, L]``, what the logits should order documents by."""
        asked, shown = self.asked[:, None, :COORDINATES], self.shown[..., :COORDINATES]
        return F.cosine_similarity(asked, shown, dim=-1)


def judge(
    setting: Setting,
    texts: list[str],
    documents: Tensor,
    pictures: np.ndarray,
    answer: bool = True,
) -> Judged:
    """Read all pairs; ``documents`` ``[Q, L]`` are indices of ``pictures``."""
    canvas = pictures.shape[1]
    prompts = [setting.prompt_pair(text, canvas) for text in texts]
    prefix = small.common_prefix([*prompts, setting.prompt_pair("a", 64)])
    cache = small.read_prefix(setting.text, prompts[0], prefix)
    seen, deep = setting.see(pictures)
    norm = setting.text.layers[COMPARED].input_layernorm
    direction = answer_direction(setting)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    length, size = documents.shape[1], max(8, len(prompts) // 4)
    asked, shown, logits = [], [], []
    for group in (order[i : i + size] for i in range(0, len(order), size)):
        rows = small.stack_rows([prompts[i] for i in group for _ in range(length)], prefix)
        at = documents[group].flatten()
        every = torch.arange(len(at))
        kept: dict[int, Tensor] = {}
        visual = (seen[at], [d[at] for d in deep])
        depth = None if answer else COMPARED
        hidden, _ = small.read(setting.text, rows, cache, visual, kept.__setitem__, depth)
        state = kept[COMPARED - 1]
        shown.append(norm(state[every, rows.last]).unflatten(0, (len(group), length)))
        # Until it meets the picture, the query is the same in all its rows.
        first = every[::length]
        asked.append(norm(state[first, _place(setting, rows.ids[first])]))
        logits.append((hidden @ direction).view(len(group), length) if answer else None)
    back = torch.tensor(order).argsort()
    answers = torch.cat([x for x in logits if x is not None])[back] if answer else None
    return Judged(answers, torch.cat(asked)[back], torch.cat(shown)[back])


def ask(setting: Setting, texts: list[str]) -> Tensor:
    """What was asked for, as :func:`judge` finds it, without any document: ``[N, hidden]``."""
    prompts = []
    for text in texts:
        whole = setting.prompt_pair(text, 64)
        stop = int(_place(setting, torch.from_numpy(whole.ids)[None])) + 1
        none = np.empty(0, np.int64)
        prompts.append(Prompt(whole.ids[:stop], whole.positions[:, :stop], (), none))
    prefix = small.common_prefix([*prompts, setting.prompt_pair("a", 64)])
    cache = small.read_prefix(setting.text, prompts[0], prefix)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    size = max(32, len(prompts) // 3)
    parts = [
        small.read(
            setting.text,
            small.stack_rows([prompts[i] for i in order[start : start + size]], prefix),
            cache,
            None,
            depth=COMPARED,
        )[0]
        for start in range(0, len(order), size)
    ]
    states = torch.cat(parts)[torch.tensor(order).argsort()]
    asked: Tensor = setting.text.layers[COMPARED].input_layernorm(states)
    return asked


def _place(setting: Setting, ids: Tensor) -> Tensor:
    """``[B]``, where the token behind the query is in ids ``[B, S]``."""
    found = ids == setting.prompter.token_id(ASKED)
    # A caller may have written the same; the template's comes last.
    return ids.shape[1] - 1 - found.flip(1).int().argmax(1)


def answer_direction(setting: Setting) -> Tensor:
    """``[hidden]``, what the final hidden state is multiplied with: yes against no."""
    yes, no = (setting.prompter.token_id(t) for t in ("yes", "no"))
    table: Tensor = setting.text.embed_tokens.weight
    return table[yes] - table[no]


@torch.no_grad()
def reserve(setting: Setting) -> None:
    """Take the reserved channels from all layers before the last, and mark the tokens.

    To be called whenever an optimizer has changed the weights.
    """
    table = setting.text.embed_tokens.weight
    table[:, -RESERVED:] = 0
    table[:, OTHER] = 1
    for token, channel in ((ASKED, MARK), (BEFORE, SINK)):
        row = table[setting.prompter.token_id(token)]
        row[OTHER], row[channel] = 0, 1
    for token, value in (("yes", 0.5), ("no", -0.5)):
        table[setting.prompter.token_id(token), ANSWER] = value
    for layer in setting.text.layers[:COMPARED]:
        layer.self_attn.o_proj.weight[-RESERVED:] = 0
        layer.mlp.down_proj.weight[-RESERVED:] = 0
    vision = setting.vision
    for merger in (vision.merger, *vision.deepstack_merger_list):
        merger.linear_fc2.weight[-RESERVED:] = 0
        merger.linear_fc2.bias[-RESERVED:] = 0
    vision.merger.linear_fc2.bias[OTHER] = 1  # what it makes replaces a token's row


@torch.no_grad()
def set_comparison(
    setting: Setting, texts: list[str], documents: Tensor, pictures: np.ndarray
) -> None:
    """Set the last layer, by how large states are and how far right and wrong ones are apart.

    Args:
        texts, documents, pictures: lists as for :func:`judge`, each with the right document first.
    """
    layer, final = setting.text.layers[COMPARED], setting.text.norm
    attention = layer.self_attn
    judged = judge(setting, texts, documents, pictures, answer=False)
    cosines = judged.cosines()
    wrong, right = cosines[:, 1:].mean(), cosines[:, 0].mean()
    gap = (right - wrong).clamp(min=0.25)  # before training they are hardly apart
    steep = _STEEP / gap
    heads, size = SHAPE.heads, SHAPE.head_dim
    thresholds = wrong + gap * (torch.arange(heads) + 1) / (heads + 1)

    def typical(states: Tensor) -> Tensor:
        return states[..., :COORDINATES].square().sum(-1).mean().sqrt()

    before = _before(setting, texts[0], pictures)
    constant = judged.shown[..., OTHER].mean()
    for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        p.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    query = attention.q_proj.weight.view(heads, size, -1)
    key, value, out = (p.weight for p in (attention.k_proj, attention.v_proj, attention.o_proj))
    every = torch.arange(COORDINATES)
    query[:, _STATE, every] = 1
    key[_STATE, every] = 1
    share = _SHARE * typical(judged.shown) / constant
    query[:, _THRESHOLD, OTHER] = share * thresholds
    query[:, _REST, OTHER] = -share
    key[_THRESHOLD, SINK] = _PURE * typical(before) / before[SINK]
    key[_REST, OTHER] = _PURE * typical(judged.shown) / constant
    scale = size**-0.5
    attention.q_norm.weight.fill_(0)
    attention.q_norm.weight[_STATE] = steep * scale
    attention.q_norm.weight[_THRESHOLD] = steep * scale / _SHARE
    attention.q_norm.weight[_REST] = _FAR * scale / _SHARE
    attention.k_norm.weight.fill_(1)
    # How much the last token attends to the one and to the other: the difference is the answer, and
    # the sum is 1. A row of one weight, or of equal ones, stays what it is when it is quantised.
    into = out.view(-1, heads, size)
    for i, (channel, state, sign) in enumerate(((MARK, judged.asked, 1), (SINK, before, -1))):
        value[i, channel] = 1 / state[..., channel].mean()
        into[ANSWER, :, i] = sign * _LEVEL_SIZE / heads
        into[LEVEL, :, i] = _LEVEL_SIZE / heads
    final.weight.zero_()
    final.weight[ANSWER] = _RANGE


def _before(setting: Setting, text: str, pictures: np.ndarray) -> Tensor:
    """``[hidden]`` of the token before the query, as the last layer reads it."""
    rows = small.stack_rows([setting.prompt_pair(text, pictures.shape[1])], 0)
    seen, deep = setting.see(pictures[:1])
    kept: dict[int, Tensor] = {}
    small.read(setting.text, rows, [], (seen, deep), kept.__setitem__, COMPARED)
    at = int((rows.ids[0] == setting.prompter.token_id(BEFORE)).int().argmax())
    state: Tensor = setting.text.layers[COMPARED].input_layernorm(kept[COMPARED - 1][0, at])
    return state
