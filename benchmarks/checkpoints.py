"""Synthetic checkpoints: the published file layout and tensor names around random weights.

The folder that :func:`write_checkpoint` makes loads in this package and in transformers like a
downloaded Qwen3-VL-Embedding or Qwen3-VL-Reranker; only the vectors mean nothing. Every tensor is
seeded by its own name, so neither the number of shards nor the order changes a value.

    python -m benchmarks.checkpoints OUT --shape tiny
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from .tokenizer import TemplateFile, added_token_ids, write_tokenizer

Kind = Literal["embedder", "reranker"]
Spelling = Literal["rope_parameters", "rope_scaling"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATCH, TEMPORAL, MERGE = 16, 2, 2
# Values drawn at once, so that the largest table costs little more memory than itself.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint; the defaults are those of ``tiny``."""

    hidden: int = 128
    layers: int = 4
    ffn: int = 320
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    vocab: int = 151936
    tied: bool = True
    vision_hidden: int = 128
    vision_depth: int = 4
    vision_ffn: int = 256
    vision_heads: int = 2
    deepstack: tuple[int, ...] = (0, 1, 2)
    positions: int = 2304


SHAPES: dict[str, Shape] = {
    "tiny": Shape(),
    # Nothing here is a multiple of 64 that need not be, and the vision head dim is the 8B's.
    "odd": Shape(
        hidden=160,
        layers=3,
        ffn=336,
        heads=8,
        kv_heads=2,
        mrope_section=(26, 19, 19),
        vocab=151680,
        tied=False,
        vision_hidden=144,
        vision_depth=3,
        vision_ffn=272,
        vision_heads=2,
        deepstack=(0, 2),
        positions=100,
    ),
    "2b": Shape(
        hidden=2048,
        layers=28,
        ffn=6144,
        heads=16,
        kv_heads=8,
        vision_hidden=1024,
        vision_depth=24,
        vision_ffn=4096,
        vision_heads=16,
        deepstack=(5, 11, 17),
    ),
    "8b": Shape(
        hidden=4096,
        layers=36,
        ffn=12288,
        heads=32,
        kv_heads=8,
        tied=False,
        vision_hidden=1152,
        vision_depth=27,
        vision_ffn=4304,
        vision_heads=16,
        deepstack=(8, 16, 24),
    ),
}


def resolve_shape(shape: str | Mapping[str, Any]) -> Shape:
    """A named shape, or ``tiny`` with some fields replaced.

    Raises:
        ValueError: an unknown name or field.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"shape {shape!r} is unknown: give one of {', '.join(SHAPES)}")
        return SHAPES[shape]
    known = {field.name for field in fields(Shape)}
    unknown = sorted(set(shape) - known)
    if unknown:
        raise ValueError(f"shape field {unknown[0]!r} is unknown: give {', '.join(sorted(known))}")
    return Shape(**shape)


def config_json(shape: Shape, dtype: str, spelling: Spelling, *, tied: bool) -> dict[str, Any]:
    """``config.json`` as transformers 5 (``rope_parameters``) or 4.57 (``rope_scaling``) writes."""
    ids = added_token_ids()
    rope = {
        "mrope_interleaved": True,
        "mrope_section": list(shape.mrope_section),
        "rope_type": "default",
    }
    text: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    vision: dict[str, Any] = {
        "deepstack_visual_indexes": list(shape.deepstack),
        "depth": shape.vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.vision_hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": shape.vision_ffn,
        "model_type": "qwen3_vl",
        "num_heads": shape.vision_heads,
        "num_position_embeddings": shape.positions,
        "out_hidden_size": shape.hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }
    document: dict[str, Any] = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": tied,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }
    if spelling == "rope_parameters":
        text["rope_parameters"] = {**rope, "rope_theta": 5000000}
        text["dtype"] = document["dtype"] = dtype
        vision["model_type"] = "qwen3_vl_vision"
    else:
        text |= {"rope_scaling": rope, "rope_theta": 5000000, "tie_word_embeddings": tied}
        text["dtype"] = dtype
        document["transformers_version"] = "4.57.0.dev0"
    return document


@dataclass(frozen=True)
class Spec:
    """One tensor: its shape, and the normal distribution that its values are drawn from."""

    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def tensor_specs(shape: Shape, *, tied: bool) -> dict[str, Spec]:
    """Name → :class:`Spec` of every tensor of the checkpoint, in the order of the forward pass.

    Matrices keep the variance of what passes through them. The norms of queries and keys are
    around 1.5, which makes attention choose rather than average: otherwise the last token,
    the same in every prompt, would give nearly the same vector for every input.
    """
    specs: dict[str, Spec] = {}

    def norm(name: str, size: int, *, mean: float = 1.0, bias: bool = True) -> None:
        specs[f"{name}.weight"] = Spec((size,), mean, 0.1)
        if bias:
            specs[f"{name}.bias"] = Spec((size,), 0.0, 0.1)

    def linear(name: str, n: int, k: int, *, bias: bool = True, gain: float = 1.0) -> None:
        specs[f"{name}.weight"] = Spec((n, k), 0.0, gain / k**0.5)
        if bias:
            specs[f"{name}.bias"] = Spec((n,), 0.0, 0.1)

    c, merged = shape.vision_hidden, shape.vision_hidden * MERGE**2

    def merger(name: str, norm_size: int) -> None:
        norm(f"{name}.norm", norm_size)
        linear(f"{name}.linear_fc1", merged, merged)
        linear(f"{name}.linear_fc2", shape.hidden, merged, gain=1.5)

    vision = "model.visual"
    pixels = (3, TEMPORAL, PATCH, PATCH)
    fan_in = int(np.prod(pixels))
    # Neighbouring pixels are alike, so their sum is larger than that of independent values.
    specs[f"{vision}.patch_embed.proj.weight"] = Spec((c, *pixels), 0.0, 2.0 / fan_in**0.5)
    specs[f"{vision}.patch_embed.proj.bias"] = Spec((c,), 0.0, 0.1)
    specs[f"{vision}.pos_embed.weight"] = Spec((shape.positions, c), 0.0, 0.5)
    for i in range(shape.vision_depth):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", c)
        linear(f"{block}.attn.qkv", 3 * c, c, gain=1.5)
        linear(f"{block}.attn.proj", c, c, gain=0.5)
        norm(f"{block}.norm2", c)
        linear(f"{block}.mlp.linear_fc1", shape.vision_ffn, c)
        linear(f"{block}.mlp.linear_fc2", c, shape.vision_ffn, gain=0.5)
    merger(f"{vision}.merger", c)
    for i in range(len(shape.deepstack)):
        merger(f"{vision}.deepstack_merger_list.{i}", merged)

    text, d = "model.language_model", shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # The table is also the head: rows of norm 1 keep the scores of a reranker off 0 and 1.
    specs[f"{text}.embed_tokens.weight"] = Spec((shape.vocab, d), 0.0, d**-0.5)
    for i in range(shape.layers):
        layer = f"{text}.layers.{i}"
        norm(f"{layer}.input_layernorm", d, bias=False)
        linear(f"{layer}.self_attn.q_proj", q, d, bias=False)
        linear(f"{layer}.self_attn.k_proj", kv, d, bias=False)
        linear(f"{layer}.self_attn.v_proj", kv, d, bias=False)
        norm(f"{layer}.self_attn.q_norm", shape.head_dim, mean=1.5, bias=False)
        norm(f"{layer}.self_attn.k_norm", shape.head_dim, mean=1.5, bias=False)
        linear(f"{layer}.self_attn.o_proj", d, q, bias=False)
        norm(f"{layer}.post_attention_layernorm", d, bias=False)
        linear(f"{layer}.mlp.gate_proj", shape.ffn, d, bias=False)
        linear(f"{layer}.mlp.up_proj", shape.ffn, d, bias=False)
        linear(f"{layer}.mlp.down_proj", d, shape.ffn, bias=False)
    norm(f"{text}.norm", d, bias=False)
    if not tied:
        specs["lm_head.weight"] = Spec((shape.vocab, d), 0.0, d**-0.5)
    return specs


def draw(name: str, spec: Spec, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of one tensor, which depend on its name, its spec and the seed alone."""
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    values = torch.empty(spec.size, dtype=dtype)
    for start in range(0, spec.size, _CHUNK):
        part = rng.standard_normal(min(_CHUNK, spec.size - start), dtype=np.float32)
        part *= np.float32(spec.std)
        part += np.float32(spec.mean)
        values[start : start + part.size] = torch.from_numpy(part)
    return values.reshape(spec.shape)


def plan_shards(specs: Mapping[str, Spec], shards: int) -> Iterator[list[str]]:
    """Cut the names, in order, into ``shards`` non-empty groups of about equal size."""
    if not 1 <= shards <= len(specs):
        raise ValueError(f"shards is {shards}, expected 1 to {len(specs)}")
    total, done, group, left = sum(s.size for s in specs.values()), 0, [], shards
    names = list(specs)
    for i, name in enumerate(names):
        group.append(name)
        done += specs[name].size
        full = done * shards >= total * (shards - left + 1)
        if left > 1 and (full or len(names) - i - 1 == left - 1):
            yield group
            group, left = [], left - 1
    yield group


def write_checkpoint(
    folder: Path | str,
    shape: str | Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    spelling: Spelling = "rope_parameters",
    tied: bool | None = None,
    kind: Kind = "embedder",
    template_file: TemplateFile = "chat_template.json",
) -> Path:
    """Write a complete checkpoint folder and return it.

    Args:
        folder: made if it is not there.
        shape: a name in :data:`SHAPES`, or fields of :class:`Shape` that differ from ``tiny``.
        seed: other seeds give other weights.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        shards: number of safetensors files; more than one come with an index. Only one is in
            memory at a time.
        spelling: how ``config.json`` names the rope settings.
        tied: whether the head is the embedding table; None as the shape says.
        kind: what the model card says; both kinds have the same tensors.
        template_file: where the chat template is written.

    Raises:
        ValueError: an unknown shape or dtype, or an impossible number of shards.
    """
    sizes = resolve_shape(shape)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: give one of {', '.join(DTYPES)}")
    is_tied = sizes.tied if tied is None else tied
    folder = Path(folder)
    write_processor(folder, template_file=template_file)
    _write_json(folder / "config.json", config_json(sizes, dtype, spelling, tied=is_tied))
    task = "feature-extraction" if kind == "embedder" else "text-ranking"
    card = f"---\npipeline_tag: {task}\n---\nRandom weights for tests: the vectors mean nothing.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")

    specs = tensor_specs(sizes, tied=is_tied)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(plan_shards(specs, shards), start=1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        tensors = {name: draw(name, specs[name], seed, DTYPES[dtype]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if shards > 1:
        total = sum(spec.size for spec in specs.values()) * DTYPES[dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return folder


def write_processor(
    folder: Path | str, *, template_file: TemplateFile = "chat_template.json"
) -> None:
    """Write what a prompt needs into ``folder``: tokenizer, chat template, pixel settings."""
    folder = Path(folder)
    write_tokenizer(folder, template_file=template_file)
    common = {
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {
        **common,
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {
        **common,
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    _write_json(folder / "preprocessor_config.json", image)
    _write_json(folder / "video_preprocessor_config.json", video)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description="Write a synthetic checkpoint."
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument(
        "--spelling", choices=("rope_parameters", "rope_scaling"), default="rope_parameters"
    )
    parser.add_argument("--kind", choices=("embedder", "reranker"), default="embedder")
    options = parser.parse_args(arguments)
    write_checkpoint(
        options.out,
        options.shape,
        seed=options.seed,
        dtype=options.dtype,
        shards=options.shards,
        spelling=options.spelling,
        kind=options.kind,
    )
    print(f"{options.out}: {options.shape}, {options.dtype}, seed {options.seed}")


if __name__ == "__main__":
    main()
