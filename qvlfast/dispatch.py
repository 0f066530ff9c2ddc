"""The only place that chooses an implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

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


class TritonOps(Ops):
    """The table with every entry a Triton kernel; made by :func:`choose_ops`.

    Args:
        refusal: what a kernel raises when it does not take its operands; callers get BackendError.
    """

    name = "triton"

    def __init__(self, refusal: type[Exception], **kernels: Callable[..., Any]) -> None:
        def entry(kernel: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(kernel)
            def run(*args: Any, **kwargs: Any) -> Any:
                try:
                    return kernel(*args, **kwargs)
                except refusal as error:
                    raise BackendError(f"backend 'triton' refuses {error}") from error

            return run

        for op, kernel in kernels.items():
            setattr(self, op, entry(kernel))


def _triton_ops(device: torch.device) -> Ops:
    """Every op as a Triton kernel. Nothing falls back: what a kernel does not take is an error."""
    try:
        from .kernels.common import INTERPRETED, RefusalError
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
    from .kernels.activation import gelu_erf, gelu_tanh, swiglu
    from .kernels.attention import attention
    from .kernels.embed import embed
    from .kernels.gemm import linear
    from .kernels.norm import layer_norm, rms_norm
    from .kernels.patch_embed import patch_embed, resample_positions
    from .kernels.pool import pool, score
    from .kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables

    return TritonOps(
        RefusalError,
        linear=linear,
        embed=embed,
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        gelu_tanh=gelu_tanh,
        gelu_erf=gelu_erf,
        swiglu=swiglu,
        mrope_tables=mrope_tables,
        vision_rope_tables=vision_rope_tables,
        rope=rope,
        norm_rope=norm_rope,
        attention=attention,
        patch_embed=patch_embed,
        resample_positions=resample_positions,
        pool=pool,
        score=score,
    )
