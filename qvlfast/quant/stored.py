"""Linears that a checkpoint holds quantised already, as others write them.

======================================  =================================================
``X.weight`` int8, ``X.weight_scale``   compressed-tensors ``int-quantized``: ``[N, 1]``
``X.weight_packed``, ``_scale``,        compressed-tensors ``pack-quantized``: eight 4-bit
``_shape``                              values + 8 in an int32, ``[N, K / group]`` scales
``X.weight`` e4m3, ``X.weight_scale``   compressed-tensors ``float-quantized``: ``[N, 1]``
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
from .plan import GROUPS
from .weights import (
    MULTIPLIER_MOST,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantisedWeight,
    pack_nibbles,
    quantise_int8,
)

_LINEAR = re.compile(r"(_proj|\.qkv|\.proj|linear_fc\d)\.weight$")


class QuantizationWarning(UserWarning):
    """A checkpoint's quantised weights were converted to a format that can be computed with."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds in place of one linear's ``[N, K]`` weight.

    Attributes:
        kind: ``int8``, ``int4`` or ``fp8``.
        shapes: name → shape of each tensor that it is made of.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]


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
        elif dtype in ("I8", "F8_E4M3") and f"{stem}.weight_scale" in checkpoint.shapes:
            kind = "int8" if dtype == "I8" else "fp8"
            scale = checkpoint.shapes[f"{stem}.weight_scale"]
            if scale not in ((shape[0], 1), (shape[0],)):
                raise CheckpointError(
                    f"{stem}.weight_scale is {list(scale)}: only one scale for each of the "
                    f"{shape[0]} output channels is read"
                )
            found[name] = Stored(kind, {name: shape, f"{stem}.weight_scale": scale})
        if name in found and f"{stem}.weight_zero_point" in checkpoint.shapes:
            raise CheckpointError(f"{stem} has zero points: only symmetric quantisation is read")
    return found


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
    return Stored("int4", dict(zip(names, ((n, k // 8), (n, groups), (2,)), strict=True)))


def load_stored(checkpoint: Checkpoint, name: str, stored: Stored) -> QuantisedWeight:
    """The weight that :func:`find_stored` found under ``name``, on the CPU."""
    stem = name.removesuffix(".weight")
    scale = checkpoint.tensor(f"{stem}.weight_scale").float()
    if stored.kind == "int8":
        return Int8Weight(checkpoint.tensor(name), scale.flatten())
    if stored.kind == "fp8":
        return Fp8Weight(checkpoint.tensor(name), scale.flatten())
    return from_group_scales(unpack_words(checkpoint.tensor(f"{stem}.weight_packed")), scale)


def from_group_scales(values: Tensor, scales: Tensor) -> Int4Weight | Int8Weight:
    """The two-level form of 4-bit values with a free scale for each group.

    Where the scales of a channel are no small multiples of one number, as in files of other
    makers, the weight becomes int8, whose rounding is far below that of the 4 bits.

    Args:
        values: ``[N, K]`` int8 in −8 … 7.
        scales: ``[N, G]`` float32.
    """
    n, k = values.shape
    group = k // scales.shape[1]
    # Which multiplier has the channel's largest scale? Try all at once: [N, 18, G]; the least
    # that makes all of them whole has the shortest unit, which is exact.
    tops = torch.arange(1, MULTIPLIER_MOST + 1, dtype=torch.float32)
    unit = scales.amax(dim=1, keepdim=True) / tops
    multiples = scales[:, None] / unit[:, :, None]
    off = (multiples - multiples.round()).abs().amax(dim=2)
    off = off.where(multiples.amin(dim=2) > 0.5, torch.inf)
    best = (off < 1e-3).int().argmax(dim=1)
    exact = bool((off.amin(dim=1) < 1e-3).all()) and int(values.min()) >= -7 and group in GROUPS
    if exact:
        rows = torch.arange(n)
        multiplier = multiples[rows, best].round().to(torch.uint8)
        scale = unit[rows, best].contiguous()
        return Int4Weight(pack_nibbles(values), multiplier, scale, group)
    warnings.warn(
        "4-bit weights whose scales are not those of `qvlfast quantize` are kept as int8, in twice "
        "the memory: quantise the original checkpoint to avoid that",
        QuantizationWarning,
        stacklevel=2,
    )
    return quantise_int8(values.float() * scales.repeat_interleave(group, dim=1))


def unpack_words(words: Tensor) -> Tensor:
    """``[N, K / 8]`` int32 → ``[N, K]`` int8 in −8 … 7; the first value is in the lowest bits."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).flatten(1).to(torch.int8) - 8


def pack_words(values: Tensor) -> Tensor:
    """The reverse of :func:`unpack_words`."""
    nibbles = (values.to(torch.int64) + 8).view(len(values), -1, 8)
    words = (nibbles << torch.arange(0, 32, 4)).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def store_tensors(name: str, weight: QuantisedWeight) -> dict[str, Tensor]:
    """The tensors of a quantised weight under the names above, contiguous.

    Args:
        name: of the float weight, ending in ``.weight``.
    """
    stem = name.removesuffix(".weight")
    if isinstance(weight, Int4Weight):
        return {
            f"{stem}.weight_packed": pack_words(weight.values()),
            f"{stem}.weight_scale": weight.multiplier * weight.scale[:, None],
            f"{stem}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
    return {name: weight.values, f"{stem}.weight_scale": weight.scale[:, None].contiguous()}
