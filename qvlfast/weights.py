"""Checkpoint tensors by name, as the frozen dataclasses that the forward pass reads.

The names are those of the published checkpoints; a ``model.`` prefix may be absent, as in
checkpoints saved from the bare ``Qwen3VLModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import WEIGHT_DTYPES, Checkpoint, Expected
from .config import ModelConfig, PixelConfig, VisionConfig
from .errors import CheckpointError
from .ops import Linear, Ops, Weight
from .quant import Quantization
from .quant.stored import Stored, find_stored, load_stored, warn_of_widening

KV_PROJ = ("self_attn.k_proj", "self_attn.v_proj")
GATE_UP_PROJ = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class LayerNorm:
    """weight and bias ``[C]``."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class VisionBlock:
    norm1: LayerNorm
    qkv: Linear
    proj: Linear
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class Merger:
    """``norm_merged``: normalise the concatenated patches (deepstack) instead of each patch."""

    norm: LayerNorm
    fc1: Linear
    fc2: Linear
    norm_merged: bool


@dataclass(frozen=True)
class VisionWeights:
    patch_still: Linear
    """Patch embedding of a picture's patches (one frame), see :func:`fold_normalisation`."""
    patch_video: Linear
    """The same of a video's, ``temporal_patch_size`` frames each."""
    positions: Tensor
    """The learned position grid ``[num_positions, C]``, row by row."""
    blocks: tuple[VisionBlock, ...]
    merger: Merger
    deepstack: tuple[Merger, ...]


@dataclass(frozen=True)
class TextLayer:
    input_norm: Tensor
    q_proj: Linear
    kv_proj: Linear
    """k_proj and v_proj, one after the other."""
    q_norm: Tensor
    k_norm: Tensor
    o_proj: Linear
    post_norm: Tensor
    gate_up_proj: Linear
    """gate_proj and up_proj, prepared as ``gated``."""
    down_proj: Linear


@dataclass(frozen=True)
class TextWeights:
    embedding: Tensor
    """``[vocab_size, hidden_size]``"""
    layers: tuple[TextLayer, ...]
    norm: Tensor


@dataclass(frozen=True)
class ModelWeights:
    vision: VisionWeights
    text: TextWeights
    answer_rows: Tensor | None
    """The head's rows of ``yes`` and ``no``, ``[2, hidden_size]`` float32; None in an embedder."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a checkpoint, ``lm_head.weight`` included."""
    text, vision = config.text, config.vision
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, n: int, k: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (n, k)
        if bias:
            shapes[f"{name}.bias"] = (n,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def merger(name: str, norm_size: int) -> None:
        norm(f"{name}.norm", norm_size)
        linear(f"{name}.linear_fc1", vision.merged_size, vision.merged_size, bias=True)
        linear(f"{name}.linear_fc2", vision.out_hidden_size, vision.merged_size, bias=True)

    c = vision.hidden_size
    v = "model.visual"
    shapes[f"{v}.patch_embed.proj.weight"] = (
        c,
        vision.in_channels,
        vision.temporal_patch_size,
        vision.patch_size,
        vision.patch_size,
    )
    shapes[f"{v}.patch_embed.proj.bias"] = (c,)
    shapes[f"{v}.pos_embed.weight"] = (vision.num_positions, c)
    for i in range(vision.depth):
        block = f"{v}.blocks.{i}"
        norm(f"{block}.norm1", c)
        norm(f"{block}.norm2", c)
        linear(f"{block}.attn.qkv", 3 * c, c, bias=True)
        linear(f"{block}.attn.proj", c, c, bias=True)
        linear(f"{block}.mlp.linear_fc1", vision.intermediate_size, c, bias=True)
        linear(f"{block}.mlp.linear_fc2", c, vision.intermediate_size, bias=True)
    merger(f"{v}.merger", c)
    for j in range(len(vision.deepstack_layers)):
        merger(f"{v}.deepstack_merger_list.{j}", vision.merged_size)

    h = text.hidden_size
    t = "model.language_model"
    shapes[f"{t}.embed_tokens.weight"] = (text.vocab_size, h)
    shapes[f"{t}.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (text.vocab_size, h)
    for i in range(text.num_layers):
        layer = f"{t}.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (h,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
        shapes[f"{layer}.self_attn.q_norm.weight"] = (text.head_dim,)
        shapes[f"{layer}.self_attn.k_norm.weight"] = (text.head_dim,)
        linear(f"{layer}.self_attn.q_proj", text.num_heads * text.head_dim, h, bias=False)
        linear(f"{layer}.self_attn.k_proj", text.num_kv_heads * text.head_dim, h, bias=False)
        linear(f"{layer}.self_attn.v_proj", text.num_kv_heads * text.head_dim, h, bias=False)
        linear(f"{layer}.self_attn.o_proj", h, text.num_heads * text.head_dim, bias=False)
        linear(f"{layer}.mlp.gate_proj", text.intermediate_size, h, bias=False)
        linear(f"{layer}.mlp.up_proj", text.intermediate_size, h, bias=False)
        linear(f"{layer}.mlp.down_proj", h, text.intermediate_size, bias=False)
    return shapes


def merged_with(name: str) -> tuple[str, ...]:
    """The linears that are loaded as one with the one of that name, which is among them."""
    for parts in (KV_PROJ, GATE_UP_PROJ):
        for part in parts:
            if name.endswith(f".{part}"):
                return tuple(name.removesuffix(part) + other for other in parts)
    return (name,)


def own_shapes(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """:func:`expected_shapes` by the checkpoint's names, which may lack ``model.``."""
    expected = expected_shapes(config)
    if any(name.startswith("model.") for name in checkpoint.shapes):
        return expected
    return {name.removeprefix("model."): shape for name, shape in expected.items()}


def fold_normalisation(
    weight: Tensor, bias: Tensor, pixels: PixelConfig, dtype: torch.dtype, *, still: bool
) -> tuple[Tensor, Tensor]:
    """Fold (u/255 − mean)/std of uint8 pixels u into the patch embedding.

    The normalisation is affine per channel, so it scales the weight and shifts the bias. The two
    frames of a still are equal, so its temporal slices add up and K halves. The bias is computed
    from the *rounded* weight and kept in float32: the rounding error of a bfloat16 weight then
    acts on centred pixels instead of on raw ones, which halves the error.

    Args:
        weight: ``[C, 3, frames, patch, patch]``.
        bias: ``[C]``.

    Returns:
        Weight ``[C, K]`` in ``dtype`` and bias ``[C]`` in float32; K counts the values of a
        still's patch (one frame) or of a video's.
    """
    mean = torch.tensor(pixels.mean, dtype=torch.float64).view(1, 3, 1)
    std = torch.tensor(pixels.std, dtype=torch.float64).view(1, 3, 1)
    wide = weight.to("cpu", torch.float64)
    wide = wide.sum(dim=2, keepdim=True) if still else wide
    wide = wide.flatten(2)  # [C, 3, frames · patch · patch]
    rounded = (wide / (255.0 * std)).to(dtype)
    shift = (rounded.double() * (255.0 * mean)).sum(dim=(1, 2))
    folded_bias = (bias.to("cpu", torch.float64) - shift).float()
    return rounded.flatten(1).contiguous(), folded_bias


def wanted_tensors(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> dict[str, Expected]:
    """What the files have to hold.

    Args:
        shapes: of :func:`own_shapes`.
        stored: of :func:`qvlfast.quant.stored.find_stored`.
    """
    wanted = {name: Expected(shape) for name, shape in shapes.items() if name not in stored}
    for linear in stored.values():
        wanted |= linear.parts
    return wanted


class _Loader:
    """Takes tensors by their published name, in one dtype, on one device, for one backend."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None,
        stored: Mapping[str, Stored],
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.ops = ops
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.stored = stored

    def raw(self, name: str) -> Tensor:
        return self.checkpoint.tensor(self.prefix + name)

    def __call__(self, name: str) -> Tensor:
        return self.raw(name).to(device=self.device, dtype=self.dtype)

    def linear(self, *names: str, bias: bool, gated: bool = False) -> Linear:
        """Linears of one input, as one."""
        plan = self.quantization
        form = plan.format if plan and all(plan.covers(name) for name in names) else None
        weights = [self.weight(f"{name}.weight") for name in names]
        if form is None and any(isinstance(weight, Tensor) for weight in weights):
            # A file may leave one of them as it was; together they are in one format.
            weights = [self.widened(weight) for weight in weights]
        return self.ops.prepare(
            weights,
            torch.cat([self(f"{name}.bias") for name in names]) if bias else None,
            form=form,
            group=plan.group if plan else 64,
            weight_only=plan is not None and plan.weight_only,
            gated=gated,
        )

    def weight(self, name: str) -> Weight:
        """A linear's weight, as it is stored if the backend computes with that."""
        stored = self.stored.get(self.prefix + name)
        if stored is None:
            return self(name)
        weight = load_stored(self.checkpoint, self.prefix + name, stored, self.dtype)
        if stored.form not in self.ops.keeps:
            weight = self.widened(weight)
        return weight.to(self.device)

    def widened(self, weight: Weight) -> Tensor:
        return weight if isinstance(weight, Tensor) else weight.dequantise().to(self.dtype)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self(f"{name}.weight"), self(f"{name}.bias"))


def _load_vision(load: _Loader, config: VisionConfig, pixels: PixelConfig) -> VisionWeights:
    def merger(name: str, norm_merged: bool) -> Merger:
        return Merger(
            load.norm(f"{name}.norm"),
            load.linear(f"{name}.linear_fc1", bias=True),
            load.linear(f"{name}.linear_fc2", bias=True),
            norm_merged,
        )

    def patch_embed(still: bool) -> Linear:
        weight = load.raw("visual.patch_embed.proj.weight")
        bias = load.raw("visual.patch_embed.proj.bias")
        weight, bias = fold_normalisation(weight, bias, pixels, load.dtype, still=still)
        return load.ops.prepare([weight.to(load.device)], bias.to(load.device))

    def block(name: str) -> VisionBlock:
        return VisionBlock(
            norm1=load.norm(f"{name}.norm1"),
            qkv=load.linear(f"{name}.attn.qkv", bias=True),
            proj=load.linear(f"{name}.attn.proj", bias=True),
            norm2=load.norm(f"{name}.norm2"),
            fc1=load.linear(f"{name}.mlp.linear_fc1", bias=True),
            fc2=load.linear(f"{name}.mlp.linear_fc2", bias=True),
        )

    return VisionWeights(
        patch_still=patch_embed(still=True),
        patch_video=patch_embed(still=False),
        positions=load("visual.pos_embed.weight"),
        blocks=tuple(block(f"visual.blocks.{i}") for i in range(config.depth)),
        merger=merger("visual.merger", norm_merged=False),
        deepstack=tuple(
            merger(f"visual.deepstack_merger_list.{j}", norm_merged=True)
            for j in range(len(config.deepstack_layers))
        ),
    )


def _load_text(load: _Loader, num_layers: int) -> TextWeights:
    def layer(name: str) -> TextLayer:
        return TextLayer(
            input_norm=load(f"{name}.input_layernorm.weight"),
            q_proj=load.linear(f"{name}.self_attn.q_proj", bias=False),
            kv_proj=load.linear(*(f"{name}.{part}" for part in KV_PROJ), bias=False),
            q_norm=load(f"{name}.self_attn.q_norm.weight"),
            k_norm=load(f"{name}.self_attn.k_norm.weight"),
            o_proj=load.linear(f"{name}.self_attn.o_proj", bias=False),
            post_norm=load(f"{name}.post_attention_layernorm.weight"),
            gate_up_proj=load.linear(
                *(f"{name}.{part}" for part in GATE_UP_PROJ), bias=False, gated=True
            ),
            down_proj=load.linear(f"{name}.mlp.down_proj", bias=False),
        )

    return TextWeights(
        embedding=load("language_model.embed_tokens.weight"),
        layers=tuple(layer(f"language_model.layers.{i}") for i in range(num_layers)),
        norm=load("language_model.norm.weight"),
    )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What ``dtype="auto"`` means: the dtype of the token embedding."""
    for name in ("model.language_model.embed_tokens.weight", "language_model.embed_tokens.weight"):
        if checkpoint.dtypes.get(name) in WEIGHT_DTYPES:
            return checkpoint.dtype(name)
    return torch.float32  # loading says what is wrong with it


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    pixels: PixelConfig,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device,
    answer_ids: tuple[int, int] | None,
    quantization: Quantization | None = None,
) -> ModelWeights:
    """Check and load all weights.

    With the reference ops, on the CPU and in the dtype of the file, every large tensor stays the
    mapped file itself.

    Args:
        ops: the backend that the linears are prepared for.
        dtype: of the activations and of all weights that are not quantised.
        answer_ids: vocabulary entries of ``yes`` and ``no`` for a reranker, None for an embedder.
        quantization: what to quantise of the linears that are stored in floating point; and the
            rows of those in int4, stored ones too.

    Raises:
        CheckpointError: a tensor is missing, left over, misshapen or of a wrong type.
    """
    expected = own_shapes(checkpoint, config)
    prefix = "model." if "model.visual.pos_embed.weight" in expected else ""
    # An embedder has no use for the head, and a tied head is the embedding itself; files of both
    # kinds exist with and without it.
    head_optional = answer_ids is None or config.tie_word_embeddings
    stored = find_stored(checkpoint, expected)
    warn_of_widening(stored, ops.keeps, quantization, dtype)
    optional = frozenset({"lm_head.weight"} if head_optional else ())
    checkpoint.require(wanted_tensors(expected, stored), optional)
    embedding = f"{prefix}language_model.embed_tokens.weight"
    load = _Loader(checkpoint, prefix, ops, dtype, device, quantization, stored)
    rows = None
    if answer_ids is not None:
        head = checkpoint.tensor(embedding if config.tie_word_embeddings else "lm_head.weight")
        if max(answer_ids) >= head.shape[0]:
            raise CheckpointError(
                f"the tokenizer puts `yes` and `no` at {answer_ids}, "
                f"the head has {head.shape[0]} rows: tokenizer and weights do not belong together"
            )
        rows = head[list(answer_ids)].to(device=device, dtype=torch.float32)
    return ModelWeights(
        vision=_load_vision(load, config.vision, pixels),
        text=_load_text(load, config.text.num_layers),
        answer_rows=rows,
    )
