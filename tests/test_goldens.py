"""Prompts and pixels against the reference pipeline's; see goldens/make_goldens.py."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.checkpoints import SHAPES, config_json, write_processor
from qvlfast.config import ModelConfig, load_config
from qvlfast.inputs import Item, parse_item
from qvlfast.media import MediaPolicy, load_image
from qvlfast.pixels import Patches, PixelLimits, image_patches
from qvlfast.prompt import Prompter
from qvlfast.video import item_patches
from tests.goldens.cases import (
    EMBED,
    FILMS,
    FOLDER,
    FRAME_LISTS,
    RERANK,
    STILLS,
    Input,
    Still,
    sampled_rows,
    video_inputs,
)

VIDEOS = video_inputs(FRAME_LISTS, FILMS)

# Bicubic sums in float32 differ in their last bit between versions of torch, which moves a value
# near a half to the other level.
VIDEO_LEVELS = 1


@functools.cache
def golden(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return document


@functools.cache
def golden_rows() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "videos.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prompts need of a checkpoint, without its weights."""
    path = tmp_path_factory.mktemp("processor")
    write_processor(path)
    config = config_json(SHAPES["tiny"], "float32", "rope_parameters", tied=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return load_config(folder)


@pytest.fixture(scope="module")
def prompter(folder: Path, config: ModelConfig) -> Prompter:
    return Prompter(folder, config)


def read(case: Input, config: ModelConfig) -> tuple[Item, list[Patches]]:
    item = parse_item(case.build())
    return item, item_patches(item, config.vision, PixelLimits(), MediaPolicy())


def expanded(ids: list[int | list[int]]) -> list[int]:
    """Undo the run lengths of prompts.json."""
    return [i for run in ids for i in ([run] if isinstance(run, int) else [run[0]] * run[1])]


def check_prompt(name: str, ids: np.ndarray, media: list[Patches]) -> None:
    expected = golden("prompts.json")[name]
    assert ids.tolist() == expanded(expected["ids"])
    assert [list(m.grid) for m in media if not m.is_video] == expected["images"]
    assert [list(m.grid) for m in media if m.is_video] == expected["videos"]


def test_every_case_has_its_golden() -> None:
    prompts = {f"embed-{name}" for name in EMBED} | {f"rerank-{name}" for name in RERANK}
    assert set(golden("prompts.json")) == prompts
    assert set(golden("stills.json")) == {still.name for still in STILLS}
    assert set(golden("videos.json")) == set(golden_rows()) == set(VIDEOS)


@pytest.mark.parametrize("name", EMBED)
def test_embedding_prompt(name: str, prompter: Prompter, config: ModelConfig) -> None:
    item, media = read(EMBED[name], config)
    prompt = prompter.embed(item, media, max_length=8192)
    assert prompt.truncated_tokens == 0
    check_prompt(f"embed-{name}", prompt.ids, media)


@pytest.mark.parametrize("name", RERANK)
def test_reranking_prompt(name: str, prompter: Prompter, config: ModelConfig) -> None:
    (query, query_media), (document, media) = (read(case, config) for case in RERANK[name])
    prompt = prompter.rerank(query, query_media, document, media, max_length=10240)
    assert prompt.truncated_tokens == 0
    check_prompt(f"rerank-{name}", prompt.ids, [*query_media, *media])


@pytest.mark.parametrize("still", STILLS, ids=lambda still: still.name)
def test_still(still: Still, config: ModelConfig) -> None:
    patches = image_patches(load_image(still.build(), MediaPolicy()), config.vision, PixelLimits())
    expected = golden("stills.json")[still.name]
    assert list(patches.grid) == expected["grid"]
    assert hashlib.sha256(patches.pixels.tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("name", VIDEOS)
def test_video(name: str, config: ModelConfig) -> None:
    _, (patches,) = read(VIDEOS[name], config)
    assert list(patches.grid) == golden("videos.json")[name]
    expected = golden_rows()[name]
    found = patches.pixels[sampled_rows(len(patches.pixels))]
    difference = np.abs(found.astype(np.int16) - expected)
    assert difference.max() <= VIDEO_LEVELS
    assert difference.mean() < 0.01
