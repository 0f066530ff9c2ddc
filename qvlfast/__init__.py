"""Inference for Qwen3-VL-Embedding and Qwen3-VL-Reranker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedder import Embedder
    from .errors import (
        BackendError,
        BatchError,
        CheckpointError,
        DeadlineError,
        InputError,
        QueueFull,
        QvlfastError,
    )
    from .metrics import Metrics
    from .quant import Quantization
    from .quant.stored import QuantizationWarning
    from .request import Usage
    from .reranker import Reranker
    from .runtime import Encoded, TruncationWarning

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BatchError",
    "CheckpointError",
    "DeadlineError",
    "Embedder",
    "Encoded",
    "InputError",
    "Metrics",
    "Quantization",
    "QuantizationWarning",
    "QueueFull",
    "QvlfastError",
    "Reranker",
    "TruncationWarning",
    "Usage",
    "__version__",
]

# Looked up when first used: torch takes a second to import, and `qvlfast --help` needs none of it.
_PLACES = {
    "BackendError": "errors",
    "BatchError": "errors",
    "CheckpointError": "errors",
    "DeadlineError": "errors",
    "Embedder": "embedder",
    "Encoded": "runtime",
    "InputError": "errors",
    "Metrics": "metrics",
    "Quantization": "quant",
    "QuantizationWarning": "quant.stored",
    "QueueFull": "errors",
    "QvlfastError": "errors",
    "Reranker": "reranker",
    "TruncationWarning": "runtime",
    "Usage": "request",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
