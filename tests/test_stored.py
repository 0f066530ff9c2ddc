"""Quantised weights of damaged files, and of files that are not what they seem."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qvlfast import CheckpointError
from qvlfast.checkpoint import Checkpoint
from qvlfast.quant import Int4Weight, Int8Weight, quantise
from qvlfast.quant.stored import Stored, find_stored, load_stored, store_tensors

N, K = 64, 128
NAME = "model.language_model.layers.0.self_attn.q_proj.weight"
STEM = NAME.removesuffix(".weight")
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
Change = Callable[[Tensor], Tensor]


def packed(group: int = 64) -> dict[str, Tensor]:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return store_tensors(NAME, quantise(weight, "int4", group))


def eight() -> dict[str, Tensor]:
    return store_tensors(NAME, quantise(torch.ones(N, K), "int8"))


def blocks() -> dict[str, Tensor]:
    values = torch.zeros(N, K).to(torch.float8_e4m3fn)
    return {NAME: values, f"{STEM}.weight_scale_inv": torch.ones(1, 1)}


def of_bnb_eight() -> dict[str, Tensor]:
    values = torch.ones(N, K, dtype=torch.int8)
    layout = torch.tensor(0, dtype=torch.uint8)
    return {NAME: values, f"{STEM}.SCB": torch.ones(N), f"{STEM}.weight_format": layout}


def state(**changes: Any) -> Tensor:
    values = {"quant_type": "nf4", "blocksize": 64, "shape": [N, K]} | changes
    return as_bytes(json.dumps(values).encode())


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def four() -> dict[str, Tensor]:
    return {
        NAME: torch.zeros(N * K // 2, 1, dtype=torch.uint8),
        f"{NAME}.quant_map": torch.linspace(-1, 1, 16),
        f"{NAME}.absmax": torch.ones(N * K // 64),
        STATE: state(),
    }


def nested() -> dict[str, Tensor]:
    return four() | {
        f"{NAME}.absmax": torch.zeros(N * K // 64, dtype=torch.uint8),
        f"{NAME}.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{NAME}.nested_absmax": torch.ones(1),
        STATE: state(nested_blocksize=256, nested_offset=0.5),
    }


def find(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[Checkpoint, Stored]:
    save_file(dict(tensors), folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    return checkpoint, find_stored(checkpoint, {NAME: (N, K)})[NAME]


@pytest.mark.parametrize("make", [packed, eight, blocks, of_bnb_eight, four, nested])
def test_what_the_damaged_ones_are_made_from_loads(
    make: Callable[[], dict[str, Tensor]], tmp_path: Path
) -> None:
    checkpoint, stored = find(tmp_path, make())
    assert tuple(load_stored(checkpoint, NAME, stored, torch.float32).shape) == (N, K)
    checkpoint.require(stored.parts, frozenset())


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


@pytest.mark.parametrize(
    ("make", "part", "change", "message"),
    [
        (packed, "weight_packed", to(torch.int64), "is I64, expected I32"),
        (packed, "weight_packed", to(torch.int16), "is I16, expected I32"),
        (packed, "weight_packed", to(torch.float32), "is F32, expected I32"),
        (packed, "weight_scale", to(torch.int64), "is I64, expected one of F32, BF16, F16"),
        (packed, "weight_scale", lambda t: t[0, 0], r"is \[\], expected 64 rows"),
        (packed, "weight_scale", lambda t: t[:, :0], r"is \[64, 0\], expected 64 rows"),
        (packed, "weight_scale", lambda t: t[:-1], r"is \[63, 2\], expected 64 rows"),
        (packed, "weight_scale", lambda t: t.repeat(1, 2)[:, :3], r"is \[64, 3\], .* of the 128"),
        (packed, "weight_shape", lambda t: t * 2, r"is \[128, 256\], config.json says \[64, 128\]"),
        (packed, "weight_shape", to(torch.float32), "is F32, expected one of I64, I32"),
        (packed, "weight_shape", lambda t: t[:1], r"is \[1\], expected \[2\]"),
        (eight, "weight_scale", to(torch.complex64), "is C64, expected one of F32"),
        (eight, "weight_scale", to(torch.bool), "is BOOL, expected one of F32"),
        (eight, "weight", lambda t: t[:, 1:], r"is \[64, 127\], expected \[64, 128\]"),
        (blocks, "weight_scale_inv", to(torch.int32), "is I32, expected one of F32"),
        (of_bnb_eight, "SCB", to(torch.bfloat16), "is BF16, expected F32"),
        (of_bnb_eight, "SCB", lambda t: t[1:], r"is \[63\], expected \[64\]"),
        (of_bnb_eight, "weight_format", lambda t: t.float() / 0, "is F32, expected U8"),
        (of_bnb_eight, "weight_format", lambda t: t.view(1), r"is \[1\], expected \[\]"),
        (four, "weight", to(torch.int64), "is I64, expected one of U8"),
        (four, "weight.absmax", to(torch.uint8), "is U8, expected one of F32"),
        (four, "weight.quant_map", to(torch.uint8), "is U8, expected one of F32"),
        (nested, "weight.absmax", to(torch.float32), "is F32, expected U8"),
        (nested, "weight.absmax", to(torch.int8), "is I8, expected U8"),
        (nested, "weight.nested_quant_map", to(torch.int32), "is I32, expected one of F32"),
        (nested, "weight.nested_absmax", to(torch.uint8), "is U8, expected one of F32"),
        (four, STATE.removeprefix(f"{STEM}."), to(torch.int32), "is I32, expected U8"),
    ],
)
def test_parts_that_are_something_else_are_named(
    make: Callable[[], dict[str, Tensor]], part: str, change: Change, message: str, tmp_path: Path
) -> None:
    tensors = make()
    name = f"{STEM}.{part}"
    tensors[name] = change(tensors[name]).contiguous()
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        find(tmp_path, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (packed, "weight_scale"),
        (eight, "weight_scale"),
        (blocks, "weight_scale_inv"),
        (of_bnb_eight, "SCB"),
        (four, "weight.quant_map"),
        (four, "weight.absmax"),
        (nested, "weight.nested_quant_map"),
        (nested, "weight.nested_absmax"),
    ],
)
def test_a_scale_that_is_no_number_is_named(
    make: Callable[[], dict[str, Tensor]], part: str, value: float, tmp_path: Path
) -> None:
    tensors = make()
    tensors[f"{STEM}.{part}"].view(-1)[-1] = value
    count = tensors[f"{STEM}.{part}"].numel()
    checkpoint, stored = find(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"{STEM}.{part}: 1 of {count} values are NaN"):
        load_stored(checkpoint, NAME, stored, torch.float32)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (state(blocksize=2**44), f"`blocksize` is {2**44}, expected an even number from 2 to 4096"),
        (state(blocksize=float("inf")), "`blocksize` is inf"),
        (state(blocksize=0), "`blocksize` is 0"),
        (state(blocksize=63), "`blocksize` is 63"),
        (state(blocksize="64"), "`blocksize` is '64'"),
        (state(blocksize=[64]), r"`blocksize` is \[64\]"),
        (state(nested_blocksize=2**44, nested_offset=0), f"`nested_blocksize` is {2**44}"),
        (state(nested_blocksize=0, nested_offset=0), "`nested_blocksize` is 0"),
        (state(nested_blocksize=256), "cannot be read .*KeyError: 'nested_offset'"),
        (state(nested_blocksize=256, nested_offset=float("nan")), "`nested_offset` is nan"),
        (state(nested_blocksize=256, nested_offset=10**400), "cannot be read .*OverflowError"),
        (state(shape=[K, N]), r"says \[128, 64\], config.json \[64, 128\]"),
        (state(shape=64), r"says 64, config.json \[64, 128\]"),
        (as_bytes(b"[" * 200_000), "cannot be read .*RecursionError"),
        (as_bytes(b"[]"), "cannot be read .*TypeError"),
        (as_bytes(b"\xff"), "cannot be read .*UnicodeDecodeError"),
        (as_bytes(b'{"blocksize": ' + b"1" * 5000 + b"}"), "cannot be read .*ValueError"),
    ],
)
def test_descriptions_that_make_no_sense_are_named(
    described: Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{STATE}:? {message}"):
        find(tmp_path, four() | {STATE: described})


def test_blocks_may_be_larger_than_the_weight(tmp_path: Path) -> None:
    tensors = nested() | {
        f"{NAME}.absmax": torch.zeros(2, dtype=torch.uint8),
        STATE: state(blocksize=4096, nested_blocksize=256, nested_offset=0.5),
    }
    checkpoint, stored = find(tmp_path, tensors)
    weight = load_stored(checkpoint, NAME, stored, torch.float32)
    # Code 0 is −1 in both tables: −1 · (−1 · 1 + 0.5).
    assert isinstance(weight, Tensor) and bool((weight == 0.5).all())


def free_scales(tensors: dict[str, Tensor]) -> None:
    noise = torch.rand(N, K // 32, generator=torch.Generator().manual_seed(1))
    tensors[f"{STEM}.weight_scale"] *= 1 + 0.2 * noise


def least_values(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STEM}.weight_packed"].zero_()  # all are −8


@pytest.mark.parametrize(
    ("change", "form"), [(None, "int4"), (free_scales, "int8"), (least_values, "int8")]
)
@pytest.mark.filterwarnings("ignore:4-bit weights whose scales")
def test_four_bits_are_known_to_be_loaded_as_eight(
    change: Callable[[dict[str, Tensor]], None] | None, form: str, tmp_path: Path
) -> None:
    tensors = packed(group=32)
    if change is not None:
        change(tensors)
    checkpoint, stored = find(tmp_path, tensors)
    assert (stored.form, stored.group) == (form, 32)
    loaded = load_stored(checkpoint, NAME, stored, torch.float32)
    assert isinstance(loaded, {"int4": Int4Weight, "int8": Int8Weight}[form])
