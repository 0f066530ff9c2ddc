"""flash-attn for the attention of plain batches, where it is installed.

It knows no forest, so batches with shared beginnings, resident segments or chosen rows stay with
the backend's own attention. Which one runs is one pure function, whose answer says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import Forest

LEAST_VERSION = (2, 7)
# What flash-attn 2 is built for: Ampere to Hopper, 16 bits, heads of up to 256 in steps of 8.
_TARGETS = range(80, 91)
_MOST_DIM = 256


@dataclass(frozen=True)
class Call:
    """What decides about one call of attention.

    Attributes:
        device: ``cpu`` or ``cuda``.
        capability: 80 for sm_80 and so on; 0 on a CPU.
        dim: of a head.
        edges: some segment continues another, or is resident.
        read: only some rows are wanted.
    """

    device: str
    capability: int
    dtype: torch.dtype
    dim: int
    edges: bool
    read: bool


@dataclass(frozen=True)
class Choice:
    """Whether flash-attn runs, and the reason."""

    flash: bool
    reason: str

    def __str__(self) -> str:
        return f"{'flash-attn' if self.flash else 'own attention'}: {self.reason}"


def choose_attention(call: Call, installed: str | None) -> Choice:
    """Which attention a call gets.

    Args:
        installed: the version of flash-attn that can be imported, or None.
    """
    if call.device != "cuda":
        return Choice(False, f"flash-attn runs on CUDA, not on {call.device}")
    if installed is None:
        return Choice(False, "flash-attn is not installed")
    if _parse(installed) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return Choice(False, f"flash-attn {installed} is older than {least}")
    if call.capability not in _TARGETS:
        return Choice(False, f"flash-attn 2 is for sm_80 to sm_90, not for sm_{call.capability}")
    if call.dtype not in (torch.float16, torch.bfloat16):
        return Choice(False, f"flash-attn takes 16 bits, not {call.dtype}")
    if call.dim > _MOST_DIM or call.dim % 8:
        return Choice(False, f"heads of {call.dim} values are no multiple of 8 up to {_MOST_DIM}")
    if call.edges:
        return Choice(False, "prompts of the batch share beginnings")
    if call.read:
        return Choice(False, "only the read tokens of the last layer are wanted")
    return Choice(True, f"flash-attn {installed}, a batch without shared beginnings")


@lru_cache(maxsize=1)
def installed_version() -> str | None:
    """The version of flash-attn if it can be imported, else None."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return None
    return metadata.version("flash-attn")


def flash_first(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attention`` of the ops' contract, with flash-attn where :func:`choose_attention` says."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forest: Forest,
        *,
        causal: bool,
        scale: float,
        read: NDArray[np.int64] | None = None,
    ) -> Tensor:
        call = describe(q, forest, read)
        if choose_attention(call, installed_version()).flash:
            return _run_flash(q, k, v, forest, causal, scale)
        return attention(q, k, v, forest, causal=causal, scale=scale, read=read)

    return run


def describe(q: Tensor, forest: Forest, read: NDArray[np.int64] | None) -> Call:
    """The :class:`Call` of these arguments."""
    capability = 0
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        capability = 10 * major + minor
    edges = bool((forest.parent >= 0).any()) or not np.array_equal(forest.cu_q, forest.cu_k)
    return Call(q.device.type, capability, q.dtype, q.shape[-1], edges, read is not None)


def _run_flash(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, causal: bool, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu = _boundaries(forest, q.device)
    longest = int(np.diff(forest.cu_q).max(initial=0))
    out: Any = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=causal
    )
    return out


@lru_cache(maxsize=16)
def _cached(key: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(key, dtype=torch.int32, device=device)


def _boundaries(forest: Forest, device: torch.device) -> Tensor:
    """``cu_seqlens``; every layer of a pass asks for the same."""
    return _cached(tuple(forest.cu_q.tolist()), device)


def _parse(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
