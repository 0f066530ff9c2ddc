"""The oracle: the same prompt through transformers' own ``Qwen3VLModel``."""

from __future__ import annotations

from qvlfast.cli.verify import (
    load_reference,
    reference_hidden,
    reference_scores,
    reference_vectors,
)

__all__ = ["load_reference", "reference_hidden", "reference_scores", "reference_vectors"]
