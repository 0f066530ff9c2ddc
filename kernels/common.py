"""What every kernel shares: launching, counting, the target, and exact 16-bit conversions.

House rules of this folder. Names: ``p_`` pointer, ``o_`` offset, ``m_`` mask, ``b_`` block,
``i_`` index; the shape of every block value stands above it. Alphabet: T tokens, N rows or
columns, K inner size, C channels, H heads, D head size. Offsets that grow with the number of
tokens are int64. A config is chosen by one pure function an op, from the target and the shape;
nothing is tuned at run time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .measured import ROWS

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET was 1 when Triton was first imported: kernels then run in NumPy."""

EMULATE = tl.constexpr(INTERPRETED)

LAUNCHES: Counter[str] = Counter()
"""Launches of each op since the start, or since a test cleared it."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

New: TypeAlias = Callable[..., Tensor]
"""``torch.empty``, or what takes the same arguments: where a kernel's result is put."""

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

AHEAD: ContextVar[Ahead | None] = ContextVar("AHEAD", default=None)
"""Set while launches are compiled and not run, see ahead.py: operands are then without storage."""

# The interpreter keeps the program's place in globals.
_ONE_AT_A_TIME = threading.Lock()


class Ahead(Protocol):
    """What takes launches in place of a GPU."""

    @property
    def target(self) -> str: ...
    def compile(self, op: str, kernel: Any, args: tuple[Any, ...], options: Any) -> None: ...


class RefusalError(ValueError):
    """A kernel does not take these operands; the message says which and why."""


def require_floats(op: str, **tensors: Tensor) -> None:
    """All on one device that Triton runs on here, and of one dtype out of :data:`FLOATS`.

    Raises:
        RefusalError: they are not.
    """
    require_device(op, *tensors.values())
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise RefusalError(f"{op}: {name} is {tensor.dtype}, not float32, float16 or bfloat16")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        kinds = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise RefusalError(f"{op}: the operands must have one dtype, got {kinds}")


def require_device(op: str, *tensors: Tensor) -> None:
    """All on one device, and Triton runs there.

    Raises:
        RefusalError: they are not, or it does not.
    """
    if AHEAD.get() is not None:
        return
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise RefusalError(f"{op}: operands on several devices: {', '.join(map(str, devices))}")
    if devices and not INTERPRETED and next(iter(devices)).type != "cuda":
        raise RefusalError(
            f"{op}: Triton kernels run on CUDA tensors, not on {next(iter(devices))}, "
            "unless TRITON_INTERPRET=1 is set before Triton is imported"
        )


def require_unit_stride(op: str, **tensors: Tensor) -> None:
    """Neighbours along the last axis are neighbours in memory.

    Raises:
        RefusalError: they are not.
    """
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise RefusalError(
                f"{op}: {name} has strides {tuple(tensor.stride())}, the last must be 1: "
                "call contiguous() on it"
            )


def target_of(device: torch.device) -> str:
    """What configs are chosen for: ``interpreter``, or ``sm_89`` and the like."""
    ahead = AHEAD.get()
    return ahead.target if ahead is not None else _target_here(device)


@lru_cache(maxsize=64)
def _target_here(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class RowConfig:
    """Blocks of a row-wise kernel: whole rows, ``rows`` of them a program."""

    rows: int
    columns: int
    warps: int


def row_config(target: str, columns: int) -> RowConfig:
    """Blocks for rows of ``columns`` values.

    A row is held in registers whole, since its norm is needed before its first value is written.
    Short rows share a program until it has about 2,048 values: 16 a thread of 4 warps, enough
    16-byte loads in flight; where they were measured, as many as was best. The interpreter pays by
    the program, so there it is as much as NumPy handles well.
    """
    block = triton.next_power_of_2(max(columns, 16))
    if measured := ROWS.get((target, block)):
        return RowConfig(*measured.blocks)
    rows = max(1, (1 << 16 if target == "interpreter" else 1 << 11) // block)
    return RowConfig(rows, block, warps=4 if block <= 2048 else 8 if block <= 8192 else 16)


def launch(op: str, kernel: Any, programs: int, *args: Any, config: Any, **constants: Any) -> None:
    """Run ``programs`` instances of ``kernel`` and count one launch of ``op``; none for none.

    Args:
        config: has ``warps``, and ``stages`` where loads are pipelined.
    """
    if programs == 0:
        return
    LAUNCHES[op] += 1
    options = {
        "num_warps": config.warps,
        "num_stages": getattr(config, "stages", 1),
        "enable_fp_fusion": True,
    }
    ahead = AHEAD.get()
    if ahead is not None:
        ahead.compile(op, kernel, args, constants | options)
        return
    if INTERPRETED:
        with _ONE_AT_A_TIME:
            kernel[(programs,)](*args, **constants, **options)
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(first.device):
        kernel[(programs,)](*args, **constants, **options)


def inline(function: Any) -> Any:
    """A function that kernels call.

    ``triton.jit``, but in the interpreter the plain function: kernels are plain Python there, and
    each call of a jitted one would patch the whole language again, for a millisecond.
    """
    return function if INTERPRETED else triton.jit(function)


@inline
def widen(b_x):
    """float32 of a block of any number type.

    The interpreter's own bfloat16 conversions are not relied on: the bits are shifted instead.
    """
    if EMULATE and b_x.dtype == tl.bfloat16:
        bits = b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        b_wide = bits.to(tl.float32, bitcast=True)
    elif EMULATE and b_x.dtype == tl.float8e4nv:
        # It takes the bits of NaN for 480.
        b_wide = b_x.to(tl.float32)
        b_wide = tl.where(tl.abs(b_wide) > 448.0, float("nan"), b_wide)
    else:
        b_wide = b_x.to(tl.float32)
    return b_wide


@inline
def narrow(b_x, dtype: tl.constexpr):
    """``dtype`` of a float32 block, rounded to nearest, ties to even.

    The interpreter cuts bfloat16 off, so there the rounding is done on the bits.
    """
    if EMULATE and dtype == tl.bfloat16:
        bits = b_x.to(tl.uint32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(is_nan, 0x7FC0, bits)
        b_narrow = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_narrow = b_x.to(dtype)
    return b_narrow


@inline
def dot(b_a, b_b, b_acc):
    """b_acc + b_a · b_b in float32; float32 operands keep all their bits (no tf32)."""
    if EMULATE:
        b_a = widen(b_a)
        b_b = widen(b_b)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")
