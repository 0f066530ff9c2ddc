"""The command line as a process: help, exit codes, ``rerank``, ``info`` and ``demo``."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from qvlfast import Embedder, Quantization, Reranker
from qvlfast.checkpoint import Checkpoint
from qvlfast.cli import build_parser, main
from qvlfast.cli.contact_sheet import Row, draw
from qvlfast.cli.options import model_arguments
from qvlfast.cli.plan import Planner, Wish, find_device
from qvlfast.cli.rerank import read_query
from qvlfast.config import load_config
from qvlfast.quant.stored import Stored
from qvlfast.weights import expected_shapes
from tests.samples import picture
from tests.test_cli_embed import (
    ROOT,
    command,
    environment,
    qvlfast,
    small_checkpoint,
    write_lines,
)

__all__ = ["small_checkpoint"]


def test_help() -> None:
    out, _ = qvlfast("--help")
    names = ("embed", "rerank", "info", "warmup", "verify", "demo")
    assert all(f"\n    {name} " in out for name in names)
    for name in names:
        assert f"qvlfast {name}" in build_parser_help(name)


def build_parser_help(name: str) -> str:
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()) as out:
        main([name, "--help"])
    assert stopped.value.code == 0
    return out.getvalue()


def test_help_loads_nothing_slow() -> None:
    code = (
        "import sys\nfrom qvlfast.cli import build_parser\nbuild_parser()\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'transformers', 'av'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    out, _ = qvlfast("--version")
    assert out.startswith("qvlfast 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("embed", "MODEL", "in.jsonl"),
        ("embed", "MODEL", "in.jsonl", "-o", "out.npy", "--dimensions", "0"),
        ("embed", "MODEL", "in.jsonl", "-o", "out.npy", "--dtype", "int3"),
        ("embed", "MODEL", "in.jsonl", "-o", "out.npy", "--quantization", "int2"),
        ("rerank", "MODEL", "query", "in.jsonl", "--cache-bytes", "-1"),
        ("info", "MODEL", "--memory", "much"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: qvlfast" in capsys.readouterr().err


def test_user_errors_are_one_line(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", ["a text"])
    out = tmp_path / "out.npy"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("embed", "no/such/folder", lines, "-o", out), "does not exist"),
        (("embed", broken, lines, "-o", out), "model_type"),
        (("embed", small_checkpoint, tmp_path / "none.jsonl", "-o", out), "No such file"),
        (("embed", small_checkpoint, empty, "-o", out), "no pictures or videos"),
        (("embed", small_checkpoint, lines, "-o", tmp_path / "out.csv"), ".npy"),
        (("embed", small_checkpoint, lines, "-o", tmp_path / ".npy"), "an ending without a name"),
        (("embed", small_checkpoint, lines, "-o", tmp_path / "no" / "out.npy"), "No such file"),
        (("embed", small_checkpoint, lines, "-o", out, "--dimensions", "64"), "32 values"),
        (("embed", small_checkpoint, lines, "-o", out, "--device", "tpu"), "tpu"),
        (("rerank", small_checkpoint, "a", lines, "--weight-only"), "needs --quantization int4"),
        (("info", small_checkpoint, "--quantization", "int8", "--weight-only"), "for 'int4'"),
        (("rerank", small_checkpoint, " ", lines), "query is empty"),
        (("rerank", small_checkpoint, "{not json}", lines), "not JSON"),
        (("rerank", small_checkpoint, "@none.txt", lines), "No such file"),
        (("info", tmp_path / "nothing"), "does not exist"),
    ]
    qvlfast(*cases[0][0], code=2)
    for arguments, message in cases:
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error, arguments
        assert error.startswith("qvlfast: ")
        assert error.count("\n") == 1, error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "empty", "in.jsonl"]


def test_a_closed_pipe_is_no_traceback(small_checkpoint: Path) -> None:
    process = subprocess.Popen(
        command("info", small_checkpoint), env=environment(), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_rerank(small_checkpoint: Path, tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "one.png")
    lines = [
        "a text",
        {"text": "another", "id": "second"},
        {"image": "one.png", "id": "seen"},
        {"image": "none.png", "id": "gone"},
    ]
    documents = write_lines(tmp_path / "documents.jsonl", lines)
    out, error = qvlfast(
        "rerank",
        small_checkpoint,
        "the query",
        documents,
        "--json",
        "--instruction",
        "Find",
        code=1,
    )
    got = [json.loads(line) for line in out.splitlines()]
    with Reranker.from_pretrained(small_checkpoint) as reranker:
        expected = reranker.rank(
            "the query", ["a text", "another", {"image": tmp_path / "one.png"}], "Find"
        )
    assert [(g["rank"], g["index"]) for g in got] == [
        (place, e["index"]) for place, e in enumerate(expected, start=1)
    ]
    names = {0: 0, 1: "second", 2: "seen"}
    assert [g["id"] for g in got] == [names[e["index"]] for e in expected]
    np.testing.assert_allclose([g["score"] for g in got], [e["score"] for e in expected], atol=1e-5)
    assert "document gone failed" in error

    out, _ = qvlfast(
        "rerank", small_checkpoint, f"@{tmp_path / 'one.png'}", "-", "--top-k", "1",
        stdin=b"first\nsecond\n",
    )  # fmt: skip
    assert out.startswith("   1  0.")
    assert len(out.splitlines()) == 1


OPTIONS = ("--quantization", "int8", "--backend", "native", "--deterministic", "--no-cuda-graphs")
CACHES = ("--cache-bytes", "0", "--vision-cache-bytes", "1.5M")
LOADING = {
    "quantization": Quantization("int8"),
    "backend": "native",
    "deterministic": True,
    "cuda_graphs": False,
    "cache_bytes": 0,
    "vision_cache_bytes": 3 << 19,
}


def test_how_a_model_is_loaded(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every option reaches ``from_pretrained``, of both commands; the defaults are its own."""
    given: list[dict[str, Any]] = []
    own = inspect.signature(Reranker.from_pretrained).parameters
    for kind in (Embedder, Reranker):
        load = kind.from_pretrained

        def spy(model: Any, _load: Any = load, **arguments: Any) -> Any:
            given.append(arguments)
            return _load(model, **arguments)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    lines = write_lines(tmp_path / "in.jsonl", ["one text", "another"])
    out = tmp_path / "out.npy"
    embed = ["embed", str(tiny_checkpoint), str(lines), "-o", str(out), "--quiet"]
    rerank = ["rerank", str(tiny_checkpoint), "the query", str(lines), "--json"]
    assert main([*embed, *OPTIONS, *CACHES]) == 0
    assert main([*rerank, *OPTIONS, *CACHES]) == 0
    assert all(arguments.items() >= LOADING.items() for arguments in given)
    scores = {g["index"]: g["score"] for g in map(json.loads, capsys.readouterr().out.splitlines())}
    expected = {"quantization": "int8", "backend": "native"}
    with Embedder.from_pretrained(tiny_checkpoint, **expected) as embedder:
        np.testing.assert_array_equal(np.load(out), embedder.encode(["one text", "another"]))
    with Reranker.from_pretrained(tiny_checkpoint, **expected) as reranker:
        for result in reranker.rank("the query", ["one text", "another"]):
            assert scores[result["index"]] == result["score"]

    given.clear()
    assert main(rerank) == 0
    assert all(given[0][name] == own[name].default for name in LOADING)
    assert main([*embed, "--restart", "--deterministic", "--backend", "reference"]) == 2
    assert "does not promise equal bits" in capsys.readouterr().err


def test_rerank_queries(tmp_path: Path) -> None:
    (tmp_path / "query.json").write_text('{"text": "the query", "image": "a.png"}')
    (tmp_path / "query.txt").write_text("the query\n")
    (tmp_path / "b.JPG").write_bytes(b"never read")
    assert read_query("the query") == "the query"
    assert read_query('{"text": "the query"}') == {"text": "the query"}
    assert read_query(f"@{tmp_path / 'query.txt'}") == "the query"
    image = str(tmp_path / "a.png")
    assert read_query(f"@{tmp_path / 'query.json'}") == {"text": "the query", "image": image}
    assert read_query(f"@{tmp_path / 'b.JPG'}") == {"image": tmp_path / "b.JPG"}
    (tmp_path / "plain.json").write_text('"the query"')
    assert read_query(f"@{tmp_path / 'plain.json'}") == "the query"
    (tmp_path / "list.json").write_text('["the query"]')
    nothing = ("", "{}", '{"fps": 2}', '{"text": ""}', '{"image": []}')
    for bad in (*nothing, "{not json}", '@{"text": "no file"}', f"@{tmp_path / 'list.json'}"):
        with pytest.raises((ValueError, OSError)):
            read_query(bad)


def test_weights_alone_are_asked_for() -> None:
    for given in (["embed", "MODEL", "in.txt", "-o", "out.npy"], ["rerank", "M", "query", "in"]):
        options = build_parser().parse_args([*given, "--quantization", "int4", "--weight-only"])
        found = model_arguments(options)["quantization"]
        assert found == Quantization("int4", weight_only=True)
        assert model_arguments(build_parser().parse_args(given))["quantization"] is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("unable to mmap 9 bytes from file: Cannot allocate memory (12)"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: object) -> int:
        raise error

    monkeypatch.setattr("qvlfast.cli.info.run", run)
    assert main(["info", "model"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("qvlfast: not enough memory (") and message.count("\n") == 1
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", "model"])


def test_info(odd_checkpoint: Path) -> None:
    out, _ = qvlfast("info", odd_checkpoint, "--json", "--device", "cpu", "--memory", "1G")
    found = json.loads(out)
    stored = sum(np.prod(shape, dtype=int) for shape in Checkpoint(odd_checkpoint).shapes.values())
    assert sum(found["parameters"].values()) == stored
    assert len(found["files"]) == 3
    assert (found["dtype"], found["memory"]) == ("float32", 1 << 30)
    assert found["config"]["text"]["hidden_size"] == 160
    plans = found["plans"]
    assert list(plans) == ["float32", "bfloat16", "float16", "int8", "int4"]
    assert 2.05 > plans["float32"]["weights"] / plans["bfloat16"]["weights"] > 1.95
    for plan in plans.values():
        assert plan["total"] == plan["weights"] + plan["activations"] + plan["fixed"]
        assert plan["fits"] == (plan["total"] <= 1 << 30)
    assert found["chosen"] == "float32"
    backends = [plan["backend"] for plan in plans.values()]
    assert backends == ["native", "native", "reference", "native", "native"]

    out, _ = qvlfast("info", odd_checkpoint, "--device", "cuda", "--memory", "8G")
    for line in ("3 layers", "vision tower", "memory on cuda of 8.00 GiB", "fits, with"):
        assert line in out
    out, _ = qvlfast("info", odd_checkpoint, "--memory", "100M", "--dtype", "bfloat16")
    assert "does not fit" in out and "take a smaller model" in out
    assert "float32 " not in out.partition("memory on")[2]


def test_info_plans_for_a_gpu_that_is_not_here(
    odd_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*options: str) -> dict:
        arguments = ["info", str(odd_checkpoint), "--json", "--backend", "triton", *options]
        assert main(arguments) == 0
        return json.loads(capsys.readouterr().out)

    orin = plan("--device", "sm_87", "--memory", "2G", "--quantization", "int8")
    assert list(orin["plans"]) == ["int8"] == [orin["chosen"]]
    layers = orin["plans"]["int8"]["parts"][3]
    assert layers["name"] == "decoder layers" and set(layers["formats"]) == {"float", "int8"}
    card = plan("--device", "sm_89", "--memory", "2G", "--quantization", "fp8")
    # Orin has one memory for the process and for CUDA, and no FP8.
    assert orin["plans"]["int8"]["fixed"] > card["plans"]["fp8"]["fixed"]
    assert "fp8" in card["plans"]["fp8"]["parts"][3]["formats"]
    assert (
        main(
            [
                "info",
                str(odd_checkpoint),
                "--backend",
                "triton",
                "--device",
                "sm_87",
                "--quantization",
                "fp8",
            ]
        )
        == 2
    )
    assert "sm_87 has no FP8, which begins with sm_89: use int8" in capsys.readouterr().err
    assert 0 < orin["largest_tokens"] < 1 << 18
    # Weights of 4 bits take the same with rows of either kind; int8 ones need a widened copy.
    fours = plan("--device", "sm_87", "--memory", "2G", "--quantization", "int4")
    alone = plan("--device", "sm_87", "--memory", "2G", "--quantization", "int4", "--weight-only")
    assert alone["chosen"] == "int4, weights only"
    own, other = alone["plans"]["int4, weights only"], fours["plans"]["int4"]
    assert own["parts"] == other["parts"] and own["activations"] != other["activations"]
    # What is advised fits.
    small = plan("--device", "sm_89", "--memory", "800M")
    (first, *_) = small["advice"]
    assert plan("--device", "sm_89", "--memory", "800M", *first.split())["advice"] == []
    assert main(["info", str(odd_checkpoint), "--device", "sm_75"]) == 2
    assert "'sm_75' is unknown: use one of sm_80" in capsys.readouterr().err


def test_info_counts_what_a_published_checkpoint_holds(tmp_path: Path) -> None:
    """The 2B model has 2,127,532,032 parameters; nothing of it is needed to know that."""
    from benchmarks.checkpoints import config_json, resolve_shape

    config = config_json(resolve_shape("2b"), "bfloat16", "rope_parameters", tied=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_config(tmp_path)
    shapes = {k: v for k, v in expected_shapes(loaded).items() if k != "lm_head.weight"}
    headers = SimpleNamespace(shapes=shapes, dtypes=dict.fromkeys(shapes, "BF16"))
    planner = Planner(cast(Checkpoint, headers), loaded, find_device("sm_87", 8 << 30))
    plan = planner.plan(Wish("bfloat16", None, "triton", 16_384, 16_384, 8192))
    assert sum(part.parameters for part in plan.parts) == 2_127_532_032
    # Two bytes each; biases are kept in float32, and the patch embedding twice.
    assert 2 * 2_127_532_032 < plan.weights < 2.001 * 2_127_532_032


@pytest.mark.parametrize(
    ("device", "backend", "form"),
    [
        ("sm_80", "triton", "float"),
        ("sm_89", "triton", "fp8"),
        ("sm_80", "reference", "fp8"),
        ("cpu", "native", "float"),
        ("cpu", "reference", "fp8"),
    ],
)
def test_what_fp8_files_are_planned_as(
    tiny_checkpoint: Path, device: str, backend: str, form: str
) -> None:
    planner = Planner(
        Checkpoint(tiny_checkpoint), load_config(tiny_checkpoint), find_device(device, 8 << 30)
    )
    linear = "language_model.layers.0.mlp.down_proj"
    planner.stored[f"model.{linear}.weight"] = Stored("fp8", (1, 1), {}, "fp8")
    setup = planner.setup(Wish("bfloat16", None, backend, 1, 1, 1))
    assert setup.form(linear) == form


def test_info_of_a_quantised_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def info(folder: Path) -> dict:
        assert main(["info", str(folder), "--json", "--device", "cpu", "--memory", "1G"]) == 0
        return json.loads(capsys.readouterr().out)

    target = tmp_path / "out"
    assert main(["quantize", str(tiny_checkpoint), str(target), "--format", "int4"]) == 0
    capsys.readouterr()
    whole, found = info(tiny_checkpoint), info(target)
    assert found["missing"] == []
    assert found["parameters"] == whole["parameters"]
    assert found["plans"]["float32"]["parts"] == whole["plans"]["int4"]["parts"]


def test_contact_sheet() -> None:
    found = [(picture(96, 96, seed=i), 1 - i / 10) for i in range(5)]
    rows = [
        Row("slice of pizza", "English", "slice of pizza", found),
        Row("彩虹", "Chinese: rainbow", "rainbow", found[:3]),
        Row("عشق", "Arabic: love", "love", found),
        Row("a rather long query that does not fit on one line of the sheet " * 3, "", "", found),
        Row(picture(96, 96), "a picture", "a picture", found),
    ]
    sheet = draw(rows, "heading", "note")
    assert sheet.mode == "RGB"
    shade = np.asarray(sheet.convert("L")).astype(int)
    for i in range(len(rows)):  # every row has ink in its label and in its cards
        band = shade[92 + 150 * i + 5 : 92 + 150 * (i + 1) - 5]
        assert np.ptp(band[:, :300]) > 100
        assert np.ptp(band[:, 330:]) > 50


def test_demo(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    out, _ = qvlfast("demo", "pizza", "火山", "--sheet", sheet)
    assert "🍕" in out.partition("火山")[0]
    assert "🌋" in out.partition("火山")[2]
    with Image.open(sheet) as image:
        assert image.width > 1000
