"""The demo and the benchmarks run, and say what they should; their figures are not judged."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_demo() -> None:
    shown = run("benchmarks.demo")
    for part in ("tokens", "cosine of each query", "scores for", "astronaut", "video", "letter"):
        assert part in shown
    scores = [line.split()[-1] for line in shown.split("scores for")[1].splitlines()[1:10]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_sharing_on_and_off(tmp_path: Path) -> None:
    out = tmp_path / "scheduler.csv"
    command = ["benchmarks.scheduler", "--shape", "tiny", "--dtype", "float32", "--seconds", "0.1"]
    command += ["--side", "128", "--requests", "10", "--out", str(out)]
    for case in ("rerank", "interactive"):
        run(*command, "--only", case)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 5
    for row in rows[:2]:
        assert int(row["tokens_on"]) < int(row["tokens_off"]) and float(row["ratio"]) > 0


@pytest.mark.slow
def test_reranking_against_the_official_recipe(tmp_path: Path) -> None:
    out = tmp_path / "scheduler.csv"
    command = ["benchmarks.scheduler", "--shape", "tiny", "--dtype", "float32", "--seconds", "0.1"]
    command += ["--side", "128", "--only", "20 x 100", "--peer", "transformers", "--out", str(out)]
    scores = run(*command).split("scores of one pair: ")[1].splitlines()[0].split(", recipe ")
    assert abs(float(scores[0]) - float(scores[1])) < 2e-4  # four digits are printed
    _, row = csv.DictReader(out.open())
    assert "transformers" in row["case"] and row["case"].endswith("one pair timed x 20")
    assert int(row["tokens_on"]) < int(row["tokens_off"])


@pytest.mark.slow
def test_whole_calls_against_transformers(tmp_path: Path) -> None:
    out = tmp_path / "cpu.csv"
    command = ["benchmarks.cpu", "--shape", "tiny", "--dtype", "float32", "--rounds", "1"]
    command += ["--quantization", "none"]
    for case in ("1x32", "picture 512"):
        run(*command, "--only", case, "--out", str(out))
    rows = list(csv.DictReader(out.open()))
    assert [row["case"] for row in rows] == ["text 1x32", "picture 512"]
    assert rows[0]["tokens"] == "32"
    assert all(float(row["distance"]) < 1e-4 for row in rows)


@pytest.mark.slow
def test_kernels_against_torch(tmp_path: Path) -> None:
    out = tmp_path / "ops.csv"
    run("benchmarks.cpu_ops", "--quick", "--out", str(out))
    rows = list(csv.DictReader(out.open()))
    assert {row["op"] for row in rows} >= {"gemm", "attention", "rms_norm", "norm_rope"}
    assert {row["format"] for row in rows} == {"bf16", "int8", "int4"}
    # Two roundings to bfloat16 at most, of attention's weights and of results.
    assert all(float(row["error"]) < 2.0**-8 for row in rows)


@pytest.mark.slow
def test_stages_in_turn_and_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "stages.csv"
    command = ["benchmarks.stages", "--shape", "tiny", "--dtype", "float32", "--side", "64"]
    run(*command, "--seconds", "0.2", "--rounds", "2", "--out", str(out))
    text, vision, both = csv.DictReader(out.open())
    assert (text["stage"], vision["stage"], both["stage"]) == ("text", "vision", "both")
    for row in (text, vision):
        ratio = float(row["in_turn"]) / float(row["side_by_side"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=0.1)
    total = float(text["ratio"]) + float(vision["ratio"])
    assert float(both["ratio"]) == pytest.approx(total, abs=2e-3)
