"""Quantised weights of a linear, and how they are made and read.

int8 and fp8 have one scale for each output channel. int4 has two levels: each group of inputs has
an integer multiplier beside the channel's scale, so that q · multiplier is an int8 weight exactly.
One integer product then serves both formats, and its sum over K never stops for a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _C

INT8_MOST = 127
MULTIPLIER_MOST = 18  # 7 · 18 = 126 is the most that an int8 holds
FP8_MOST = 448.0  # the largest finite e4m3
FP8_BLOCK = 128  # outputs, and inputs, that share a scale in Qwen's FP8 files
# In place of the largest value of a channel of zeros.
TINY = 1e-30


@dataclass(frozen=True)
class Int8Weight:
    """weight = values · scale.

    Attributes:
        values: ``[N, K]`` int8 in −127 … 127.
        scale: ``[N]`` float32.
    """

    values: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> Int8Weight:
        """A copy on ``device``."""
        return Int8Weight(self.values.to(device), self.scale.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantise(self) -> Tensor:
        """``[N, K]`` float32."""
        return self.values.float() * self.scale[:, None]


@dataclass(frozen=True)
class Int4Weight:
    """weight = values · multiplier of the group · scale of the channel.

    Attributes:
        packed: ``[N, K / 2]`` uint8: value + 8 of input 2i in the low half of byte i, of input
            2i + 1 in the high half; values are −7 … 7.
        multiplier: ``[N, K / group]`` uint8 in 1 … 18; the last group may be smaller.
        scale: ``[N]`` float32.
        group: inputs that share a multiplier.
    """

    packed: Tensor
    multiplier: Tensor
    scale: Tensor
    group: int

    def to(self, device: torch.device) -> Int4Weight:
        """A copy on ``device``."""
        packed, multiplier = self.packed.to(device), self.multiplier.to(device)
        return Int4Weight(packed, multiplier, self.scale.to(device), self.group)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    def values(self) -> Tensor:
        """``[N, K]`` int8 in −7 … 7."""
        low, high = self.packed & 15, self.packed >> 4
        return torch.stack((low, high), dim=2).flatten(1).to(torch.int8) - 8

    def widen(self) -> Int8Weight:
        """The same weight, exactly, as int8."""
        multiplier = self.multiplier.to(torch.int8).repeat_interleave(self.group, dim=1)
        return Int8Weight(self.values() * multiplier[:, : self.shape[1]], self.scale)

    def dequantise(self) -> Tensor:
        """``[N, K]`` float32."""
        return self.widen().dequantise()


@dataclass(frozen=True)
class Fp8Weight:
    """weight = values · scale.

    Attributes:
        values: ``[N, K]`` float8_e4m3fn.
        scale: ``[N]`` float32.
    """

    values: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> Fp8Weight:
        """A copy on ``device``."""
        return Fp8Weight(self.values.to(device), self.scale.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantise(self) -> Tensor:
        """``[N, K]`` float32."""
        return self.values.float() * self.scale[:, None]


@dataclass(frozen=True)
class Fp8BlockWeight:
    """weight = values · scale of the block of 128 × 128, as Qwen's FP8 files have it.

    Attributes:
        values: ``[N, K]`` float8_e4m3fn.
        scale_inv: ``[N / 128, K / 128]``, rounded up, float32; the name is the files': it is what
            values are multiplied by.
    """

    values: Tensor
    scale_inv: Tensor

    def to(self, device: torch.device) -> Fp8BlockWeight:
        """A copy on ``device``."""
        return Fp8BlockWeight(self.values.to(device), self.scale_inv.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantise(self) -> Tensor:
        """``[N, K]`` float32."""
        n, k = self.shape
        wide = self.values.float()
        for row, scales in enumerate(self.scale_inv):
            block = slice(row * FP8_BLOCK, min((row + 1) * FP8_BLOCK, n))
            wide[block] *= scales.repeat_interleave(FP8_BLOCK)[:k]
        return wide


QuantisedWeight: TypeAlias = Int8Weight | Int4Weight | Fp8Weight | Fp8BlockWeight


def quantise_int8(weight: Tensor) -> Int8Weight:
    """Round each channel to 255 levels: scale = max|w| / 127.

    A channel with NaN or infinity in it gets a scale of NaN.
    """
    on_host = weight.cpu().contiguous()
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32)
    _C.quantise_rows(on_host, values, scale)
    return Int8Weight(values, scale).to(weight.device)


def quantise_fp8(weight: Tensor) -> Fp8Weight:
    """Round each channel to e4m3: scale = max|w| / 448."""
    most = weight.abs().amax(dim=1).float().clamp(min=TINY)
    wide = weight.float() * (FP8_MOST / most)[:, None]
    values = wide.clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
    return Fp8Weight(values, most / FP8_MOST)


def quantise_int4(weight: Tensor, group: int = 64) -> Int4Weight:
    """Round to 15 levels a group; of the multipliers that clip little, the one that errs least.

    The channel's scale is max|w| / 126, so that its largest group reaches the largest multiplier,
    rounded up to 16 significant bits: scale times multiplier is exact then, so that a file which
    holds the products alone gives both back. NaN and infinity are as in :func:`quantise_int8`.

    Raises:
        ValueError: K is odd, or no such group.
    """
    n, k = weight.shape
    on_host = weight.cpu().contiguous()
    packed = torch.empty((n, k // 2), dtype=torch.uint8)
    multiplier = torch.empty((n, -(-k // group)), dtype=torch.uint8)
    scale = torch.empty(n, dtype=torch.float32)
    _C.quantise_int4(on_host, group, packed, multiplier, scale)
    return Int4Weight(packed, multiplier, scale, group).to(weight.device)


def pack_nibbles(values: Tensor) -> Tensor:
    """``[N, K]`` of −7 … 7 as :attr:`Int4Weight.packed`."""
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def quantise(weight: Tensor, form: str, group: int = 64) -> QuantisedWeight:
    """``[N, K]`` float32, bfloat16 or float16 in the format named ``form``."""
    if form == "int8":
        return quantise_int8(weight)
    if form == "int4":
        return quantise_int4(weight, group)
    if form == "fp8":
        return quantise_fp8(weight)
    raise ValueError(f"no weight format is named {form!r}")
