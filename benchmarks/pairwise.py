"""Reranking by the official recipe in transformers: every pair whole, one after the other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qvlfast.config import load_config
from qvlfast.prompt import Prompt, Prompter

from .cpu import Transformers


class Recipe:
    """The model with its scores: sigmoid(h · (W[yes] − W[no])) of the last token's state h.

    It is handed our ids and pixels, so its time is that of the forward pass alone. One pair needs
    no padding.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        peer = Transformers(folder, dtype)
        self.name = f"{peer.name} {str(dtype).removeprefix('torch.')}"
        self._peer = peer
        prompter = Prompter(folder, load_config(folder))
        yes, no = (peer.answers[prompter.token_id(word)] for word in ("yes", "no"))
        self._direction = yes - no

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """One pair in transformers' form."""
        return self._peer.inputs([prompt])

    @torch.inference_mode()
    def score(self, inputs: dict[str, Tensor]) -> float:
        """From 0 to 1."""
        hidden = self._peer.model(**inputs).last_hidden_state[0, -1]
        return float(torch.sigmoid(hidden @ self._direction))
