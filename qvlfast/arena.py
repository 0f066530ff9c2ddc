"""Where the activations of a pass are put: torch's heap, or one block whose size is known before.

A pass takes memory as a stack does: what a layer needs is on top of what came before, and gone when
the layer is done. So its tensors can follow one another in one block, without asking an allocator
anything, and every layer finds its own where the last one had them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from math import prod
from typing import Protocol

import torch
from torch import Tensor

_ALIGN = 256
_HUGE = 1 << 21
_MOST_VIEWS = 4096


class Memory(Protocol):
    """What results are put in."""

    def empty(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """As ``torch.empty``."""
        ...

    def scope(self) -> AbstractContextManager[None]:
        """What is taken in a ``with`` statement is free after it. Scopes end in the reverse order
        of their beginnings."""
        ...


class Heap:
    """torch's own allocator, which knows by itself what is free."""

    def empty(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()


HEAP = Heap()


class Arena:
    """One block, handed out from its beginning. For one pass at a time.

    Where the block is too small, tensors come from the heap: nothing fails for it, and ``spilled``
    says so.

    Attributes:
        peak: bytes that were taken at once, at most, those from the heap included.
        spilled: bytes that the heap had to give since the last :meth:`reserve`.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        self.spilled = 0
        self._device = device
        self._top = 0
        self._block = torch.empty(0, dtype=torch.uint8, device=device)
        # The layers of a pass take the same again and again: three views each would cost more than
        # torch.empty does.
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of the block."""
        return self._block.nbytes

    def reserve(self, size: int) -> None:
        """Have so many bytes before a pass; what was taken before is not to be used any more.

        Raises:
            MemoryError, torch.OutOfMemoryError: they are not to be had.
        """
        self._top = self.peak = self.spilled = 0
        if size > self.size:
            self.release()
            self._block = _new_block(size, self._device)
        elif len(self._views) > _MOST_VIEWS:
            self._views.clear()

    def release(self) -> None:
        """Give the block back."""
        self._views.clear()
        self._block = self._block.new_empty(0)

    def empty(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """As ``torch.empty``, for the arena's device alone."""
        key = (self._top, tuple(shape), dtype)
        size = prod(shape) * dtype.itemsize
        start, stop = self._top, self._top + -(-size // _ALIGN) * _ALIGN
        self._top = stop
        self.peak = max(self.peak, stop)
        if stop > self.size:
            self.spilled += size
            return torch.empty(shape, dtype=dtype, device=self._device)
        view = self._views.get(key)
        if view is None:
            view = self._block[start : start + size].view(dtype).view(key[1])
            self._views[key] = view
        return view

    @contextmanager
    def scope(self) -> Iterator[None]:
        """See :class:`Memory`."""
        before = self._top
        try:
            yield
        finally:
            self._free(before)

    def _free(self, start: int) -> None:
        """Everything from that byte on is free."""
        self._top = start


def _new_block(size: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    size = -(-size // _HUGE) * _HUGE
    try:
        # Private: shared memory gets no large pages, and a forked child would write into it.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {size} bytes for activations: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # In pages of 2 MiB the block is there at once, and few entries of the TLB reach it.
        with suppress(OSError):  # of a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
