"""Memory that tells when a kernel reads or writes what is not its own, or forgets to write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# Elements before and after each output; 16-byte alignment is kept for every dtype.
_GUARD = 64


def inside_poison(x: torch.Tensor) -> torch.Tensor:
    """The values of ``x`` as a strided view into a buffer of NaN (255 or −1 for integers)."""
    poison = torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -1
    buffer = torch.full([n + 2 for n in x.shape], poison, dtype=x.dtype)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


def between_guards(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``x`` within poison, for what kernels want without gaps."""
    return inside_poison(x.reshape(-1)).view(x.shape)


@contextmanager
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty`` gives NaN between two guards; on leaving, the guards must be whole."""
    real = torch.empty
    buffers: list[torch.Tensor] = []

    def empty(*shape, dtype=torch.float32, **options):
        size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        buffer = real(size.numel() + 2 * _GUARD, dtype=dtype, **options).fill_(7)
        inner = buffer[_GUARD : _GUARD + size.numel()]
        if dtype.is_floating_point:
            inner.fill_(torch.nan)
        buffers.append(buffer)
        return inner.view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for buffer in buffers:
        for guard in (buffer[:_GUARD], buffer[-_GUARD:]):
            assert (guard == 7).all(), "a kernel wrote outside its output"
