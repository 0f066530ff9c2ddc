"""Compile launches into Triton's cache instead of running them; needs no GPU.

The launches go through Triton's own launcher up to the point where it would touch the device, so
what is compiled, and the name that it has in the cache, are those of a real launch.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.knobs import cache as _cache
from triton.knobs import runtime as _knobs
from triton.runtime import driver

from .common import AHEAD, INTERPRETED, RefusalError
from .configs import TARGETS, nearest

# Triton has one active driver a process.
_ONE_AT_A_TIME = threading.Lock()


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        # Launches are cached by device; this one is none that is there.
        return f"ahead {self.target}"

    def get_current_stream(self, device: str) -> int:
        return 0


class Compiler:
    """Takes the launches.

    Attributes:
        target: ``sm_89`` and the like.
        compiled: op → kernels that differ, whether from the compiler or from the cache.
    """

    def __init__(self, target: str, progress: Callable[[str], None]) -> None:
        self.target = target
        self.compiled: dict[str, set[str]] = {}
        self._progress = progress

    def compile(self, op: str, kernel: Any, args: tuple[Any, ...], options: Any) -> None:
        self._progress(op)
        made = kernel.run(*args, grid=(1,), warmup=True, **options)
        self.compiled.setdefault(op, set()).add(made.hash)


@contextmanager
def compiling_for(
    target: str, progress: Callable[[str], None] = lambda op: None
) -> Iterator[Compiler]:
    """Within it, every launch of this thread is compiled for ``target`` and not run.

    Operands may be without storage. Triton must not be used by other threads meanwhile.

    Args:
        progress: called with the op of each launch.

    Raises:
        RefusalError: the target is unknown, or the interpreter runs, which compiles nothing.
    """
    if INTERPRETED or _knobs.interpret:
        raise RefusalError("compiling: TRITON_INTERPRET=1 is set, which compiles nothing: unset it")
    if not re.fullmatch(r"sm_\d+", target):
        raise RefusalError(f"compiling: target {target!r} is unknown: use {', '.join(TARGETS)}")
    try:
        nearest(target)
    except ValueError as error:
        raise RefusalError(f"compiling: {error}") from None
    with _ONE_AT_A_TIME:
        before = driver._active
        driver.set_active(_Driver(target))
        compiler = Compiler(target, progress)
        token = AHEAD.set(compiler)
        try:
            yield compiler
        finally:
            AHEAD.reset(token)
            driver._active = before


def cache_folder() -> str:
    """Where Triton keeps what it compiled."""
    return str(_cache.dir)
