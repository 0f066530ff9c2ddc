"""The only place that chooses an implementation."""

from __future__ import annotations

import torch

from .errors import BackendError
from .ops import Ops
from .quant import Quantization

BACKENDS = ("auto", "native", "reference", "triton")


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
    return torch.device("cpu") if chosen.type == "cpu" else chosen  # cpu:0 is no other


def check_backend(backend: str) -> None:
    """Raise BackendError unless there is such a backend."""
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")


def choose_ops(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    plan: Quantization | None = None,
) -> Ops:
    """The table of implementations for ``backend`` on ``device``.

    ``auto`` is ``native`` on a CPU, and the reference where that does not go: in float16, with
    FP8 weights or int4 weights alone, and on a GPU, where no kernel has been timed yet; with
    flash-attn there for plain batches, if it is installed.

    Args:
        dtype: of the activations.
        plan: how weights are to be quantised, or None.

    Raises:
        BackendError: no such backend, or it does not run here.
    """
    check_backend(backend)
    if backend == "triton":
        return _triton_ops(device)
    refusal = _native_refusal(device, dtype, plan)
    if backend == "native" and refusal:
        raise BackendError(f"backend 'native' {refusal}: use backend='reference'")
    if backend == "reference":
        return Ops()
    if refusal:
        return _fast_reference(device)
    from . import _C
    from .backends.native import NativeOps

    try:
        _C.isa()
    except ValueError as error:  # of QVLFAST_ISA
        raise BackendError(str(error)) from None
    return NativeOps()


def _fast_reference(device: torch.device) -> Ops:
    """The reference, on a GPU with flash-attn where it is installed."""
    ops = Ops()
    if device.type == "cuda":
        from .flash import flash_first, installed_version

        if installed_version() is not None:
            # An entry of this table alone.
            ops.attention = flash_first(ops.attention)  # type: ignore[method-assign]
    return ops


def _native_refusal(
    device: torch.device, dtype: torch.dtype, plan: Quantization | None
) -> str | None:
    """Why the CPU kernels cannot run this, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {str(device)!r}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"computes in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if plan is not None and plan.weight_only:
        return "multiplies int4 weights by int8 rows only, and weight_only asks for others"
    return "has no FP8 weights" if plan is not None and plan.format == "fp8" else None


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
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        raise BackendError(
            f"backend 'triton' begins with sm_80, and {str(device)!r} is sm_{found[0]}{found[1]}: "
            "use backend='reference'"
        )
    from .backends.triton import TritonOps

    return TritonOps(device)
