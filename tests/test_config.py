"""``config.json`` and ``preprocessor_config.json``: what is wrong in them is named at load."""

from __future__ import annotations

import json
import reprlib
import shutil
from pathlib import Path

import pytest

from qvlfast import CheckpointError
from qvlfast.config import load_config, load_pixel_config
from qvlfast.prompt import Prompter


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint without its weights, for a test to damage."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy", ignore=ignored))


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


HUGE = 10**30
NAN, INFINITY = float("nan"), float("inf")
WRONG_VALUES: dict[tuple[str, ...], list[object]] = {
    ("text_config", "num_hidden_layers"): [HUGE, 1025, 0, None, True, 3.0],
    ("text_config", "hidden_size"): [HUGE, 0],
    ("text_config", "num_attention_heads"): [0, HUGE],
    ("text_config", "vocab_size"): [0, HUGE],
    ("text_config", "rms_norm_eps"): [NAN, INFINITY, -1e-6, 10**400, "1", 2],
    ("text_config", "rope_parameters", "rope_theta"): [NAN, INFINITY, -1, 0, 1e-300, 10**400],
    ("text_config", "rope_parameters", "mrope_section"): [
        *(None, "abc", 5, {}, ["24", 20, 20], [-1, 32, 33], [24.0, 20.0, 20.0], [[24], 20, 20]),
    ],
    ("text_config", "rope_parameters", "mrope_interleaved"): [False, None],
    ("vision_config", "depth"): [HUGE, 1025, 0],
    ("vision_config", "num_position_embeddings"): [HUGE, 0],
    ("vision_config", "spatial_merge_size"): [0, -1, HUGE],
    ("vision_config", "deepstack_visual_indexes"): [
        *(None, "abc", 5, {}, ["a"], [[1]], [True], [0.5], [-1], [HUGE], [1, 1], [2, 1]),
    ],
    ("image_token_id",): [HUGE, 151936, -1, None],
    ("tie_word_embeddings",): ["false", 1],
}


@pytest.mark.parametrize("place", WRONG_VALUES, ids=".".join)
def test_wrong_values_are_named(copy: Path, place: tuple[str, ...]) -> None:
    *parents, key = place
    for value in WRONG_VALUES[place]:

        def change(config: dict, value: object = value) -> None:
            for parent in parents:
                config = config[parent]
            config[key] = value

        edit_config(copy, change)
        with pytest.raises(CheckpointError) as caught:
            load_config(copy)
        message = str(caught.value)
        assert key in message and "config.json" in message, message
        assert reprlib.repr(value) in message, message
        assert len(message) < 400


@pytest.mark.parametrize(
    ("one", "other"),
    [("image_token_id", "video_token_id"), ("vision_start_token_id", "vision_end_token_id")],
)
def test_one_id_for_two_tokens(copy: Path, one: str, other: str) -> None:
    edit_config(copy, lambda c: c.update({one: c[other]}))
    with pytest.raises(CheckpointError, match="expected four different ids"):
        load_config(copy)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rescale_factor", ["x", None, [1], NAN, 1 / 254]),
        ("image_mean", [None, ["a", 0, 0], [None, 0, 0], [0, 0], [NAN] * 3, [1e30] * 3, [-1] * 3]),
        ("image_std", [5, [0] * 3, [1e-30] * 3, [INFINITY] * 3, [NAN] * 3, [10**400] * 3]),
    ],
)
def test_wrong_pixel_values_are_named(copy: Path, key: str, values: list[object]) -> None:
    path = copy / "preprocessor_config.json"
    original = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps({**original, key: value}))
        with pytest.raises(
            CheckpointError, match=rf"preprocessor_config\.json: `{key}` is"
        ) as caught:
            load_pixel_config(copy)
        assert reprlib.repr(value) in str(caught.value)


def test_pixel_values_of_other_models(tmp_path: Path) -> None:
    clip = {
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 1],
        "rescale_factor": 1 / 255,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    config = load_pixel_config(tmp_path)
    assert config.mean == (0.48, 0.46, 0.41) and config.std == (0.27, 0.26, 1.0)


def test_config_that_is_a_folder(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_config(copy)


@pytest.mark.parametrize(
    ("place", "number"), [("vocab", 151936), ("added_tokens", 151936), ("added_tokens", -1)]
)
def test_token_ids_beyond_the_table(copy: Path, place: str, number: int) -> None:
    path = copy / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    if place == "vocab":
        document["model"]["vocab"]["one more"] = number
    else:
        document["added_tokens"][-1]["id"] = number
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"token id {number}, and `vocab_size` .* 151936"):
        Prompter(copy, load_config(copy))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", "\ufeff{}"], ids=["deep", "digits", "mark"]
)
def test_damaged_json(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_config(copy)
