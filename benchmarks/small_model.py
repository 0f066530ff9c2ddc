"""The small models themselves: shape, tokenizer, files, and a forward pass fit for training.

The modules are transformers' own. Only the order of the work is different: everything before the
caller's text is the same in every prompt and runs once a batch, rows are padded on the right,
where no real token sees them, and the last layer computes the last token alone.
:func:`check_forward` holds it to ``Qwen3VLModel.forward``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from qvlfast.config import load_config
from qvlfast.pixels import Patches
from qvlfast.prompt import EMBED_INSTRUCTION, RERANK_INSTRUCTION, RERANK_SYSTEM, Prompt, Prompter

from .checkpoints import MERGE, PATCH, Shape, config_json, write_processor
from .tokenizer import ADDED_TOKENS, CONTROL_COUNT, SPLIT_PATTERN

VOCABULARY = 5120
SHAPE = Shape(
    hidden=192,
    layers=3,
    ffn=448,
    heads=2,
    kv_heads=1,
    vocab=VOCABULARY,
    vision_hidden=64,
    vision_depth=6,
    vision_ffn=256,
    vision_heads=1,
    deepstack=(1, 3),
    positions=64,
)
PREFIX_TEXTS = (
    f"system\n{EMBED_INSTRUCTION}",
    f"system\n{RERANK_SYSTEM}",
    f"user\n<Instruct>: {RERANK_INSTRUCTION}<Query>:",
    "\n<Document>:",
    "assistant\n",
    "yes",
    "no",
)

KeyValue = tuple[Tensor, Tensor]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of the published kind, with the 26 control tokens after its entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED_TOKENS),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words of the template come in every prompt: each is one token.
    tokenizer.train_from_iterator([*texts, *PREFIX_TEXTS * 1000], trainer)
    special = [AddedToken(t, normalized=False, special=True) for t in ADDED_TOKENS[:CONTROL_COUNT]]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED_TOKENS[CONTROL_COUNT:]])
    return tokenizer


def write_frame(folder: Path, tokenizer: Tokenizer, shape: Shape = SHAPE) -> None:
    """Everything of a checkpoint but its weights."""
    write_processor(folder)
    # A file of its own line for every merge is half as large again, and this is shipped.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    ids = {token: tokenizer.token_to_id(token) for token in ADDED_TOKENS}

    def edit(name: str, changes: dict[str, Any]) -> None:
        document = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        text = json.dumps(document, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = config["added_tokens_decoder"].values()
    edit("tokenizer_config.json", {"added_tokens_decoder": {ids[a["content"]]: a for a in added}})
    edit(
        "preprocessor_config.json", {"size": {"longest_edge": 1_843_200, "shortest_edge": PATCH**2}}
    )
    document = config_json(shape, "bfloat16", "rope_scaling", tied=True)
    for key, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        document[key] = ids[token]
    document["text_config"] |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def make_model(folder: Path, seed: int) -> Any:
    """transformers' ``Qwen3VLForConditionalGeneration`` of the frame in ``folder``, in float32.

    Rows of the embedding begin small, so that the few updates of a rare token move it.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    config = Qwen3VLConfig.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                p.normal_(std=0.1)
            elif "pos_embed" in name:
                p.normal_(std=0.3)
            elif p.ndim > 1:
                out = any(s in name for s in ("o_proj", "down_proj", "attn.proj", "linear_fc2"))
                p.normal_(std=(0.5 if out else 1.0) / p[0].numel() ** 0.5)
            elif "q_norm" in name or "k_norm" in name:
                p.fill_(1.5)  # attention that chooses from the start: the last token is no text
    return model


def save_weights(model: Any, folder: Path) -> None:
    """Write the weights in bfloat16 under the published names."""
    tensors = {
        name: p.detach().to(torch.bfloat16).contiguous()
        for name, p in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_prompter(folder: Path) -> Prompter:
    """qvlfast's own prompts for the frame in ``folder``."""
    return Prompter(folder, load_config(folder))


def blank_patches(canvas: int) -> Patches:
    """Stands for a square picture of ``canvas`` pixels where only its size counts."""
    side = canvas // PATCH
    return Patches(np.empty((0, 0), np.uint8), (1, side, side), (side // MERGE) ** 2)


def patchify(pictures: np.ndarray) -> Tensor:
    """uint8 ``[B, W, W, 3]`` → float32 ``[B, (W/16)², 768]``, normalised, in merge order."""
    count, width = pictures.shape[:2]
    blocks = width // PATCH // MERGE
    x = pictures.reshape(count, blocks, MERGE, PATCH, blocks, MERGE, PATCH, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # block row, block column, row, column, channel
    flat = torch.from_numpy(np.ascontiguousarray(x)).reshape(count, -1, 3 * PATCH**2)
    return flat.float() / 127.5 - 1


@dataclass(frozen=True)
class Grid:
    """What the vision tower knows of a square picture before it sees it.

    Attributes:
        mix: ``[S, P]``, how each of S patches mixes the P learned positions.
        cos, sin: ``[S, head_dim]`` of the rope.
    """

    mix: Tensor
    cos: Tensor
    sin: Tensor


def make_grid(canvas: int, shape: Shape = SHAPE) -> Grid:
    """The :class:`Grid` of pictures that are ``canvas`` pixels wide and high."""
    side = canvas // PATCH
    order = np.arange(side * side).reshape(side // MERGE, MERGE, side // MERGE, MERGE)
    row, column = np.divmod(order.transpose(0, 2, 1, 3).ravel(), side)
    learned = round(shape.positions**0.5)
    at = np.linspace(0, learned - 1, side)
    # One row for each place along a side: the weights of its two neighbours in the table.
    axis = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(learned)))
    mix = (axis[row][:, :, None] * axis[column][:, None, :]).reshape(side * side, -1)
    head_dim = shape.vision_hidden // shape.vision_heads
    frequencies = 1e4 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=1)
    angles = np.tile(angles, (1, 2))
    return Grid(*(torch.from_numpy(a).float() for a in (mix, np.cos(angles), np.sin(angles))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rope: ``x`` is ``[B, H, S, D]``, ``cos`` and ``sin`` broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def see(vision: Any, patches: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
    """The vision tower on B pictures of one size.

    Args:
        vision: ``Qwen3VLVisionModel``.
        patches: ``[B, S, 768]`` of :func:`patchify`.

    Returns:
        ``[B, S/4, hidden]`` for the text model, and as many tensors of that shape as there are
        deepstack levels.
    """
    count, length = patches.shape[:2]
    # Both frames of a still are equal, so the two slices of the weight can be added.
    weight = vision.patch_embed.proj.weight.sum(dim=2).flatten(1)
    x = F.linear(patches, weight, vision.patch_embed.proj.bias)
    x = x + grid.mix @ vision.pos_embed.weight
    deep = []
    for i, block in enumerate(vision.blocks):
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x)).view(count, length, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, grid.cos, grid.sin), rotate(k, grid.cos, grid.sin)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + block.attn.proj(attended.transpose(1, 2).reshape(count, length, -1))
        x = x + block.mlp(block.norm2(x))
        if i in vision.deepstack_visual_indexes:
            merger = vision.deepstack_merger_list[vision.deepstack_visual_indexes.index(i)]
            deep.append(merger(x.flatten(0, 1)).view(count, length // MERGE**2, -1))
    return vision.merger(x.flatten(0, 1)).view(count, length // MERGE**2, -1), deep


@dataclass(frozen=True)
class Rows:
    """Prompts of a batch without their common prefix.

    Attributes:
        ids: int64 ``[B, S]``, padded on the right.
        positions: int64 ``[3, B, S]``.
        last: int64 ``[B]``, where each row's last token is.
        pads: int64 ``[B, V]``, where the visual tokens are; V is 0 without pictures.
    """

    ids: Tensor
    positions: Tensor
    last: Tensor
    pads: Tensor


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """How many ids all prompts begin with, up to the first picture and never a whole prompt."""
    shortest = min(int(min([len(p.ids) - 1, *p.visual_index[:1]])) for p in prompts)
    stacked = np.stack([p.ids[:shortest] for p in prompts])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def stack_rows(prompts: Sequence[Prompt], prefix: int) -> Rows:
    """:class:`Rows` of prompts that share ``prefix`` ids and have equally many visual tokens."""
    lengths = np.array([len(p.ids) - prefix for p in prompts])
    ids = np.zeros((len(prompts), lengths.max()), np.int64)
    positions = np.zeros((3, *ids.shape), np.int64)
    for i, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        ids[i, :length] = prompt.ids[prefix:]
        positions[:, i, :length] = prompt.positions[:, prefix:]
    pads = np.stack([p.visual_index.astype(np.int64) - prefix for p in prompts])
    return Rows(*(torch.from_numpy(a) for a in (ids, positions, lengths - 1, pads)))


def read_prefix(text: Any, prompt: Prompt, prefix: int) -> list[KeyValue]:
    """Keys and values of the common prefix in each layer, each ``[1, 1, P, D]``."""
    ids = torch.from_numpy(prompt.ids[:prefix].astype(np.int64))[None]
    positions = torch.from_numpy(prompt.positions[:, None, :prefix].astype(np.int64))
    none = torch.empty((1, 0), dtype=torch.int64)
    rows = Rows(ids, positions, torch.tensor([prefix - 1]), none)
    return read(text, rows, [], None)[1]


def read(
    text: Any,
    rows: Rows,
    prefix: list[KeyValue],
    visual: tuple[Tensor, list[Tensor]] | None,
    watch: Callable[[int, Tensor], None] | None = None,
    depth: int | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """The text model on rows that go on from a prefix.

    Args:
        text: ``Qwen3VLTextModel``.
        prefix: of :func:`read_prefix`; empty where the rows are whole prompts.
        visual: of :func:`see`, one picture a row.
        watch: called after each layer but the last with its number and ``[B, S, hidden]``.
        depth: stop after so many layers, before the final norm.

    Returns:
        The final hidden state of each row's last token ``[B, hidden]``, and the keys and values.
    """
    count, length = rows.ids.shape
    x = text.embed_tokens(rows.ids)
    every = torch.arange(count)
    places = (every[:, None], rows.pads)
    if visual is not None:
        x = x.index_put(places, visual[0])
    cos, sin = (c[:, None] for c in text.rotary_emb(x, rows.positions))  # [B, 1, S, D]
    before = prefix[0][0].shape[2] if prefix else 0
    keys = torch.arange(before + length)
    causal = keys <= before + torch.arange(length)[:, None]  # [S, P + S]
    until_last = (keys <= before + rows.last[:, None])[:, None, None]  # [B, 1, 1, P + S]
    made: list[KeyValue] = []
    for i, layer in enumerate(text.layers[:depth]):
        attention, is_last = layer.self_attn, i == len(text.layers) - 1
        d = attention.head_dim
        h = layer.input_layernorm(x)
        k = attention.k_norm(attention.k_proj(h).view(count, length, -1, d)).transpose(1, 2)
        k, v = rotate(k, cos, sin), attention.v_proj(h).view(count, length, -1, d).transpose(1, 2)
        made.append((k, v))
        if prefix:
            k, v = (
                torch.cat([old.expand(count, -1, -1, -1), new], 2)
                for old, new in zip(prefix[i], (k, v), strict=True)
            )
        mask, q_cos, q_sin = causal, cos, sin
        if is_last:
            x, h = x[every, rows.last][:, None], h[every, rows.last][:, None]
            mask = until_last
            q_cos, q_sin = (c[every, :, rows.last][:, :, None] for c in (cos, sin))
        q = attention.q_norm(attention.q_proj(h).view(count, h.shape[1], -1, d)).transpose(1, 2)
        q = rotate(q, q_cos, q_sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.o_proj(o.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if visual is not None and i < len(visual[1]):
            x = x.index_put(places, visual[1][i], accumulate=True)
        if watch is not None and not is_last:
            watch(i, x)
    if depth is not None:
        return x[every, rows.last], made
    return text.norm(x)[:, 0], made


@torch.no_grad()
def check_forward(model: Any, prompts: Sequence[Prompt], pictures: np.ndarray | None) -> float:
    """The largest difference from transformers' own forward on the last token's hidden state.

    Args:
        pictures: uint8 ``[B, W, W, 3]``, one for each prompt, or None.
    """
    prefix = common_prefix(prompts)
    text, vision = model.model.language_model, model.model.visual
    visual = None
    inputs: dict[str, Tensor] = {}
    if pictures is not None:
        patches, side = patchify(pictures), pictures.shape[1] // PATCH
        visual = see(vision, patches, make_grid(pictures.shape[1]))
        still = patches.view(*patches.shape[:2], 3, 1, PATCH**2).expand(-1, -1, -1, 2, -1)
        inputs["pixel_values"] = still.reshape(-1, 6 * PATCH**2)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(pictures))
    ours = read(text, stack_rows(prompts, prefix), read_prefix(text, prompts[0], prefix), visual)[0]
    worst = 0.0
    for i, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt.ids.astype(np.int64))[None]
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        one["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        if pictures is not None:
            size = patches.shape[1]
            one["pixel_values"] = inputs["pixel_values"][i * size : (i + 1) * size]
            one["image_grid_thw"] = inputs["image_grid_thw"][i : i + 1]
        theirs = model.model(**one).last_hidden_state[0, -1]
        worst = max(worst, float((ours[i] - theirs).abs().max()))
    return worst
