"""Inference for Qwen3-VL-Embedding and Qwen3-VL-Reranker."""

from __future__ import annotations

from .embedder import Embedder
from .engine import Usage
from .errors import BackendError, BatchError, CheckpointError, InputError, QvlfastError
from .reranker import Reranker
from .runtime import Encoded, TruncationWarning

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BatchError",
    "CheckpointError",
    "Embedder",
    "Encoded",
    "InputError",
    "QvlfastError",
    "Reranker",
    "TruncationWarning",
    "Usage",
    "__version__",
]
