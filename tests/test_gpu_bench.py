"""The scripts for the day with a GPU: their steps at tiny sizes, and their arithmetic."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import Clock, Row, check, distance, line, main, write
from benchmarks.gpu_cases import DRY, Case, Maker, cases, quantised_products
from qvlfast.backends.triton import TritonOps
from qvlfast.errors import BackendError
from qvlfast.ops import Ops, QuantisedRows

CPU = torch.device("cpu")


def test_a_wrong_op_fails_and_a_refusal_is_told() -> None:
    x = torch.randn(4, 8)

    def case(run: object) -> Case:
        def build(ops: Ops, inputs: dict) -> object:
            return (lambda: inputs["x"]) if type(ops) is Ops else run

        return Case("op", "case", torch.float32, {"x": x}, build, tolerance=1e-3)  # type: ignore[arg-type]

    def refuse() -> None:
        raise BackendError("not that")

    def crash() -> None:
        raise RuntimeError("illegal address\nand more")

    table = TritonOps(CPU)
    row, run = check(case(x.clone), table)
    assert row.state == "ok" and run is not None
    for wrong in (lambda: x + 0.1, lambda: x * torch.nan):
        row, run = check(case(wrong), table)
        assert row.state == "failed" and run is None
    row, run = check(case(refuse), table)
    assert (row.state, row.note, run) == ("refused", "not that", None)
    row, run = check(case(crash), table)
    assert (row.state, row.note) == ("failed", "RuntimeError: illegal address")


def test_distance_reads_quantised_rows() -> None:
    x = torch.tensor([[1.0, -2.0]])
    rows = QuantisedRows(torch.tensor([[1, -2]], dtype=torch.int8), torch.ones(1), torch.float32)
    assert distance(rows, x) == 0
    assert distance(x, x * 2) == 0.5


def test_every_op_has_a_case() -> None:
    """But for preparing weights; the quantised products are linears, as what goes onto hidden
    states is."""
    names = {case.op for case in cases(DRY, CPU, fp8=True)}
    ops = {name for name, value in vars(Ops).items() if isinstance(value, staticmethod)}
    assert ops - {"prepare", "add_linear"} <= names
    forms = ("int8", "int4", "int4_float", "fp8", "fp8_blocks")
    assert {f"linear_{form}" for form in forms} <= names


@pytest.mark.parametrize("form", ["int8", "int4_float", "fp8_blocks"])
def test_quantised_cases_pass_in_the_interpreter(form: str) -> None:
    for case in quantised_products(DRY, Maker(CPU), form):
        row, _ = check(case, TritonOps(CPU))
        assert row.state == "ok", row


def test_the_table(tmp_path: Path) -> None:
    rows = [
        Row("op", "linear", "q m=1", "bfloat16", "ok", 1e-3, 8e-3, 12.5, "cublas", 10.0, 0.8),
        Row("op", "linear", "q m=2", "bfloat16", "skipped", note="out of time"),
    ]
    write(rows, {"device": "none", "commit": "abc"}, tmp_path / "gpu.csv")
    with (tmp_path / "gpu.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [r["state"] for r in found] == ["ok", "skipped"]
    assert (found[0]["ours_us"], found[0]["device"]) == ("12.5", "none")
    assert "12.5 us" in line(rows[0]) and "x0.80 cublas" in line(rows[0])
    assert "out of time" in line(rows[1])


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "--dry-run goes without" in capsys.readouterr().err


def test_the_clock_of_a_cpu_takes_one_run() -> None:
    count = SimpleNamespace(runs=0)

    def run() -> None:
        count.runs += 1

    assert Clock(CPU, 10).microseconds(run) > 0 and count.runs == 1


@pytest.mark.slow
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but events, graphs and flash-attn, against transformers too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--dry-run", "--out", str(tmp_path / "gpu.csv")]) == 0
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"ok"}
    assert {"op", "model"} == {row["stage"] for row in rows}
    assert {"transformers", "without graphs", "sdpa", "cublas"} <= {row["peer"] for row in rows}
