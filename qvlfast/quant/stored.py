"""Linears that a checkpoint holds quantised already, as others write them.

======================================  =================================================
``X.weight`` int8, ``X.weight_scale``   compressed-tensors ``int-quantized``: ``[N, 1]``
``X.weight_packed``, ``_scale``,        compressed-tensors ``pack-quantized``: eight 4-bit
``_shape``                              values + 8 in an int32, ``[N, K / group]`` scales
``X.weight`` e4m3, ``X.weight_scale``   compressed-tensors ``float-quantized``: ``[N, 1]``
``X.weight`` e4m3,                      blocks of 128 × 128, as Qwen's own FP8 files:
``X.weight_scale_inv``                  ``[N / 128, K / 128]``, rounded up
``X.weight`` and what belongs to it     bitsandbytes, of 4 or 8 bits: see ``bnb.py``
======================================  =================================================

Format descriptions: the ``compressors`` of the compressed-tensors package.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Expected
from ..errors import CheckpointError
from .bnb import find_eight_bits, find_four_bits, load_eight_bits, load_four_bits
from .plan import GROUPS, Quantization
from .weights import (
    FP8_BLOCK,
    MULTIPLIER_MOST,
    Fp8BlockWeight,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantisedWeight,
    quantise_int8,
    unpack_nibbles,
)

_LINEAR = re.compile(r"(_proj|\.qkv|\.proj|linear_fc\d)\.weight$")
_SAMPLE = 64  # of a 4-bit weight, which are looked at to tell what it will be loaded as


class QuantizationWarning(UserWarning):
    """A checkpoint's quantised weights were converted to a format that can be computed with."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds in place of one linear's ``[N, K]`` weight.

    Attributes:
        kind: ``int8``, ``int4``, ``fp8``, ``fp8_blocks``, or ``bnb4`` and ``bnb8`` of bitsandbytes.
        shape: (N, K) of the weight.
        parts: the tensors that it is made of, by name.
        form: the weight format that it is read as: ``float`` for 4 bits of bitsandbytes; of other
            4 bits, ``int8`` for those that some of their channels show to have no two levels.
        group: inputs that share a scale, of ``int4``.
    """

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, Expected]
    form: str
    group: int = 64


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a published tensor is the weight of a linear, and not of the patch embedding."""
    return len(shape) == 2 and _LINEAR.search(name) is not None


def find_stored(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    """The quantised linears of a checkpoint, by the name of their ``.weight``.

    Reads headers, descriptions and some channels of 4-bit weights.

    Raises:
        CheckpointError: a quantised weight is damaged, or of a kind that this package does not
            read.
    """
    found: dict[str, Stored] = {}
    for name, shape in expected.items():
        if is_linear(name, shape) and (stored := _find(checkpoint, name, shape)) is not None:
            found[name] = stored
    return found


def _find(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Stored | None:
    stem = name.removesuffix(".weight")
    dtype = checkpoint.dtypes.get(name)
    stored = None
    if f"{stem}.weight_packed" in checkpoint.shapes:
        stored = _packed(checkpoint, stem, shape)
    elif dtype == "F8_E4M3" and f"{stem}.weight_scale_inv" in checkpoint.shapes:
        stored = _by_block(checkpoint, stem, shape)
    elif dtype in ("I8", "F8_E4M3") and f"{stem}.weight_scale" in checkpoint.shapes:
        stored = _by_channel(checkpoint, stem, shape)
    elif four := find_four_bits(checkpoint, name, shape):
        stored = Stored("bnb4", shape, four, "float")
    elif eight := find_eight_bits(checkpoint, name, shape):
        stored = Stored("bnb8", shape, eight, "int8")
    elif dtype in ("I8", "F8_E4M3"):
        raise CheckpointError(
            f"{name} is {dtype} without a weight_scale, weight_scale_inv or SCB beside it: the "
            "file is incomplete, download it again"
        )
    if stored is not None and f"{stem}.weight_zero_point" in checkpoint.shapes:
        raise CheckpointError(f"{stem} has zero points: only symmetric quantisation is read")
    return stored


def _by_channel(checkpoint: Checkpoint, stem: str, shape: tuple[int, ...]) -> Stored:
    name, scale = f"{stem}.weight", f"{stem}.weight_scale"
    found = checkpoint.shapes[scale]
    if found not in ((shape[0], 1), (shape[0],)):
        raise CheckpointError(
            f"{scale} is {list(found)}: only one scale for each of the {shape[0]} output channels "
            "is read"
        )
    dtype = checkpoint.dtypes[name]
    parts = {name: Expected(shape, (dtype,)), scale: Expected(found)}
    checkpoint.check(parts)
    form = "int8" if dtype == "I8" else "fp8"
    return Stored(form, shape, parts, form)


def _by_block(checkpoint: Checkpoint, stem: str, shape: tuple[int, ...]) -> Stored:
    name, scale = f"{stem}.weight", f"{stem}.weight_scale_inv"
    blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
    if checkpoint.shapes[scale] != blocks:
        raise CheckpointError(
            f"{scale} is {list(checkpoint.shapes[scale])}: only one scale for each block of "
            f"{FP8_BLOCK} x {FP8_BLOCK} is read, which for {list(shape)} are {list(blocks)}"
        )
    parts = {name: Expected(shape, ("F8_E4M3",)), scale: Expected(blocks)}
    checkpoint.check(parts)
    return Stored("fp8_blocks", shape, parts, "fp8_blocks")


def _packed(checkpoint: Checkpoint, stem: str, shape: tuple[int, ...]) -> Stored:
    n, k = shape
    packed, scale, described = (f"{stem}.weight_{part}" for part in ("packed", "scale", "shape"))
    if checkpoint.shapes[packed] != (n, k // 8) or k % 8:
        raise CheckpointError(
            f"{packed} is {list(checkpoint.shapes[packed])}: only 4-bit weights are read, which "
            f"for {[n, k]} are {[n, k // 8]}"
        )
    scales = checkpoint.shapes.get(scale, (n, 1))
    groups = scales[1] if len(scales) == 2 else 0
    if groups == 0 or scales[0] != n or k % groups:
        raise CheckpointError(
            f"{scale} is {list(scales)}, expected {n} rows of a scale for each group of the {k} "
            "inputs, all groups of one size: download it again"
        )
    parts = {
        packed: Expected((n, k // 8), ("I32",)),
        scale: Expected(scales),
        described: Expected((2,), ("I64", "I32")),
    }
    checkpoint.check(parts)
    if (said := checkpoint.tensor(described).tolist()) != [n, k]:
        raise CheckpointError(
            f"{described} is {said}, config.json says {[n, k]}: weights and configuration do not "
            "belong together"
        )
    some = torch.linspace(0, n - 1, min(n, _SAMPLE)).long()
    nibbles = checkpoint.tensor(packed)[some].view(torch.uint8)
    form = "int8" if _tops(nibbles, checkpoint.tensor(scale)[some].float()) is None else "int4"
    return Stored("int4", shape, parts, form, k // groups)


def load_stored(
    checkpoint: Checkpoint, name: str, stored: Stored, dtype: torch.dtype
) -> Tensor | QuantisedWeight:
    """The weight that :func:`find_stored` found under ``name``, on the CPU.

    Args:
        dtype: of weights whose format is ``float``.

    Raises:
        CheckpointError: a scale is no number, or infinite.
    """
    stem = name.removesuffix(".weight")
    if stored.kind == "bnb4":
        return load_four_bits(checkpoint, name, stored.shape, dtype)
    if stored.kind == "bnb8":
        return load_eight_bits(checkpoint, name)
    if stored.kind == "fp8_blocks":
        scale = checkpoint.scales(f"{stem}.weight_scale_inv")
        return Fp8BlockWeight(checkpoint.tensor(name), scale)
    scale = checkpoint.scales(f"{stem}.weight_scale")
    if stored.kind == "int8":
        return Int8Weight(checkpoint.tensor(name), scale.flatten())
    if stored.kind == "fp8":
        return Fp8Weight(checkpoint.tensor(name), scale.flatten())
    packed = checkpoint.tensor(f"{stem}.weight_packed").contiguous().view(torch.uint8)
    return from_group_scales(packed, scale)


def warn_of_widening(
    found: Mapping[str, Stored],
    keeps: frozenset[str],
    plan: Quantization | None,
    dtype: torch.dtype,
) -> None:
    """Tell of weights that will take more memory than their file, once for each kind.

    Args:
        found: of :func:`find_stored`.
        keeps: formats that the backend computes with as they are.
        plan: the format that floats are quantised to anew.
    """
    makers = {
        "bnb4": ("4 bits by bitsandbytes", 2),
        "fp8_blocks": ("FP8 with a scale a block", 1),
        "fp8": ("FP8", 1),
    }
    for kind, (maker, per_byte) in makers.items():
        names = [name for name, stored in found.items() if stored.kind == kind]
        wide = [n for n in names if plan is None or not plan.covers(published_name(n))]
        if not wide or found[wide[0]].form in keeps:
            continue
        as_int8 = "that of the file" if per_byte == 1 else f"{per_byte} times that of the file"
        advice = "" if plan else f": with quantization='int8' it is {as_int8}"
        warnings.warn(
            f"{len(wide)} linears are stored in {maker} and computed with in "
            f"{str(dtype).removeprefix('torch.')}, in {dtype.itemsize * per_byte} times the "
            f"memory of the file{advice}",
            QuantizationWarning,
            stacklevel=3,
        )


def published_name(name: str) -> str:
    """The name of a linear as :meth:`Quantization.covers` takes it."""
    return name.removeprefix("model.").removesuffix(".weight")


def from_group_scales(packed: Tensor, scales: Tensor) -> Int4Weight | Int8Weight:
    """The two-level form of 4-bit values with a free scale for each group.

    Where the scales of a channel are no small multiples of one number, as in files of other
    makers, the weight becomes int8, whose rounding is far below that of the 4 bits.

    Args:
        packed: ``[N, K / 2]`` uint8, as in :class:`Int4Weight`, but of −8 … 7.
        scales: ``[N, G]`` float32.
    """
    group = 2 * packed.shape[1] // scales.shape[1]
    if (tops := _tops(packed, scales)) is not None:
        unit = scales.amax(dim=1) / tops
        multiplier = (scales / unit[:, None]).round().to(torch.uint8)
        return Int4Weight(packed, multiplier, unit, group)
    warnings.warn(
        "4-bit weights whose scales are not those of `qvlfast quantize` are kept as int8, in twice "
        "the memory: quantise the original checkpoint to avoid that",
        QuantizationWarning,
        stacklevel=2,
    )
    return quantise_int8(unpack_nibbles(packed).float() * scales.repeat_interleave(group, dim=1))


def _tops(packed: Tensor, scales: Tensor) -> Tensor | None:
    """:func:`_multiplier_of_largest` of weights that have the two-level form; None of others.

    Args:
        packed, scales: of :func:`from_group_scales`, or some of their channels.
    """
    if 2 * packed.shape[1] // scales.shape[1] not in GROUPS:
        return None
    tops = _multiplier_of_largest(scales)
    if not bool(tops.all()):
        return None
    has_least = ((packed & 15) == 0).any() or (packed < 16).any()  # −8
    return None if bool(has_least) else tops


def _multiplier_of_largest(scales: Tensor) -> Tensor:
    """The least multiplier of each channel's largest scale that makes all of its others whole.

    Args:
        scales: ``[N, G]`` float32.

    Returns:
        ``[N]`` float32, 0 where there is none.
    """
    largest = scales.amax(dim=1)

    def whole(rows: Tensor, few: int, top: int) -> Tensor:
        multiples = scales[rows, :few] * (top / largest[rows])[:, None]
        off = (multiples - multiples.round()).abs().amax(dim=1)
        return (off < 1e-3) & (multiples.amin(dim=1) > 0.5)

    found = torch.zeros(len(scales))
    for top in range(1, MULTIPLIER_MOST + 1):
        # Most of the wrong ones show in a few groups.
        rows = (found == 0).nonzero()[:, 0]
        rows = rows[whole(rows, 8, top)]
        found[rows[whole(rows, scales.shape[1], top)]] = top
    return found


def store_tensors(name: str, weight: QuantisedWeight) -> dict[str, Tensor]:
    """The tensors of a quantised weight under the names above, contiguous.

    Args:
        name: of the float weight, ending in ``.weight``.
    """
    stem = name.removesuffix(".weight")
    if isinstance(weight, Int4Weight):
        return {
            f"{stem}.weight_packed": weight.packed.view(torch.int32),
            f"{stem}.weight_scale": weight.multiplier * weight.scale[:, None],
            f"{stem}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
    if isinstance(weight, Fp8BlockWeight):
        return {name: weight.values, f"{stem}.weight_scale_inv": weight.scale_inv}
    return {name: weight.values, f"{stem}.weight_scale": weight.scale[:, None].contiguous()}
