"""``qvlfast verify`` as a process: it passes what is right and fails what is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import write_checkpoint
from qvlfast.cli import published
from qvlfast.cli.verify_report import TOLERANCES
from qvlfast.cli.verify_samples import TEXTS, embed_samples, picture, rerank_samples
from qvlfast.config import load_config
from tests.test_cli_embed import qvlfast


def worst(out: str, what: str) -> float:
    found = re.search(rf"worst {what} (\S+),", out)
    assert found is not None, out
    return float(found[1])


def test_float32(tiny_checkpoint: Path) -> None:
    out, _ = qvlfast("verify", tiny_checkpoint)
    assert worst(out, "distance") < TOLERANCES["float32"].distance
    assert worst(out, "difference") < TOLERANCES["float32"].score
    for name in (*TEXTS, "video, 6 frames", "picture 96x480", "right text"):
        assert f"\n  {name} " in out
    assert "prompts have the ids" in out
    assert out.endswith("\npassed\n")


@pytest.mark.slow
def test_bfloat16_with_the_truth(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "some-embedding-model", "odd", dtype="bfloat16")
    out, _ = qvlfast("verify", folder, "--truth")
    assert "embedder, bfloat16" in out.splitlines()[0]
    assert "from float32 on the same weights" in out
    assert "scores" not in out


def test_a_difference_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One matrix that is 5 % larger in transformers than here."""
    from qvlfast.cli import main, verify

    folder = write_checkpoint(tmp_path / "reranker", {"layers": 1, "deepstack": (0,)})
    other = write_checkpoint(tmp_path / "other", {"layers": 1, "deepstack": (0,)})
    weights = load_file(other / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name] * 1.05
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    load = verify.load_reference
    monkeypatch.setattr(
        verify,
        "load_reference",
        lambda _folder, dtype, device="cpu": load(other, dtype, device),
    )
    assert main(["verify", str(folder)]) == 1
    assert "FAILED: " in capsys.readouterr().out


def test_checkpoints_that_transformers_does_not_load(tmp_path: Path) -> None:
    _, error = qvlfast("verify", tmp_path / "nothing", code=2)
    assert error.count("\n") == 1


def test_samples() -> None:
    assert len(TEXTS) == 10
    names = [sample.name for sample in embed_samples()]
    assert len(set(names)) == len(names)
    assert sum(sample.video for sample in (*embed_samples(), *rerank_samples())) == 2
    assert picture(40, 30, 1).tobytes() == picture(40, 30, 1).tobytes()
    assert picture(40, 30, 1).tobytes() != picture(40, 30, 2).tobytes()


def test_the_published_model_is_recognised(tmp_path: Path, tiny_checkpoint: Path) -> None:
    import json

    from benchmarks.checkpoints import config_json, resolve_shape

    document = config_json(resolve_shape("2b"), "bfloat16", "rope_scaling", tied=True)
    (tmp_path / "config.json").write_text(json.dumps(document))
    config = load_config(tmp_path)
    assert published.is_published("Qwen/Qwen3-VL-Embedding-2B", config)
    assert not published.is_published("my-model", config)
    tiny = load_config(tiny_checkpoint)
    assert not published.is_published("Qwen/Qwen3-VL-Embedding-2B", tiny)


def test_published_numbers_are_compared(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Random weights cannot have them; the picture is any."""
    image = tmp_path / "picture.png"
    picture(64, 64, 0).save(image)
    out, _ = qvlfast(
        "verify", tiny_checkpoint, "--kind", "embedder", "--published", "--picture", image, code=1
    )
    numbers = out.partition("published numbers")[2]
    assert "query, caption" in numbers
    assert "picture, value 7" in numbers
    assert "FAILED" in out.splitlines()[-1]
