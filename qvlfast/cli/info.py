"""Describe a checkpoint and the memory it needs, without loading it.

Reads config.json and the headers of the weights. The plan holds for the longest inputs and full
batches; smaller ones take less.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import byte_count, positive_int

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..config import ModelConfig
    from .plan import Part, Plan

# How config.json and safetensors write the dtypes.
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="a checkpoint folder or a cached hub id")
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="plan for auto, cpu, cuda or cuda:1"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=byte_count,
        help="of that device, such as 8G; default: what this machine's has",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="plan for one dtype alone; auto shows all and marks the checkpoint's own",
    )
    parser.add_argument("--batch-tokens", metavar="N", type=positive_int, default=16_384)
    parser.add_argument("--batch-patches", metavar="N", type=positive_int, default=16_384)
    parser.add_argument("--max-length", metavar="TOKENS", type=positive_int, default=8192)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint, locate
    from ..config import load_config
    from ..weights import expected_shapes
    from .plan import DTYPE_BYTES, make_plan, parts

    folder = locate(options.model, local_files_only=True)
    config = load_config(folder)
    checkpoint = Checkpoint(folder)
    own = own_dtype(checkpoint)
    found = parts(checkpoint.shapes, config)
    device, memory = _device(options.device, options.memory)
    merged = config.vision.spatial_merge_size**2
    tokens = max(options.batch_tokens, options.max_length)
    patches = max(options.batch_patches, options.max_length * merged)
    plans = {
        dtype: make_plan(config, found, dtype=dtype, device=device, tokens=tokens, patches=patches)
        for dtype in DTYPE_BYTES
        if options.dtype in ("auto", dtype)
    }
    missing = _missing(checkpoint, expected_shapes(config))
    if options.json:
        document = _document(checkpoint, config, found, own, device, memory, plans, missing)
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return 0
    _print_model(checkpoint, config, found, own, missing)
    _print_plan(options, device, memory, plans, own, tokens, patches)
    return 0


def own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that ``auto`` loads: that of the token embedding."""
    stored = next(
        (d for name, d in checkpoint.dtypes.items() if name.endswith("embed_tokens.weight")), "?"
    )
    return _STORED.get(stored, stored)


def _missing(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> list[str]:
    have = {name.removeprefix("model.") for name in checkpoint.shapes}
    wanted = {name.removeprefix("model.") for name in expected} - {"lm_head.weight"}
    return sorted(wanted - have)


def _device(name: str, memory: int | None) -> tuple[str, int | None]:
    """Which kind of device is planned for, and its bytes if they are known."""
    import torch

    from ..errors import BackendError

    cuda = torch.cuda.is_available()
    kind = name.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if cuda else "cpu"
    if kind not in ("cpu", "cuda"):
        raise BackendError(f"device {name!r} is not supported: use auto, cpu or cuda:0")
    if memory is not None:
        return kind, memory
    if kind == "cpu":
        import os

        return kind, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not cuda:
        return kind, None
    chosen = torch.device("cuda:0" if name in ("auto", "cuda") else name)
    return kind, torch.cuda.get_device_properties(chosen).total_memory


def _print_model(
    checkpoint: Checkpoint, config: ModelConfig, found: list[Part], own: str, missing: list[str]
) -> None:
    text, vision = config.text, config.vision
    tied = "tied to the embedding" if config.tie_word_embeddings else "its own"
    files = _files(checkpoint)
    print(checkpoint.folder)
    print(f"  files       {len(files)}, {_size(sum(files.values()))} of weights in {own}")
    print(
        f"  decoder     {text.num_layers} layers, hidden {text.hidden_size}, ffn "
        f"{text.intermediate_size}, {text.num_heads} heads over {text.num_kv_heads}, head dim "
        f"{text.head_dim}"
    )
    print(
        f"  vision      {vision.depth} blocks, hidden {vision.hidden_size}, ffn "
        f"{vision.intermediate_size}, {vision.num_heads} heads, head dim {vision.head_dim}, "
        f"deepstack after {', '.join(map(str, vision.deepstack_layers)) or 'none'}"
    )
    print(f"  vocabulary  {text.vocab_size} entries, head {tied}")
    print(f"  vectors     {text.hidden_size} values")
    side = vision.patch_size * vision.spatial_merge_size
    print(f"  pictures    {side} x {side} pixels a token")
    print("\nparameters")
    for part in found:
        note = "  (not loaded, but for the two rows that a reranker reads)" * (not part.loaded)
        print(f"  {part.name:16}{part.parameters:>16,}{note}")
    print(f"  {'total':16}{sum(part.parameters for part in found):>16,}")
    if missing:
        print(f"\n{len(missing)} tensors are missing, the first is {missing[0]}")


def _print_plan(
    options: argparse.Namespace,
    device: str,
    memory: int | None,
    plans: dict[str, Plan],
    own: str,
    tokens: int,
    patches: int,
) -> None:
    has = f" of {_size(memory)}" if memory is not None else ""
    print(f"\nmemory on {device}{has}, with {tokens:,} tokens and {patches:,} patches at once")
    print(f"  {'dtype':12}{'weights':>12}{'activations':>14}{'the rest':>12}{'together':>12}")
    for dtype, plan in plans.items():
        sizes = (plan.weights, plan.activations, plan.fixed, plan.total)
        columns = "".join(f"{_size(s):>{w}}" for s, w in zip(sizes, (12, 14, 12, 12), strict=True))
        fits = "" if memory is None else "  fits" if plan.total <= memory else "  does not fit"
        mark = " (as stored)" if dtype == own else ""
        print(f"  {dtype:12}{columns}{fits}{mark}")
    if memory is not None and all(plan.total > memory for plan in plans.values()):
        print("  smaller --batch-tokens, --batch-patches and --max-length need less")


def _document(
    checkpoint: Checkpoint,
    config: ModelConfig,
    found: list[Part],
    own: str,
    device: str,
    memory: int | None,
    plans: dict[str, Plan],
    missing: list[str],
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "path": str(checkpoint.folder),
        "files": _files(checkpoint),
        "dtype": own,
        "config": asdict(config),
        "parameters": {part.name: part.parameters for part in found},
        "missing": missing,
        "device": device,
        "memory": memory,
        "plans": {
            dtype: {
                **asdict(plan),
                "total": plan.total,
                "fits": None if memory is None else plan.total <= memory,
            }
            for dtype, plan in plans.items()
        },
    }


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """Name and bytes of each file of weights."""
    folder: Path = checkpoint.folder
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
