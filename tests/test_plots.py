"""The plots: they say what the CSVs say, and the committed ones are those that the CSVs give."""

from __future__ import annotations

import csv
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import cpu, cpu_ops, plots, scheduler
from benchmarks.records import RESULTS, append
from benchmarks.svg import Bar, Chart, Column, Panel, Scale, linear, logarithmic, render

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    """All texts of a well-formed file, from top to bottom as they were written."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def row_of(kind: Any, **values: Any) -> Any:
    """A row with what is named, and something for the rest."""
    some: dict[str, Any] = {"int": 2, "float": 1.5, "str": "some"}
    return kind(**{f.name: some[str(f.type)] for f in fields(kind)} | values)


def call(**values: Any) -> cpu.Row:
    values = {"case": "text 1x32", "dtype": "bfloat16", "quantization": "none"} | values
    return row_of(cpu.Row, **values)


def drawn(folder: Path, table: str, rows: list[Any]) -> str:
    """The plot of these rows."""
    append(rows, folder / table)
    (made,) = plots.plots(folder).values()
    return made


def test_what_is_committed_is_what_the_command_writes() -> None:
    made = plots.plots()
    assert {path.name for path in plots.PLOTS.iterdir()} == set(made)
    for name, svg in made.items():
        assert (plots.PLOTS / name).read_text(encoding="utf-8") == svg, f"{name} is another"


def test_documents_show_plots_that_are_there() -> None:
    docs = plots.PLOTS.parent
    for page in docs.glob("*.md"):
        for target in re.findall(r"\]\((plots/[^)]*)\)", page.read_text(encoding="utf-8")):
            assert (docs / target).exists(), f"{page.name} shows {target}"


@pytest.mark.parametrize("name", plots.SUBJECTS)
def test_every_case_is_there(name: str) -> None:
    with (RESULTS / plots.SUBJECTS[name][0]).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = " ".join(texts(plots.plots()[f"{name}.svg"]))
    if name == "accuracy":
        rows = [row for row in rows if row["measure"] == "recall@10"]
        for row in rows:
            assert row["plan"] in shown and f"{row['group']}, {int(row['count']):,}" in shown
            assert f"{row['dimensions']} × {row['output']}" in shown
    else:
        assert all(row["case"] in shown for row in rows)
    newest = rows[-1]
    assert newest["machine"] in shown and newest["commit"] in shown


def test_no_csv_no_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(RESULTS / "cpu.csv", tmp_path)
    plots.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["calls.svg"]
    said = capsys.readouterr().out
    for table in ("cpu_ops.csv", "scheduler.csv", "accuracy.csv"):
        assert f"{table} is not there" in said


def test_of_equal_cases_the_newest_counts(tmp_path: Path) -> None:
    old = call(speedup=1.25, machine="A & B", commit="old")
    rows = [old, replace(old, case="text 4x512"), replace(old, speedup=12.5, commit="new")]
    shown = texts(drawn(tmp_path, "cpu.csv", rows))
    assert shown.count("12.5×") == 1 and shown.count("1.25×") == 1
    assert shown.index("12.5×") < shown.index("1.25×"), "in the place of the row that it replaces"
    assert any("commit new, old" in text for text in shown)


def test_machines_and_peers_are_kept_apart(tmp_path: Path) -> None:
    one = call(peer="transformers", machine="A", isa="avx2")
    rows = [one, replace(one, peer="openvino"), replace(one, machine="B"), replace(one, isa="amx")]
    shown = texts(drawn(tmp_path, "cpu.csv", rows))
    heads = [text for text in shown if text.startswith("Shape")]
    assert len(heads) == 4 and sum("A, avx2, 2 threads" in head for head in heads) == 2
    assert sum("as fast as openvino" in text for text in shown) == 1


def test_formats_stand_in_one_order(tmp_path: Path) -> None:
    rows = [call(quantization=q, speedup=s) for q, s in (("int4", 3.5), ("none", 1.5))]
    svg = drawn(tmp_path, "cpu.csv", [*rows, call(quantization="int8", speedup=2.5)])
    shown = texts(svg)
    assert [t for t in shown if t in ("bf16", "int8", "int4")] == ["bf16", "int8", "int4"]
    assert [t for t in shown if t in ("1.50×", "2.50×", "3.50×")] == ["1.50×", "2.50×", "3.50×"]
    # Without the background and the three of the legend: as long as they are fast.
    boxes = list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))[4:]
    widths = [float(box.get("width", "")) for box in boxes]
    assert widths == pytest.approx([widths[0], widths[0] * 5 / 3, widths[0] * 7 / 3], abs=0.2)


def test_kernels(tmp_path: Path) -> None:
    products = [
        row_of(cpu_ops.Row, op="gemm", case=name, rows=count, format=form, unit=unit, share=0.5)
        for name in cpu_ops.SHAPES
        for form in ("bf16", "int8", "int4")
        for count, unit in ((1, "GB/s"), (512, "Gop/s"))
    ]
    others = [
        row_of(cpu_ops.Row, op="attention", case="a", format="bf16", unit="Gop/s", share=0.375),
        row_of(cpu_ops.Row, op="rms_norm", case="b", format="bf16", unit="GB/s", share=0.25),
    ]
    shown = texts(drawn(tmp_path, "cpu_ops.csv", [*products, *others]))
    assert all(shown.count(name) == 1 for name in cpu_ops.SHAPES)
    assert {"M = 1", "M = 512", "a", "rms_norm b", "38%", "25%"} <= set(shown)
    assert sum("reading speed" in text for text in shown) == 2
    assert sum("multiply-adds' peak" in text for text in shown) == 2
    assert not any("Above 100%" in text for text in shown)
    above = replace(others[0], share=1.25)
    assert any("Above 100%" in t for t in texts(drawn(tmp_path, "cpu_ops.csv", [above])))


def test_scheduler(tmp_path: Path) -> None:
    def row(case: str, unit: str, on: float, off: float) -> scheduler.Row:
        values = {"case": case, "unit": unit, "on": on, "off": off, "ratio": off / on}
        return row_of(scheduler.Row, **values, weights="int8")

    rows = [
        row("queue, 10,000 and 1,000,000 waiting", "us a request", 20.0, 25.0),
        row(scheduler.PICTURED, "s", 2.0, 12.0),
        row("interactive, p99 beside a bulk job", "s", 3.0, 1.5),
        row("bulk job beside interactive", "tokens/s", 90.0, 100.0),
    ]
    shown = texts(drawn(tmp_path, "scheduler.csv", rows))
    for text in (
        scheduler.PICTURED,
        "1.25×: 20 and 25 µs a request",
        "6.00×: 2 against 12 s",
        "2.00×: 3 against 1.5 s",
        "0.90×: 90 against 100 tokens/s",
    ):
        assert text in shown


def test_ticks() -> None:
    assert linear([0.8, 3.2]) == (0, 1, 2, 3, 4)
    assert linear([30, 100], most=4) == (0, 50, 100)
    assert linear([67.0, 71.5], zero=False, most=4) == (66, 68, 70, 72)
    assert logarithmic([1.4, 38.0]) == (1, 2, 5, 10, 20, 50)
    assert logarithmic([0.93]) == (0.5, 1)
    assert logarithmic([1.0]) == (1, 2)


def test_intervals_are_points() -> None:
    bars = {"x": [Bar("b", 50.0, "50", (40.0, 60.0))], "long " * 20: [Bar("b", 1.0, "<1>")]}
    panel = Panel("p", (Column("", "axis", Scale((0, 100)), bars),))
    root = ElementTree.fromstring(render(Chart("t", ("a", "b"), (panel,), ("c",))))
    (point,) = root.iter(f"{SVG}circle")
    (line,) = (e for e in root.iter(f"{SVG}line") if e.get("class") == "range")
    low, high = float(line.get("x1", "")), float(line.get("x2", ""))
    assert float(point.get("cx", "")) == pytest.approx((low + high) / 2, abs=0.1)
    assert point.get("class") == "c1" and point.get("cy") == line.get("y1") == line.get("y2")
    assert "<1>" in ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
