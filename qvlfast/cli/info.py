"""Describe a checkpoint and the memory it needs, without loading it.

Reads config.json and the headers of the weights. The plan holds for the longest inputs and full
batches; smaller ones take less.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_quantization_options, byte_count, positive_int, quantization, size_text
from .streams import json_text

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..config import ModelConfig
    from .plan import Device, Part, Plan, Planner, Wish

_MOST = 1 << 18  # tokens or patches: the positions that the published models are configured for

# How config.json and safetensors write the dtypes.
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="a checkpoint folder or a cached hub id")
    parser.add_argument(
        "--device",
        metavar="NAME",
        default="auto",
        help="plan for auto, cpu, cuda or cuda:1; or for a GPU that is not here, such as sm_87",
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
    add_quantization_options(
        parser, "plan for linears quantised at load; default: shows those besides"
    )
    parser.add_argument(
        "--backend", metavar="NAME", default="auto", help="auto, reference, native or triton"
    )
    parser.add_argument("--batch-tokens", metavar="N", type=_planned, default=16_384)
    parser.add_argument("--batch-patches", metavar="N", type=_planned, default=16_384)
    parser.add_argument("--max-length", metavar="TOKENS", type=_planned, default=8192)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _planned(text: str) -> int:
    """A whole number from 1 up, for which a plan is still made in reasonable time and memory."""
    value = positive_int(text)
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is above {_MOST}, the most that is planned for")
    return value


def run(options: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint, locate
    from ..config import load_config
    from ..errors import BackendError
    from ..weights import own_shapes, wanted_tensors
    from .plan import Planner, find_device

    folder = locate(options.model, local_files_only=True)
    config = load_config(folder)
    checkpoint = Checkpoint(folder)
    own = own_dtype(checkpoint)
    planner = Planner(checkpoint, config, find_device(options.device, options.memory))
    shapes = own_shapes(checkpoint, config)
    # What is there must load; what is missing is told at the end.
    checkpoint.require(wanted_tensors(shapes, planner.stored), optional=frozenset(shapes))
    forms = ("int8", "int4", "fp8") if planner.device.kind == "cuda" else ("int8", "int4")
    wishes = _wishes(options, config, own, forms)
    chosen = next(iter(wishes)) if options.quantization or options.dtype != "auto" else own
    plans = {chosen: planner.plan(wishes[chosen])}
    for label, wish in wishes.items():
        with contextlib.suppress(BackendError):  # not every backend computes in every dtype
            plans[label] = planner.plan(wish)
    if options.json:
        document = _document(checkpoint, planner, own, plans, wishes, chosen)
        print(json_text(document, indent=2))
        return 0
    _print_model(checkpoint, config, plans[chosen].parts, own, planner.missing)
    _print_plans(planner.device, plans, wishes[chosen], own)
    _print_chosen(planner, plans[chosen], wishes[chosen], chosen)
    return 0


def _wishes(
    options: argparse.Namespace, config: ModelConfig, own: str, forms: tuple[str, ...]
) -> dict[str, Wish]:
    """What to plan, by a name for it: each dtype, and each format in the checkpoint's own."""
    from ..quant import Quantization
    from .plan import Wish

    merged = config.vision.spatial_merge_size**2
    tokens = max(options.batch_tokens, options.max_length)
    patches = max(options.batch_patches, options.max_length * merged)

    def wish(dtype: str, plan: Quantization | None) -> Wish:
        return Wish(dtype, plan, options.backend, tokens, patches, options.max_length)

    base = own if options.dtype == "auto" else options.dtype
    if (plan := quantization(options)) is not None:
        return {plan.format + ", weights only" * plan.weight_only: wish(base, plan)}
    dtypes = ("float32", "bfloat16", "float16") if options.dtype == "auto" else (base,)
    found = {dtype: wish(dtype, None) for dtype in dtypes}
    return found | {form: wish(base, Quantization(form)) for form in forms}


def own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that ``auto`` loads: that of the token embedding."""
    stored = next(
        (d for name, d in checkpoint.dtypes.items() if name.endswith("embed_tokens.weight")), "F32"
    )
    return _STORED.get(stored, "float32")


def _print_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    found: tuple[Part, ...],
    own: str,
    missing: list[str],
) -> None:
    text, vision = config.text, config.vision
    tied = "tied to the embedding" if config.tie_word_embeddings else "its own"
    files = _files(checkpoint)
    print(checkpoint.folder)
    print(f"  files       {len(files)}, {size_text(sum(files.values()))} of weights in {own}")
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
        note = "  (two rows of it are loaded, by a reranker)" * (part.name == "head")
        print(f"  {part.name:16}{part.parameters:>16,}{note}")
    print(f"  {'total':16}{sum(part.parameters for part in found):>16,}")
    if missing:
        print(f"\n{len(missing)} tensors are missing, the first is {missing[0]}")


def _print_plans(device: Device, plans: dict[str, Plan], wish: Wish, own: str) -> None:
    memory = device.memory
    has = f" of {size_text(memory)}" if memory is not None else ""
    print(
        f"\nmemory on {device.name}{has}, with {wish.tokens:,} tokens and {wish.patches:,} patches "
        "at once"
    )
    wide = max(12, *(len(label) for label in plans))
    print(
        f"  {'':{wide}}{'weights':>12}{'activations':>14}{'the rest':>12}{'together':>12}  backend"
    )
    for label, plan in plans.items():
        sizes = (plan.weights, plan.activations, plan.fixed, plan.total)
        columns = "".join(
            f"{size_text(s):>{w}}" for s, w in zip(sizes, (12, 14, 12, 12), strict=True)
        )
        fits = "" if memory is None else "fits" if plan.total <= memory else "does not fit"
        mark = " (as stored)" if label == own else ""
        print(f"  {label:{wide}}{columns}  {plan.backend:11}{fits}{mark}".rstrip())


def _print_chosen(planner: Planner, plan: Plan, wish: Wish, label: str) -> None:
    """The parts of one plan, the largest batch, and a verdict."""
    from .plan import advice, formats_of

    print(f"\n{label}, by part")
    for part in plan.parts:
        sizes = formats_of(part, plan.dtype).items()
        print(f"  {part.name:16}" + ", ".join(f"{form} {size_text(size)}" for form, size in sizes))
    print(
        "  a cached token of a beginning takes {}, a cached visual token {}".format(
            *_cached(planner, wish)
        )
    )
    memory = planner.device.memory
    if memory is None:
        print("  give --memory to see what fits")
        return
    text, pictures = (planner.largest(wish, pictures=kind) for kind in (False, True))
    print(f"  the largest batch is of {text:,} tokens of text, or {pictures:,} patches of pictures")
    if plan.total <= memory:
        print(f"  fits, with {size_text(memory - plan.total)} to spare")
    else:
        print(f"  does not fit: {size_text(plan.total - memory)} too much; what would fit:")
        for line in advice(planner, wish, plan):
            print(f"    {line}")


def _cached(planner: Planner, wish: Wish) -> tuple[str, str]:
    from ..memory import keys_values_bytes, visual_bytes

    dtype = wish.torch_dtype
    sizes = keys_values_bytes(planner.config, dtype), visual_bytes(planner.config, dtype)
    return size_text(sizes[0]), size_text(sizes[1])


def _document(
    checkpoint: Checkpoint,
    planner: Planner,
    own: str,
    plans: dict[str, Plan],
    wishes: dict[str, Wish],
    chosen: str,
) -> dict[str, Any]:
    from .plan import advice

    memory = planner.device.memory
    parts = plans[chosen].parts
    document = {
        "path": str(checkpoint.folder),
        "files": _files(checkpoint),
        "dtype": own,
        "config": asdict(planner.config),
        "parameters": {part.name: part.parameters for part in parts},
        "missing": planner.missing,
        "device": planner.device.name,
        "memory": memory,
        "plans": {
            label: {
                **asdict(plan),
                "weights": plan.weights,
                "total": plan.total,
                "fits": None if memory is None else plan.total <= memory,
            }
            for label, plan in plans.items()
        },
        "chosen": chosen,
    }
    if memory is not None:
        wish = wishes[chosen]
        document["largest_tokens"] = planner.largest(wish, pictures=False)
        document["largest_patches"] = planner.largest(wish, pictures=True)
        document["advice"] = advice(planner, wish, plans[chosen])
    return document


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """Name and bytes of each file of weights."""
    folder: Path = checkpoint.folder
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
