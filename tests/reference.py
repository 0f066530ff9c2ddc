"""The oracle: the same prompt through transformers' own ``Qwen3VLModel``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from qvlfast.prompt import Prompt


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model in ``dtype``, with scaled-dot-product attention."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


def _pixel_values(prompt: Prompt, is_video: bool, temporal: int) -> tuple[Tensor, Tensor] | None:
    """Normalised float pixels as the reference's processor lays them out: a still is two equal
    frames; with mean and std of 0.5."""
    media = [m for m in prompt.media if m.is_video == is_video]
    if not media:
        return None
    rows = []
    for patches in media:
        pixels = patches.pixels.astype(np.float32)
        if not is_video:
            count, width = pixels.shape
            still = pixels.reshape(count, 3, 1, width // 3)
            pixels = np.repeat(still, temporal, axis=2).reshape(count, -1)
        rows.append((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
    grids = torch.tensor([m.grid for m in media], dtype=torch.int64)
    return torch.from_numpy(np.concatenate(rows)), grids


@torch.inference_mode()
def reference_hidden(model: Any, prompt: Prompt) -> Tensor:
    """The final hidden state of the last token, ``[hidden_size]``, in the model's dtype."""
    config = model.config
    ids = torch.from_numpy(prompt.ids.astype(np.int64))[None]
    kinds = torch.zeros_like(ids, dtype=torch.int32)
    kinds[ids == config.image_token_id] = 1
    kinds[ids == config.video_token_id] = 2
    inputs: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
    }
    temporal = config.vision_config.temporal_patch_size
    for is_video, values, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        found = _pixel_values(prompt, is_video, temporal)
        if found is not None:
            inputs[values], inputs[grid] = found
    return model.model(**inputs).last_hidden_state[0, -1]


def reference_vectors(model: Any, prompts: Sequence[Prompt]) -> np.ndarray:
    """Unit vectors ``[N, D]`` float32."""
    hidden = torch.stack([reference_hidden(model, prompt) for prompt in prompts]).float()
    return F.normalize(hidden, dim=-1).numpy()


def reference_scores(
    model: Any, prompts: Sequence[Prompt], answer_ids: tuple[int, int]
) -> np.ndarray:
    """Scores ``[N]`` float32: sigmoid(h · (W[yes] − W[no]))."""
    yes, no = (model.lm_head.weight[i].detach().float() for i in answer_ids)
    hidden = torch.stack([reference_hidden(model, prompt) for prompt in prompts]).float()
    return torch.sigmoid(hidden @ (yes - no)).numpy()
