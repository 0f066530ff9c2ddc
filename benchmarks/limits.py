"""What this processor can do at most, measured: ``python -m benchmarks.limits``.

Multiply-adds from register to register, and reading memory, on all threads at once. Machines are
shared and their speed drifts, so that limits are measured in the run that is compared with them.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from qvlfast import _C

SOURCE = Path(__file__).parent / "limits.cpp"
# Far beyond the last-level cache, for each thread.
_READ_BYTES = 256 << 20
_SECONDS = 0.3


@dataclass(frozen=True)
class Limits:
    """All threads together.

    Attributes:
        flops: operations a second, two for each multiply-add, by the format of the operands:
            ``f32``, ``bf16`` (those of ``f32`` where no instruction multiplies bfloat16),
            ``int8``.
        read: bytes a second from memory.
    """

    flops: dict[str, float]
    read: float


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        flags = ["-O2", "-std=c++17", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    for name in ("float_peak", "bf16_peak", "int8_peak"):
        getattr(library, name).argtypes = [ctypes.c_double]
        getattr(library, name).restype = ctypes.c_double
    library.amx_peak.argtypes = [ctypes.c_double, ctypes.c_int]
    library.amx_peak.restype = ctypes.c_double
    library.read_rate.argtypes = [ctypes.c_double, ctypes.c_void_p, ctypes.c_int64]
    library.read_rate.restype = ctypes.c_double
    return library


def measure(threads: int | None = None) -> Limits:
    """Measure for about two seconds."""
    count = threads or _C.num_threads()
    library = _library()
    uses_tiles = _C.isa() == "amx"

    def together(work: Callable[[int], float]) -> float:
        with ThreadPoolExecutor(count) as pool:
            return sum(pool.map(work, range(count)))

    memory = np.ones((count, _READ_BYTES), dtype=np.uint8)
    single = together(lambda _: library.float_peak(_SECONDS))
    half = together(lambda _: library.bf16_peak(_SECONDS))
    byte = together(lambda _: library.int8_peak(_SECONDS))
    if uses_tiles:
        half = max(half, together(lambda _: library.amx_peak(_SECONDS, 0)))
        byte = max(byte, together(lambda _: library.amx_peak(_SECONDS, 1)))
    read = together(lambda i: library.read_rate(_SECONDS, memory[i].ctypes.data, _READ_BYTES))
    return Limits({"f32": single, "bf16": half or single, "int8": byte}, read)


def main() -> None:
    found = measure()
    for name, value in found.flops.items():
        print(f"{name:>5} {value / 1e9:8.0f} G/s")
    print(f" read {found.read / 1e9:8.1f} GB/s")


if __name__ == "__main__":
    main()
