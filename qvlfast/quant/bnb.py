"""Linears as bitsandbytes saves them: nf4 and fp4 of 4 bits, and the int8 of LLM.int8().

=====================================  ====================================================
``X.weight`` ``[N · K / 2, 1]``        two codes a byte, the first in the high half, row by
                                       row; in bytes, whatever dtype they are stored as
``X.weight.quant_map`` ``[16]``        the value of each code
``X.weight.absmax``                    a scale for each block of ``blocksize`` values; uint8
                                       codes of scales if those are quantised once more
``X.weight.nested_quant_map`` ``[256]``  the value of each such code
``X.weight.nested_absmax``             a scale for each ``nested_blocksize`` of them
``X.weight.quant_state.bitsandbytes__nf4``  JSON in bytes: shape, blocksize, nested_offset …
``X.weight`` int8, ``X.SCB`` ``[N]``   max|w| of each channel, which 127 stands for
``X.weight_format`` ``[]``             0: the rows are in their order
=====================================  ====================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from .weights import INT8_MOST, Int8Weight

_KINDS = ("nf4", "fp4")
_CHUNK = 1 << 22  # values that are worked on at once

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """What ``quant_state`` says. ``nested`` is (block size, offset) of quantised scales."""

    blocksize: int
    nested: tuple[int, float] | None


def find_four_bits(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Shape] | None:
    """Name → shape of what ``name`` is made of; None if it is no 4-bit weight of bitsandbytes.

    Raises:
        CheckpointError: it is one, but damaged or incomplete.
    """
    state_name = _state_name(checkpoint, name)
    if state_name is None:
        return None
    state = _state(checkpoint, state_name, shape)
    n, k = shape
    codes = -(-n * k // 2)
    blocks = -(-n * k // state.blocksize)
    wanted: dict[str, Shape] = {f"{name}.quant_map": (16,), f"{name}.absmax": (blocks,)}
    if state.nested is not None:
        wanted[f"{name}.nested_quant_map"] = (256,)
        wanted[f"{name}.nested_absmax"] = (-(-blocks // state.nested[0]),)
    for part, size in wanted.items():
        found = checkpoint.shapes.get(part)
        if found is None:
            raise CheckpointError(
                f"{part} is missing beside {state_name}: the file is incomplete, download it again"
            )
        if found != size:
            raise CheckpointError(
                f"{part} is {list(found)}, expected {list(size)} for a weight of {list(shape)} in "
                f"blocks of {state.blocksize}: download the file again"
            )
    if name not in checkpoint.shapes:
        raise CheckpointError(f"{name} is missing beside {state_name}: download the file again")
    stored = checkpoint.tensor(name)
    if stored.nbytes != codes:
        raise CheckpointError(
            f"{name} holds {stored.nbytes:,} bytes, expected {codes:,} for {list(shape)} values of "
            "4 bits: download the file again"
        )
    return {name: tuple(stored.shape), state_name: checkpoint.shapes[state_name], **wanted}


def load_four_bits(checkpoint: Checkpoint, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The ``[N, K]`` weight in ``dtype``: code · scale in float32, rounded once."""
    state_name = _state_name(checkpoint, name)
    assert state_name is not None
    state = _state(checkpoint, state_name, shape)
    scale = checkpoint.tensor(f"{name}.absmax")
    if state.nested is not None:
        size, offset = state.nested
        values = checkpoint.tensor(f"{name}.nested_quant_map").float()[scale.int()]
        outer = checkpoint.tensor(f"{name}.nested_absmax").float()
        scale = values * outer.repeat_interleave(size)[: len(values)] + offset
    table = checkpoint.tensor(f"{name}.quant_map").float()
    # Both values of every byte: [256, 2].
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)
    packed = checkpoint.tensor(name).contiguous().view(torch.uint8).flatten()
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    for start, stop in _chunks(flat.numel(), state.blocksize):
        values = pairs[packed[start // 2 : -(-stop // 2)].int()].flatten()[: stop - start]
        blocks = slice(start // state.blocksize, -(-stop // state.blocksize))
        scales = scale[blocks].float().repeat_interleave(state.blocksize)[: stop - start]
        flat[start:stop] = values * scales
    return out


def find_eight_bits(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Shape] | None:
    """As :func:`find_four_bits`, for int8."""
    stem = name.removesuffix(".weight")
    scales = f"{stem}.SCB"
    if checkpoint.dtypes.get(name) != "I8" or scales not in checkpoint.shapes:
        return None
    parts: dict[str, Shape] = {name: shape, scales: (shape[0],)}
    layout = f"{stem}.weight_format"
    if layout in checkpoint.shapes:
        parts[layout] = ()
        if checkpoint.shapes[layout] == () and int(checkpoint.tensor(layout)) != 0:
            raise CheckpointError(
                f"{layout} is {int(checkpoint.tensor(layout))}: only rows in their order (0) are "
                "read; load the model with a newer bitsandbytes and save it again"
            )
    return parts


def load_eight_bits(checkpoint: Checkpoint, name: str) -> Int8Weight:
    """The same weight; its product here has one scale a token and no columns of outliers."""
    scales = checkpoint.tensor(f"{name.removesuffix('.weight')}.SCB").float()
    return Int8Weight(checkpoint.tensor(name), scales / INT8_MOST)


def _state_name(checkpoint: Checkpoint, name: str) -> str | None:
    names = (f"{name}.quant_state.bitsandbytes__{kind}" for kind in _KINDS)
    return next((n for n in names if n in checkpoint.shapes), None)


def _state(checkpoint: Checkpoint, state_name: str, shape: Shape) -> _State:
    try:
        values = json.loads(bytes(checkpoint.tensor(state_name).tolist()))
        nested = None
        if values.get("nested_blocksize"):
            nested = (int(values["nested_blocksize"]), float(values["nested_offset"]))
        state = _State(int(values["blocksize"]), nested)
        found = tuple(values["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{state_name} cannot be read ({type(error).__name__}: {error}): download it again"
        ) from None
    if found != shape:
        raise CheckpointError(
            f"{state_name} says {list(found)}, config.json {list(shape)}: weights and "
            "configuration do not belong together"
        )
    if state.blocksize < 2 or state.blocksize % 2 or (nested is not None and nested[0] < 1):
        raise CheckpointError(
            f"{state_name} says blocks of {state.blocksize} values: download the file again"
        )
    return state


def _chunks(count: int, blocksize: int) -> Iterator[tuple[int, int]]:
    step = max(_CHUNK // blocksize, 1) * blocksize
    return ((start, min(start + step, count)) for start in range(0, count, step))
