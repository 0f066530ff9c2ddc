"""Write a quantised copy of a checkpoint, one shard at a time.

The result is in the compressed-tensors format (``int-quantized`` or ``pack-quantized``), which
transformers and vLLM read too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import INDEX_NAME, WEIGHT_DTYPES, Checkpoint
from ..config import load_config
from ..errors import CheckpointError
from ..weights import expected_shapes
from .plan import Quantization
from .stored import is_linear, store_tensors
from .weights import quantise

_FORMATS = {"int8": "int-quantized", "int4": "pack-quantized"}


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` has written.

    Attributes:
        linears: how many weights were quantised.
        bytes_in, bytes_out: of all weights.
    """

    linears: int
    bytes_in: int
    bytes_out: int


def convert(
    source: Path,
    target: Path,
    plan: Quantization,
    progress: Callable[[str], None] = lambda name: None,
) -> Converted:
    """Quantise the checkpoint in ``source`` into the new folder ``target``.

    ``config.json`` is written last: a folder that lacks it was not finished.

    Args:
        progress: called with the name of each shard before it is worked on.

    Raises:
        CheckpointError: ``source`` is no checkpoint or quantised already, or ``target`` is taken.
        ValueError: the format cannot be written.
    """
    if plan.format not in _FORMATS:
        raise ValueError(f"format {plan.format!r} is not written: use one of {', '.join(_FORMATS)}")
    if plan.weight_only:
        raise ValueError("weight_only is not written: the same file is loaded with it or without")
    config = load_config(source)
    checkpoint = Checkpoint(source)
    covered = {
        name
        for name, shape in expected_shapes(config).items()
        if plan.covers(name.removeprefix("model.").removesuffix(".weight"))
        and is_linear(name, shape)
    }
    stored = _stored_names(checkpoint, covered)
    uneven = [n for n in sorted(stored) if checkpoint.shapes[n][1] % plan.group]
    if plan.format == "int4" and uneven:
        raise ValueError(
            f"{uneven[0]} has {checkpoint.shapes[uneven[0]][1]} inputs, no multiple of group "
            f"{plan.group}, which the file format asks for: use a smaller group, or int8"
        )
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty: give a new folder")
    target.mkdir(parents=True, exist_ok=True)
    files = sorted({checkpoint.file_of(name) for name in checkpoint.shapes})
    index: dict[str, str] = {}
    size = 0
    for path in files:
        progress(path.name)
        tensors = _convert_file(path, stored, plan)
        size += sum(t.nbytes for t in tensors.values())
        index |= dict.fromkeys(tensors, path.name)
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    if len(files) > 1:
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        (target / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
    for path in source.iterdir():
        copied = path.suffix in (".json", ".jinja", ".txt", ".md") and path.is_file()
        if copied and path.name not in ("config.json", INDEX_NAME):
            shutil.copyfile(path, target / path.name)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = {n for n, shape in checkpoint.shapes.items() if is_linear(n, shape)} - stored
    ignore = sorted({"lm_head", *(name.removesuffix(".weight") for name in kept)})
    values["quantization_config"] = _describe(plan, ignore)
    (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    bytes_in = sum(path.stat().st_size for path in files)
    return Converted(len(stored), bytes_in, size)


def _stored_names(checkpoint: Checkpoint, covered: set[str]) -> set[str]:
    """The covered names as this checkpoint spells them, all of them in floating point."""
    bare = not any(name.startswith("model.") for name in checkpoint.shapes)
    names = {name.removeprefix("model.") if bare else name for name in covered}
    for name in sorted(names):
        dtype = checkpoint.dtypes.get(name)
        if dtype not in WEIGHT_DTYPES:
            what = "is missing" if dtype is None else f"is {dtype}"
            raise CheckpointError(
                f"{checkpoint.folder}: {name} {what}: only complete checkpoints in float32, "
                "bfloat16 or float16 can be quantised"
            )
    return names


def _convert_file(path: Path, stored: set[str], plan: Quantization) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            tensor = file.get_tensor(name)
            if name in stored:
                tensors |= store_tensors(name, quantise(tensor, plan.format, plan.group))
            else:
                tensors[name] = tensor
    return tensors


def _describe(plan: Quantization, ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors."""
    bits = 8 if plan.format == "int8" else 4
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel" if bits == 8 else "group",
        "group_size": None if bits == 8 else plan.group,
    }
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[plan.format],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
