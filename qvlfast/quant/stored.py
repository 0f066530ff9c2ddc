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

from ..checkpoint import Checkpoint
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


class QuantizationWarning(UserWarning):
    """A checkpoint's quantised weights were converted to a format that can be computed with."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds in place of one linear's ``[N, K]`` weight.

    Attributes:
        kind: ``int8``, ``int4``, ``fp8``, ``fp8_blocks``, or ``bnb4`` and ``bnb8`` of bitsandbytes.
        shape: (N, K) of the weight.
        parts: name → shape of each tensor that it is made of.
    """

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[int, ...]]

    @property
    def form(self) -> str:
        """The weight format that it is read as; ``float`` for 4 bits of bitsandbytes."""
        return {"bnb4": "float", "bnb8": "int8"}.get(self.kind, self.kind)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a published tensor is the weight of a linear, and not of the patch embedding."""
    return len(shape) == 2 and _LINEAR.search(name) is not None


def find_stored(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    """The quantised linears of a checkpoint, by the name of their ``.weight``.

    Raises:
        CheckpointError: a quantised weight of a kind that this package does not read.
    """
    found: dict[str, Stored] = {}
    for name, shape in expected.items():
        if not is_linear(name, shape):
            continue
        stem = name.removesuffix(".weight")
        dtype = checkpoint.dtypes.get(name)
        if f"{stem}.weight_packed" in checkpoint.shapes:
            found[name] = _packed(checkpoint, stem, shape)
        elif dtype == "F8_E4M3" and f"{stem}.weight_scale_inv" in checkpoint.shapes:
            found[name] = _blocks(checkpoint, stem, shape)
        elif dtype in ("I8", "F8_E4M3") and f"{stem}.weight_scale" in checkpoint.shapes:
            kind = "int8" if dtype == "I8" else "fp8"
            scale = checkpoint.shapes[f"{stem}.weight_scale"]
            if scale not in ((shape[0], 1), (shape[0],)):
                raise CheckpointError(
                    f"{stem}.weight_scale is {list(scale)}: only one scale for each of the "
                    f"{shape[0]} output channels is read"
                )
            found[name] = Stored(kind, shape, {name: shape, f"{stem}.weight_scale": scale})
        elif four := find_four_bits(checkpoint, name, shape):
            found[name] = Stored("bnb4", shape, four)
        elif eight := find_eight_bits(checkpoint, name, shape):
            found[name] = Stored("bnb8", shape, eight)
        elif dtype in ("I8", "F8_E4M3"):
            raise CheckpointError(
                f"{name} is {dtype} without a weight_scale, weight_scale_inv or SCB beside it: the "
                "file is incomplete, download it again"
            )
        if name in found and f"{stem}.weight_zero_point" in checkpoint.shapes:
            raise CheckpointError(f"{stem} has zero points: only symmetric quantisation is read")
    return found


def _blocks(checkpoint: Checkpoint, stem: str, shape: tuple[int, ...]) -> Stored:
    name, scale = f"{stem}.weight", f"{stem}.weight_scale_inv"
    blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
    if checkpoint.shapes[scale] != blocks:
        raise CheckpointError(
            f"{scale} is {list(checkpoint.shapes[scale])}: only one scale for each block of "
            f"{FP8_BLOCK} x {FP8_BLOCK} is read, which for {list(shape)} are {list(blocks)}"
        )
    return Stored("fp8_blocks", shape, {name: shape, scale: blocks})


def _packed(checkpoint: Checkpoint, stem: str, shape: tuple[int, ...]) -> Stored:
    n, k = shape
    names = [f"{stem}.weight_{part}" for part in ("packed", "scale", "shape")]
    missing = [name for name in names if name not in checkpoint.shapes]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing beside {names[0]}")
    groups = checkpoint.shapes[names[1]][-1]
    if checkpoint.shapes[names[0]] != (n, k // 8) or k % 8 or k % max(groups, 1):
        raise CheckpointError(
            f"{names[0]} is {list(checkpoint.shapes[names[0]])} with {groups} groups: only 4-bit "
            f"weights are read, which for {[n, k]} are {[n, k // 8]}"
        )
    return Stored("int4", shape, dict(zip(names, ((n, k // 8), (n, groups), (2,)), strict=True)))


def load_stored(
    checkpoint: Checkpoint, name: str, stored: Stored, dtype: torch.dtype
) -> Tensor | QuantisedWeight:
    """The weight that :func:`find_stored` found under ``name``, on the CPU.

    Args:
        dtype: of weights whose format is ``float``.
    """
    stem = name.removesuffix(".weight")
    if stored.kind == "bnb4":
        return load_four_bits(checkpoint, name, stored.shape, dtype)
    if stored.kind == "bnb8":
        return load_eight_bits(checkpoint, name)
    if stored.kind == "fp8_blocks":
        scale = checkpoint.tensor(f"{stem}.weight_scale_inv").float()
        return Fp8BlockWeight(checkpoint.tensor(name), scale)
    scale = checkpoint.tensor(f"{stem}.weight_scale").float()
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
        advice = "" if plan else f": quantization='int8' takes {per_byte} times it"
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
    tops = _multiplier_of_largest(scales)
    has_least = ((packed & 15) == 0).any() or (packed < 16).any()  # −8
    if group in GROUPS and bool(tops.all()) and not bool(has_least):
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
