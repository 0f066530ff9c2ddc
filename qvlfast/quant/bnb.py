"""Linears as bitsandbytes saves them: nf4 and fp4 of 4 bits, and the int8 of LLM.int8().

=====================================  ====================================================
``X.weight`` ``[N · K / 2, 1]``        two codes a byte, the first in the high half, row by
                                       row; in bytes, whatever dtype they are stored as
``X.weight.quant_map`` ``[16]``        the value of each code
``X.weight.absmax``                    a scale for each block of ``blocksize`` values; uint8
                                       codes of scales if there is a ``nested_blocksize``
``X.weight.nested_quant_map`` ``[256]``  the value of each such code
``X.weight.nested_absmax``             a scale for each ``nested_blocksize`` of them
``X.weight.quant_state.bitsandbytes__nf4``  JSON in bytes: shape, blocksize, nested_offset …
``X.weight`` int8, ``X.SCB`` ``[N]``   max|w| of each channel, which 127 stands for
``X.weight_format`` ``[]``             0: the rows are in their order
=====================================  ====================================================
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Expected
from ..errors import CheckpointError
from .weights import INT8_MOST, Int8Weight

_KINDS = ("nf4", "fp4")
_STORAGE = ("U8", "I8", "BF16", "F16", "F32", "F64")  # what bitsandbytes packs codes into
_BLOCK_MOST = 4096  # the largest blocks that bitsandbytes makes
_CHUNK = 1 << 22  # values that are worked on at once
# What json.loads, and the look-ups in what it returns, raise for bytes of any kind.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """What ``quant_state`` says. ``nested`` is (block size, offset) of quantised scales."""

    blocksize: int
    nested: tuple[int, float] | None


def find_four_bits(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Expected] | None:
    """What ``name`` is made of, by name; None if it is no 4-bit weight of bitsandbytes.

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
    parts = {
        state_name: Expected(checkpoint.shapes[state_name], ("U8",)),
        name: Expected(checkpoint.shapes.get(name, ()), _STORAGE),
        f"{name}.quant_map": Expected((16,)),
        f"{name}.absmax": Expected((blocks,)),
    }
    if state.nested is not None:
        parts[f"{name}.absmax"] = Expected((blocks,), ("U8",))
        parts[f"{name}.nested_quant_map"] = Expected((256,))
        parts[f"{name}.nested_absmax"] = Expected((-(-blocks // state.nested[0]),))
    checkpoint.check(parts)
    if (held := checkpoint.tensor(name).nbytes) != codes:
        raise CheckpointError(
            f"{name} holds {held:,} bytes, expected {codes:,} for {list(shape)} values of 4 bits: "
            "download the file again"
        )
    return parts


def load_four_bits(checkpoint: Checkpoint, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The ``[N, K]`` weight in ``dtype``: code · scale in float32, rounded once."""
    state_name = _state_name(checkpoint, name)
    assert state_name is not None
    state = _state(checkpoint, state_name, shape)
    if state.nested is None:
        scale = checkpoint.scales(f"{name}.absmax")
    else:
        size, offset = state.nested
        codes = checkpoint.tensor(f"{name}.absmax").int()
        values = checkpoint.scales(f"{name}.nested_quant_map")[codes]
        outer = checkpoint.scales(f"{name}.nested_absmax")
        scale = values * outer.repeat_interleave(size)[: len(values)] + offset
    table = checkpoint.scales(f"{name}.quant_map")
    # Both values of every byte: [256, 2].
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)
    packed = checkpoint.tensor(name).contiguous().view(torch.uint8).flatten()
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    for start, stop in _chunks(flat.numel(), state.blocksize):
        values = pairs[packed[start // 2 : -(-stop // 2)].int()].flatten()[: stop - start]
        blocks = slice(start // state.blocksize, -(-stop // state.blocksize))
        scales = scale[blocks].repeat_interleave(state.blocksize)[: stop - start]
        flat[start:stop] = values * scales
    return out


def find_eight_bits(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Expected] | None:
    """As :func:`find_four_bits`, for int8."""
    stem = name.removesuffix(".weight")
    scales, layout = f"{stem}.SCB", f"{stem}.weight_format"
    if checkpoint.dtypes.get(name) != "I8" or scales not in checkpoint.shapes:
        return None
    parts = {name: Expected(shape, ("I8",)), scales: Expected((shape[0],), ("F32",))}
    if layout in checkpoint.shapes:
        parts[layout] = Expected((), ("U8",))
    checkpoint.check(parts)
    if layout in parts and (order := int(checkpoint.tensor(layout))) != 0:
        raise CheckpointError(
            f"{layout} is {order}: only rows in their order (0) are read; load the model with a "
            "newer bitsandbytes and save it again"
        )
    return parts


def load_eight_bits(checkpoint: Checkpoint, name: str) -> Int8Weight:
    """The same weight; its product here has one scale a token and no columns of outliers."""
    scales = checkpoint.scales(f"{name.removesuffix('.weight')}.SCB")
    return Int8Weight(checkpoint.tensor(name), scales / INT8_MOST)


def _state_name(checkpoint: Checkpoint, name: str) -> str | None:
    names = (f"{name}.quant_state.bitsandbytes__{kind}" for kind in _KINDS)
    return next((n for n in names if n in checkpoint.shapes), None)


def _state(checkpoint: Checkpoint, state_name: str, shape: Shape) -> _State:
    checkpoint.check({state_name: Expected(checkpoint.shapes[state_name], ("U8",))})
    try:
        values = json.loads(checkpoint.tensor(state_name).numpy().tobytes())
        found, blocksize = values["shape"], values["blocksize"]
        nested = values.get("nested_blocksize")
        offset = 0.0 if nested is None else float(values["nested_offset"])
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{state_name} cannot be read ({type(error).__name__}: {error}): download it again"
        ) from None
    if found != list(shape):
        raise CheckpointError(
            f"{state_name} says {reprlib.repr(found)}, config.json {list(shape)}: weights and "
            "configuration do not belong together"
        )
    _check_size(state_name, "blocksize", blocksize)
    if nested is None:
        return _State(blocksize, None)
    _check_size(state_name, "nested_blocksize", nested)
    if not math.isfinite(offset):
        raise CheckpointError(
            f"{state_name}: `nested_offset` is {offset}, expected a finite number: download it "
            "again"
        )
    return _State(blocksize, (nested, offset))


def _check_size(state_name: str, key: str, size: Any) -> None:
    """Even, as two codes share a byte; and of a size that can be allocated."""
    if type(size) is not int or not 2 <= size <= _BLOCK_MOST or size % 2:
        raise CheckpointError(
            f"{state_name}: `{key}` is {reprlib.repr(size)}, expected an even number from 2 to "
            f"{_BLOCK_MOST}: download it again"
        )


def _chunks(count: int, blocksize: int) -> Iterator[tuple[int, int]]:
    step = max(_CHUNK // blocksize, 1) * blocksize
    return ((start, min(start + step, count)) for start in range(0, count, step))
