"""Loading: every way a checkpoint can be laid out, and every way it can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import write_checkpoint
from qvlfast import CheckpointError, Embedder, Reranker
from qvlfast.checkpoint import Checkpoint, locate
from qvlfast.cli import main
from qvlfast.config import load_config, load_pixel_config
from qvlfast.ops import Ops
from qvlfast.weights import expected_shapes, load_weights

NORM = "model.language_model.norm.weight"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(folder: Path, change) -> None:
    """Rewrite the tensors of ``folder``; ``change`` gets and alters their dict."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def load(folder: Path, *, dtype=None, answer_ids=None):
    return load_weights(
        Checkpoint(folder),
        load_config(folder),
        load_pixel_config(folder),
        Ops(),
        dtype=dtype,
        device=torch.device("cpu"),
        answer_ids=answer_ids,
    )


def test_every_tensor_of_the_published_layout_is_expected(tiny_checkpoint: Path) -> None:
    expected = expected_shapes(load_config(tiny_checkpoint))
    found = Checkpoint(tiny_checkpoint).shapes
    assert set(expected) - set(found) == {"lm_head.weight"}
    assert all(expected[name] == shape for name, shape in found.items())


def test_published_sizes(tmp_path: Path) -> None:
    from benchmarks.checkpoints import SHAPES, config_json

    for name, parameters in (("2b", 2_127_532_032), ("8b", 8_767_123_696)):
        shape = SHAPES[name]
        published = config_json(shape, "bfloat16", "rope_scaling", tied=shape.tied)
        (tmp_path / "config.json").write_text(json.dumps(published))
        config = load_config(tmp_path)
        shapes = expected_shapes(config)
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        assert sum(torch.Size(s).numel() for s in shapes.values()) == parameters


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_layouts_hold_the_same_weights(tmp_path, tiny_checkpoint, shards, spelling) -> None:
    folder = write_checkpoint(tmp_path / "other", "tiny", shards=shards, spelling=spelling)
    assert len(list(folder.glob("*.safetensors"))) == shards
    assert load_config(folder) == load_config(tiny_checkpoint)
    ours, theirs = Checkpoint(folder), Checkpoint(tiny_checkpoint)
    assert ours.shapes == theirs.shapes
    assert all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in ours.shapes)


def test_names_without_the_model_prefix(copy: Path) -> None:
    def strip(tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    whole = load(copy).text.norm
    edit(copy, strip)
    assert torch.equal(load(copy).text.norm, whole)


def test_large_weights_stay_the_mapped_file(tiny_checkpoint: Path) -> None:
    def anonymous_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous_kib()
    weights = load(tiny_checkpoint)
    weights.text.embedding.sum()
    size = (tiny_checkpoint / "model.safetensors").stat().st_size // 1024
    assert size > 50_000
    # What is copied is the folded patch embedding and the allocator's slack.
    assert anonymous_kib() - before < size / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    weights = load(tiny_checkpoint, dtype=dtype, answer_ids=(9693, 2152))
    assert weights.text.embedding.dtype == weights.vision.blocks[0].qkv.weight[0].dtype == dtype
    assert weights.answer_rows is not None and weights.answer_rows.dtype == torch.float32
    assert weights.vision.patch_still.bias.dtype == torch.float32


def test_auto_dtype_is_the_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "half", "tiny", dtype="bfloat16")
    assert load(folder).text.embedding.dtype == torch.bfloat16


def test_untied_head(odd_checkpoint: Path) -> None:
    head = Checkpoint(odd_checkpoint).tensor("lm_head.weight")
    rows = load(odd_checkpoint, answer_ids=(7, 5)).answer_rows
    assert rows is not None and torch.equal(rows, head[[7, 5]].float())


def change_shape(tensors) -> None:
    tensors[NORM] = torch.ones(3)


def change_dtype(tensors) -> None:
    tensors[NORM] = tensors[NORM].to(torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"1 missing: {NORM}"),
        (lambda t: t.update(stray=torch.ones(2)), "1 left over: stray"),
        (change_shape, rf"{NORM} is \[3\], expected \[128\]"),
        (change_dtype, rf"{NORM} is F64, expected one of F32, BF16, F16"),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_wrong_tensors_are_named(copy: Path, change, message: str) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize("change", [change_shape, change_dtype])
def test_info_refuses_what_would_not_load(
    copy: Path, change, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy, change)
    assert main(["info", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qvlfast: ") and NORM in error and error.count("\n") == 1


def test_reranker_needs_a_head_where_it_is_not_tied(copy: Path) -> None:
    edit_config(copy, lambda c: c.update(tie_word_embeddings=False))
    load(copy)
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        load(copy, answer_ids=(1, 2))


@pytest.mark.parametrize("keep", [0, 4, 200, 100_000])
def test_truncated_weights(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{keep:,} bytes\) is truncated or corrupt"):
        Embedder.from_pretrained(copy)


def test_garbage_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        Embedder.from_pretrained(copy)


def test_missing_shard(odd_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "copy"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}"):
        Checkpoint(folder)


def test_shard_of_another_download(odd_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "copy"))
    first, second, _ = sorted(folder.glob("*.safetensors"))
    save_file({"only": torch.ones(1)}, second)
    with pytest.raises(CheckpointError, match="different downloads"):
        Checkpoint(folder)
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="is in both"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', "{}", "[" * 100_000])
def test_damaged_index(odd_checkpoint: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(odd_checkpoint, tmp_path / "copy"))
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="download it again"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama'; this package runs"),
        (lambda c: c.pop("model_type"), "model_type is None"),
        (lambda c: c.pop("text_config"), "`text_config` is missing"),
        (lambda c: c["text_config"].update(hidden_size="big"), "`hidden_size` is 'big'"),
        (lambda c: c["text_config"].pop("rope_parameters"), "neither `rope_parameters` nor"),
        (lambda c: c["text_config"].update(num_key_value_heads=3), "not a multiple of 3"),
        (lambda c: c["text_config"].update(hidden_act="relu"), "`hidden_act` is 'relu'"),
        (
            lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 2, 3]),
            "add up to head_dim / 2 = 64",
        ),
        (lambda c: c["vision_config"].update(num_heads=3), "multiple of 4"),
        (lambda c: c["vision_config"].update(num_position_embeddings=7), "not a square"),
        (lambda c: c["vision_config"].update(out_hidden_size=64), "the decoder takes 128"),
        (lambda c: c["vision_config"].update(deepstack_visual_indexes=[9]), r"\[9\] are not among"),
        (
            lambda c: c["vision_config"].update(deepstack_visual_indexes=["x"]),
            r"`deepstack_visual_indexes` is \['x'\], expected a list of integers",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"].update(mrope_section=None),
            "`mrope_section` is None, expected a list of integers",
        ),
        (
            lambda c: c["text_config"].update(num_hidden_layers=2**31),
            "`num_hidden_layers` is 2147483648, expected an integer from 1 to 1024",
        ),
        (
            lambda c: c["vision_config"].update(spatial_merge_size=0),
            "`spatial_merge_size` is 0, expected an integer from 1 to",
        ),
        (lambda c: c["text_config"].update(rms_norm_eps=10**400), "`rms_norm_eps` is 1000"),
        (lambda c: c["text_config"].update(rms_norm_eps=float("nan")), "`rms_norm_eps` is nan"),
        (lambda c: c.update(quantization_config=[]), r"quantised by None"),
        (lambda c: c.update(quantization_config={"quant_method": ["fp8"]}), r"by \['fp8'\]"),
    ],
)
def test_wrong_config_is_named(copy: Path, change, message: str) -> None:
    edit_config(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_config(copy)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, "1" * 5000])
def test_damaged_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Embedder.from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError):
        Reranker.from_pretrained(copy)


def test_pickled_weights_are_refused_with_advice(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        Checkpoint(copy)


def test_where_a_model_can_be(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert locate(tiny_checkpoint) == tiny_checkpoint
    with pytest.raises(CheckpointError, match="is empty"):
        locate("")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        locate(tiny_checkpoint / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(tmp_path / "nowhere" / "else")
    with pytest.raises(CheckpointError, match="is not in the Hugging Face cache"):
        locate("no-such-owner/no-such-model", local_files_only=True)


def test_hub_cache_is_used_offline(tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    revision = "0" * 40
    repo = tmp_path / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    shutil.copytree(tiny_checkpoint, repo / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("owner/name") == repo / "snapshots" / revision
