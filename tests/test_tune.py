"""benchmarks.tune: what it tries, what it chooses, and that the code reads what it writes."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from qvlfast.kernels.attention import AttentionConfig, attention_config
from qvlfast.kernels.common import RefusalError, RowConfig, row_config
from qvlfast.kernels.configs import TARGETS, GemmConfig, gemm_config

from benchmarks.aot import SHARED_KB
from benchmarks.gpu import machine
from benchmarks.tune import (
    Ratio,
    against_vendor,
    better,
    check,
    compile_part,
    main,
    ratios,
    tune,
    tune_all,
)
from benchmarks.tune_cases import DRY, Entry, Sizes, Trial, blocks, entries
from benchmarks.tune_tables import NAMES, TABLES, render, updated
from qvlfast.kernels import measured

CPU, META = torch.device("cpu"), torch.device("meta")
TRUTH = torch.tensor([1.0, -2.0])
NOW, FAST, SLOW = (GemmConfig(16, n, 64, warps=4, stages=2) for n in (16, 32, 64))


class FakeTimer:
    """Runs take what ``seconds`` says of the blocks that they have."""

    def __init__(self, seconds: Callable[[Any, int], float]) -> None:
        self.seconds = seconds

    def prepare(self, run: Any) -> Any:
        return run

    def rounds(self, runs: Sequence[Any], count: int) -> list[list[float]]:
        return [[self.seconds(run.args[0], i) for run in runs] for i in range(count)]


def entry(*candidates: GemmConfig, run: Callable[[Any], Any] = lambda config: TRUTH) -> Entry:
    trial = Trial("one", run, lambda: TRUTH)
    key = ("int8", "sm_90", 16, False)
    return Entry("PRODUCTS", key, NOW, candidates, lambda: [trial, trial])


def left() -> float:
    return math.inf


def test_ratios() -> None:
    rounds = [[10.0, 5.0, 20.0], [10.0, 6.0, 10.0], [20.0, 5.0, 10.0]]
    one, other = ratios([rounds, [[1.0, 2.0, 1.0]] * 3])
    assert one == Ratio(
        pytest.approx((0.5 * 2) ** 0.5), pytest.approx((0.6 * 2) ** 0.5), pytest.approx(2)
    )
    assert other.middle == 1 and other.upper == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("candidate", "again", "expected"),
    [
        (Ratio(0.9, 0.95, 0.95), 1.0, True),
        (Ratio(0.985, 0.99, 0.99), 1.0, False),  # too little
        (Ratio(0.9, 1.01, 0.95), 1.0, False),  # not in every fourth round
        (Ratio(0.9, 0.95, 1.05), 1.0, False),  # one shape loses
        (Ratio(0.9, 0.95, 0.95), 1.06, False),  # the same blocks are as far apart
        (Ratio(0.9, 0.95, 0.95), 0.94, False),
    ],
)
def test_noise_chooses_nothing(candidate: Ratio, again: float, expected: bool) -> None:
    assert better(candidate, Ratio(again, again, again)) == expected


def test_the_fastest_is_chosen_and_the_slow_are_told() -> None:
    times = {NOW: 10.0, FAST: 8.0, SLOW: 15.0}
    rows, best = tune(entry(SLOW, FAST), FakeTimer(lambda c, i: times[c]), left)
    assert best == (FAST, pytest.approx(0.8))
    assert [(r.state, round(r.ratio, 2)) for r in rows] == [
        ("now", 1),
        ("ok", 1.5),
        ("chosen", 0.8),
    ]
    rows, best = tune(entry(SLOW), FakeTimer(lambda c, i: times[c]), left)
    assert best is None and [r.state for r in rows] == ["now", "ok"]


def test_within_noise_the_blocks_in_use_stay() -> None:
    def seconds(config: Any, i: int) -> float:
        return 10.0 + i % 3 - (config == FAST) * 0.15

    rows, best = tune(entry(FAST), FakeTimer(seconds), left)
    assert best is None and rows[1].ratio < 1


def test_a_wrong_candidate_is_never_timed() -> None:
    def run(config: Any) -> Any:
        if config == FAST:
            return TRUTH * 1.1
        if config == SLOW:
            raise RefusalError("not these")
        return TRUTH.clone()

    asked = []

    def seconds(config: Any, i: int) -> float:
        asked.append(config)
        return 1.0

    rows, best = tune(entry(FAST, SLOW, run=run), FakeTimer(seconds), left)
    assert [r.state for r in rows] == ["now", "wrong", "refused"] and best is None
    assert set(asked) == {NOW} and rows[2].note == "not these"


def test_plain_products_are_timed_against_the_library() -> None:
    both = [
        Trial(f"{library}", lambda config: TRUTH, lambda: TRUTH, partial(print, library))
        for library in (8.0, 4.5)
    ]

    class Timer(FakeTimer):
        def rounds(self, runs: Sequence[Any], count: int) -> list[list[float]]:
            library, kernel = runs
            assert kernel.args == (FAST,)
            return [[library.args[0], 6.0]] * count

    timer = Timer(lambda config, i: 0.0)
    entry_of = Entry("PRODUCTS", ("float16", "sm_90", 16, False), NOW, (FAST,), lambda: both)
    ratio = against_vendor(entry_of, FAST, timer)
    assert ratio == pytest.approx((6 / 8 * 6 / 4.5) ** 0.5)
    assert against_vendor(entry(FAST), FAST, timer) is None


def test_without_anything_to_measure_against_nothing_changes() -> None:
    def run(config: Any) -> Any:
        return TRUTH * (torch.nan if config == NOW else 1)

    rows, best = tune(entry(FAST, run=run), FakeTimer(lambda c, i: 1.0), left)
    assert [r.state for r in rows] == ["wrong", "ok"] and best is None


def test_a_class_that_is_out_of_time_is_left_alone() -> None:
    seconds = iter((1.0, -1.0))
    assert tune(entry(FAST), FakeTimer(lambda c, i: 1.0), lambda: next(seconds)) == ([], None)


def test_a_fault_of_a_driver_is_told() -> None:
    def run(config: Any) -> Any:
        raise RuntimeError("out of resource\nand more")

    trials = entry(run=run).trials()
    assert check(NOW, trials, [TRUTH, TRUTH]) == ("failed", 0.0, "RuntimeError: out of resource")


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_tried_fits(target: str) -> None:
    found = list(entries(target, Sizes(), META))
    assert {e.table for e in found} == {"PRODUCTS", "ATTENTION", "ROWS"}
    assert len({(e.table, e.key) for e in found}) == len(found)
    kinds = {e.key[0] for e in found if e.table == "PRODUCTS"}
    assert ("fp8" in kinds) == (target not in ("sm_80", "sm_87"))
    for e in found:
        assert len(e.candidates) >= 2 and e.now not in e.candidates
        assert len({blocks(c) for c in e.candidates}) == len(e.candidates) < 60
        for c in e.candidates:
            if isinstance(c, GemmConfig):
                kind, _, _, gated = e.key
                columns, size = c.n * (2 if gated else 1), 2 if kind == "float16" else 1
                assert (c.m + columns) * c.k * size * c.stages <= SHARED_KB[target] << 10
                assert c.m * columns / (32 * c.warps) <= 128
                assert type(c)(*blocks(c)) == c
            elif isinstance(c, AttentionConfig):
                assert (c.m + 2 * c.n * c.stages) * e.key[1] * 2 <= SHARED_KB[target] << 10


def test_the_code_reads_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class: with an entry in its table, its trials' shapes get those blocks."""
    for e in entries("sm_90", DRY, META):
        chosen = e.candidates[0]
        entry = measured.Measured(blocks(chosen), blocks(e.now), 0.5)
        monkeypatch.setitem(getattr(measured, e.table), e.key, entry)
        if e.table == "PRODUCTS":
            kind, target, rows, gated = e.key
            m = min(rows, 4096)
            got: Any = gemm_config(kind, target, m, 2048, 2048, gated=gated)
            # As the class has it; a wide one is halved where columns are few.
            assert (got.m, got.k, got.warps) == (chosen.m, chosen.k, chosen.warps)
            assert got.n in (chosen.n, chosen.n // 2) and got.stages == chosen.stages
            assert gemm_config(kind, "sm_80", m, 2048, 2048, gated=gated) != got
        elif e.table == "ATTENTION":
            target, padded, rows = e.key
            assert attention_config(target, torch.bfloat16, padded, rows) == chosen
            assert attention_config(target, torch.float32, padded, rows) != chosen
        else:
            assert row_config(*e.key) == chosen
            assert isinstance(row_config("sm_80", e.key[1]), RowConfig)


def test_what_it_writes(tmp_path: Path) -> None:
    source = TABLES.read_text()
    same = {name: getattr(measured, name) for name in NAMES}
    assert render(measured.PROVENANCE, same, source) == source
    chosen = {e: (e.candidates[-1], 0.87654) for e in entries("sm_120", Sizes(), META)}
    vendor = {
        e: 0.98765 for e in chosen if e.table == "PRODUCTS" and e.key[::3] == ("float16", False)
    }
    assert len(vendor) == 3
    note = 'A "card", torch 2.11.0, Triton 3.6.0, 2030-01-31, abc: all timed'
    written = render(*updated("sm_120", note, chosen, vendor), source)
    namespace: dict[str, Any] = {}
    exec(compile(written, "measured.py", "exec"), namespace)
    assert namespace["PROVENANCE"]["sm_120"] == note.replace('"', "'")
    for e, (config, _) in chosen.items():
        got = namespace[e.table][e.key]
        assert got == namespace["Measured"](blocks(config), blocks(e.now), 0.877)
    assert namespace["VENDOR"] == {("sm_120", e.key[2]): 0.988 for e in vendor}
    # Written over once more, with one table empty.
    tables = {name: dict(namespace[name]) for name in NAMES} | {"ROWS": {}}
    again = render(namespace["PROVENANCE"], tables, written)
    assert again.startswith(written[: written.index("ROWS")]) and again.endswith("= {}\n")
    path = tmp_path / "measured.py"
    path.write_text(written)
    command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length=100", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tuning_from_end_to_end(tmp_path: Path) -> None:
    """Everything but graphs and events: kernels run in the interpreter, times are made up."""
    every = [e for e in entries("sm_90", DRY, CPU) if "int4" in e.name and e.key[2] == 16]
    fast = every[0].candidates[1]

    def seconds(config: Any, i: int) -> float:
        return 5.0 + i % 2 if config == fast else 10.0 + i % 2

    tables, table = tmp_path / "measured.py", tmp_path / "tune.csv"
    tables.write_text(TABLES.read_text())
    clock = iter([1.0] * (len(every[0].candidates) + 1 + 3) + [-1.0] * 99)
    options: Any = {"tables": tables, "table": table}
    tune_all("sm_90", every, FakeTimer(seconds), lambda: next(clock), machine(CPU), **options)
    namespace: dict[str, Any] = {}
    exec(compile(tables.read_text(), "measured.py", "exec"), namespace)
    assert list(namespace["PRODUCTS"]) == [every[0].key]
    assert namespace["PRODUCTS"][every[0].key].blocks == blocks(fast)
    assert f"1 of {len(every)} classes timed" in namespace["PROVENANCE"]["sm_90"]
    with table.open() as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert states.count("chosen") == states.count("now") == 1
    assert len(states) == len(every[0].candidates) + 1


@pytest.mark.parametrize("part", ["int8 sm_90 16 gated", "attention sm_90 32 16", "rows sm_90"])
def test_dry_run_of_some_classes(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = TABLES.read_text()
    assert main(["--dry-run", "--only", part]) == 0
    assert "candidates, 0 not as they should be; nothing was timed" in capsys.readouterr().out
    assert TABLES.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_dry_run(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--dry-run", "--target", target]) == 0


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong, told in (([], "--dry-run goes without"), (["--target", "sm_75"], "is unknown")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert told in capsys.readouterr().err


def test_the_interpreter_compiles_no_candidates() -> None:
    with pytest.raises(RefusalError, match="compiles nothing"):
        compile_part("sm_90", "", "0/2")
