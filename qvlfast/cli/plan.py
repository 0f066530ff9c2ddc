"""How much memory a checkpoint takes when it is loaded and run, from its headers alone.

The activations are those of the reference ops at their largest moment, counted from the code. In
bytes, with b the bytes of one value of the model's dtype:

    one token  = 16·ffn + (4·hidden + (2·heads + 2·kv_heads)·head_dim)·b + 4·head_dim
    one patch  = (8 + b')·ffn_v + (8·hidden_v + levels·hidden/merge²)·b + 2·head_dim_v + pixels
    visual     = hidden/merge²·(levels + 1)·b for each patch
    activations = max(patches · patch,  tokens · token + patches · visual)

16·ffn is SwiGLU in float32: gate and up, their float32 forms, and the product, where the copies
that a 16-bit model makes and those a float32 model needs not make come to the same. (8 + b')·ffn_v
is GELU, b' being 2 for a 16-bit model and 0 for float32. Pixels are 1 byte each, two frames a
patch in videos. A batch holds at most ``tokens`` and ``patches``, except that a larger single input
runs alone: so the larger of the budget and the length limit counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Python, torch and the tokenizer were measured at 0.45 GiB on a CPU; pixels that wait for the
# model take up to 0.2 GiB more. A CUDA context and its libraries take about 0.6 GiB of the GPU.
_FIXED = {"cpu": 0.65 * 2**30, "cuda": 0.6 * 2**30}


@dataclass(frozen=True)
class Part:
    """Some tensors that belong together.

    Attributes:
        name: for a reader.
        parameters: how many numbers.
        loaded: how many of them a loaded model keeps.
    """

    name: str
    parameters: int
    loaded: int


@dataclass(frozen=True)
class Plan:
    """Bytes on the device."""

    weights: int
    activations: int
    fixed: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.fixed


def parts(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> list[Part]:
    """The tensors of a checkpoint, grouped.

    Args:
        shapes: name → shape of every tensor.
    """
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        group = _group(name)
        counts[group] = counts.get(group, 0) + prod(shape)
    found = []
    for group in ("vision tower", "mergers", "token embedding", "decoder layers", "head"):
        count = counts.get(group, 0)
        if count:
            # A head is read for two of its rows; a still's patch weights are kept beside a video's.
            extra = _still_weights(config) if group == "vision tower" else 0
            loaded = 0 if group == "head" else count + extra
            found.append(Part(group, count, loaded))
    return found


def _still_weights(config: ModelConfig) -> int:
    vision = config.vision
    return vision.hidden_size * vision.in_channels * vision.patch_size**2


def _group(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return "head"
    if name.startswith("visual."):
        return "mergers" if "merger" in name else "vision tower"
    return "token embedding" if "embed_tokens" in name else "decoder layers"


def activation_bytes(config: ModelConfig, dtype: str, tokens: int, patches: int) -> int:
    """Bytes of the largest moment of a forward pass; the formula is in this module's docstring."""
    text, vision = config.text, config.vision
    b = DTYPE_BYTES[dtype]
    merged = vision.spatial_merge_size**2
    levels = len(vision.deepstack_layers)
    heads = 2 * text.num_heads + 2 * text.num_kv_heads
    token = 16 * text.intermediate_size + 4 * text.head_dim
    token += (4 * text.hidden_size + heads * text.head_dim) * b
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patch = (8 + (b if b == 2 else 0)) * vision.intermediate_size
    patch += (8 * vision.hidden_size + levels * text.hidden_size // merged) * b
    patch += 2 * vision.head_dim + pixels
    visual = text.hidden_size // merged * (levels + 1) * b
    return max(patches * patch, tokens * token + patches * visual)


def make_plan(
    config: ModelConfig,
    found: list[Part],
    *,
    dtype: str,
    device: str,
    tokens: int,
    patches: int,
) -> Plan:
    """Bytes on ``device`` (``cpu`` or ``cuda``) with weights in ``dtype``.

    Args:
        tokens, patches: the most that one forward pass holds.
    """
    return Plan(
        weights=sum(part.loaded for part in found) * DTYPE_BYTES[dtype],
        activations=activation_bytes(config, dtype, tokens, patches),
        fixed=int(_FIXED[device]),
    )
