"""Prompts as the official scripts make them, for ``verify`` to compare with."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIMITS = {"min_pixels": 4096, "max_pixels": 1_843_200}
_TOTAL_PIXELS = 7_864_320


def official_prompt(
    processor: Any, tokenizer: Any, kind: str, value: Any
) -> tuple[list[int], NDArray[np.float32]]:
    """ids, and normalised pixels of its pictures and then its videos, of one input.

    Args:
        processor: transformers' ``Qwen3VLProcessor``; None for inputs of text alone.
        tokenizer: transformers' tokenizer.
        kind: ``embedder``, or ``reranker`` for a (query, document) pair.
    """
    from ..prompt import EMBED_INSTRUCTION, RERANK_INSTRUCTION, RERANK_SYSTEM

    if kind == "embedder":
        given = value.get("instruction", "") if isinstance(value, dict) else ""
        system = given.strip() or EMBED_INSTRUCTION
        if not unicodedata.category(system[-1]).startswith("P"):
            system += "."
        parts = _parts(value)
    else:
        query, document = value
        system = RERANK_SYSTEM
        parts = [
            _text(f"<Instruct>: {RERANK_INSTRUCTION}"),
            _text("<Query>:"),
            *_parts(query),
            _text("\n<Document>:"),
            *_parts(document),
        ]
    messages = [
        {"role": "system", "content": [_text(system)]},
        {"role": "user", "content": parts},
    ]
    owner = processor or tokenizer
    text = owner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if processor is None:
        return tokenizer(text)["input_ids"], np.empty(0, np.float32)

    from qwen_vl_utils.vision_process import (  # type: ignore[import-not-found,import-untyped]
        process_vision_info,
    )

    images, videos, options = process_vision_info(
        [messages], image_patch_size=16, return_video_metadata=True, return_video_kwargs=True
    )
    metadata = None
    if videos is not None:
        videos, metadata = (list(values) for values in zip(*videos, strict=True))
    result = processor(
        text=[text],
        images=images,
        videos=videos,
        video_metadata=metadata,
        do_resize=False,
        return_tensors="pt",
        **options,
    )
    pixels = [
        result[key].numpy() for key in ("pixel_values_videos", "pixel_values") if key in result
    ]
    ids: list[int] = result["input_ids"][0].tolist()
    return ids, np.concatenate(pixels) if pixels else np.empty(0, np.float32)


def template_of(path: Path) -> str:
    """The text of the chat template that this file holds."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jinja":
        return text
    template: str = json.loads(text)["chat_template"]
    return template


def _parts(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [_text(value)]
    parts: list[dict[str, Any]] = []
    if "video" in value:
        parts.append({"type": "video", "video": value["video"], "total_pixels": _TOTAL_PIXELS})
    if "image" in value:
        parts.append({"type": "image", "image": value["image"], **_LIMITS})
    if "text" in value:
        parts.append(_text(value["text"]))
    return parts


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
