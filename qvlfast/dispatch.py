"""The only place that chooses an implementation."""

from __future__ import annotations

import torch

from .errors import BackendError
from .ops import Ops

BACKENDS = ("auto", "reference", "triton")


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


def choose_ops(backend: str, device: torch.device) -> Ops:
    """The table of implementations for ``backend`` on ``device``.

    ``auto`` is the reference everywhere, on a GPU too: no kernel has been timed on one yet.

    Raises:
        BackendError: no such backend, or it does not run here.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    return _triton_ops(device) if backend == "triton" else Ops()


def _triton_ops(device: torch.device) -> Ops:
    try:
        from .kernels.common import INTERPRETED
    except ImportError as error:
        raise BackendError(
            f"backend 'triton' needs Triton ({error}): pip install 'qvlfast[gpu]'"
        ) from None
    if device.type != "cuda" and not INTERPRETED:
        raise BackendError(
            f"backend 'triton' needs device='cuda', not {str(device)!r}: use backend='reference'. "
            "Its kernels run on the CPU in Triton's interpreter only, which is for tests: set "
            "TRITON_INTERPRET=1 in the environment before Python starts"
        )
    from .backends.triton import TritonOps

    return TritonOps()
