"""The only place that chooses an implementation."""

from __future__ import annotations

import torch

from .errors import BackendError
from .ops import Ops

BACKENDS = ("auto", "reference")


def choose_device(device: str | torch.device) -> torch.device:
    """``auto`` is the first CUDA GPU, or the CPU where there is none.

    Raises:
        BackendError: the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BackendError(f"device {device!r} is unknown: use auto, cpu or cuda:0") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device {device!r}: torch {torch.__version__} sees no CUDA GPU here; use device='cpu'"
        )
    if chosen.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} is not supported: use auto, cpu or cuda:0")
    return chosen


def choose_ops(backend: str) -> Ops:
    """The table of implementations for ``backend``.

    Raises:
        BackendError: no such backend.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    return Ops()
