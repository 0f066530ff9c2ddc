"""Measure the blocks of Triton kernels on a GPU, and write the better ones where the code reads.

    python -m benchmarks.tune                  writes kernels/measured.py and results/tune.csv
    python -m benchmarks.tune --only int8      only classes with this in their name
    python -m benchmarks.tune --dry-run        each candidate in Triton's interpreter, checked only

For every class of shapes that a table tells apart, candidates that fit the GPU are checked against
float32 and then timed in turn with the blocks in use: CUDA graphs of one call, by events, with the
cache flushed before each. The best few are timed again. One replaces the blocks in use only if it
is faster by more than the noise, which those blocks themselves show when they are timed twice, and
slower for none of the shapes. Plain products in 16 bits are then timed against cuBLAS, so that the
code takes whichever is faster. Ends after --minutes; classes not reached keep what they have.

Afterwards run ``python -m benchmarks.aot`` and ``python -m benchmarks.gpu`` once more: the machine
code is others, and so are the times.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.gpu import RESULTS, Clock, machine, write
from benchmarks.tune_tables import TABLES, render, updated

if TYPE_CHECKING:
    from benchmarks.tune_cases import Config, Entry, Trial

_ROUNDS, _FINAL_ROUNDS, _FINALISTS = 5, 30, 4
# A gain below this is not worth other machine code; a loss of this for one shape is too much.
_MARGIN = 0.02
_FINE, _UNFIT = "ok", ("refused", "failed", "wrong")


@dataclass(frozen=True)
class Row:
    """One candidate. ``ratio`` is its time over that of the blocks in use, which are the rows with
    state ``now``; 0 was not timed. States: now, ok, chosen; refused, failed, wrong."""

    entry: str
    blocks: str
    state: str
    error: float = 0.0
    ratio: float = 0.0
    worst: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Ratio:
    """Times over those of the blocks in use.

    Attributes:
        middle: of medians, the geometric mean over the trials.
        upper: the same of the upper quartiles of the rounds' ratios.
        worst: of medians, the trial for which it is largest.
    """

    middle: float
    upper: float
    worst: float


class Timer(Protocol):
    """What :class:`GraphTimer` does; tests have another."""

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]: ...
    def rounds(self, runs: Sequence[Callable[[], Any]], count: int) -> list[list[float]]: ...


class GraphTimer:
    """Times calls as CUDA graphs, so that what the host takes to launch them is left out."""

    def __init__(self, clock: Clock) -> None:
        import torch

        self.rounds = clock.rounds
        # Results are thrown away, so all graphs may write them to the same memory.
        self._pool = torch.cuda.graph_pool_handle()

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of ``run``, which must have run before."""
        import torch

        from qvlfast.kernels import attention

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        # The graph reads the plan of its forest, which is dropped when others have come.
        return partial(_replay, graph, list(attention._PLANS.values()))


def _replay(graph: Any, kept: object) -> None:
    graph.replay()


def ratios(trials: Sequence[Sequence[Sequence[float]]]) -> list[Ratio]:
    """Of every run but the first, over the first.

    Args:
        trials: ``[trials][rounds][runs]`` times.
    """
    found = []
    for run in range(1, len(trials[0][0])):
        middles, uppers = [], []
        for rounds in trials:
            base = statistics.median(times[0] for times in rounds)
            middles.append(statistics.median(times[run] for times in rounds) / base)
            each = sorted(times[run] / times[0] for times in rounds)
            uppers.append(each[(3 * (len(each) - 1) + 3) // 4])
        mean = statistics.geometric_mean
        found.append(Ratio(mean(middles), mean(uppers), max(middles)))
    return found


def better(candidate: Ratio, again: Ratio) -> bool:
    """Whether a candidate is faster by more than noise.

    Args:
        again: of the blocks in use themselves, timed a second time.
    """
    noise = max(_MARGIN, 2 * abs(1 - again.middle))
    return candidate.middle < 1 - noise and candidate.upper < 1 and candidate.worst < 1 + _MARGIN


def check(config: Config, trials: Sequence[Trial], truths: Sequence[Any]) -> tuple[str, float, str]:
    """State, largest error and note of a candidate."""
    from qvlfast.kernels.common import RefusalError

    from benchmarks.tune_cases import TOLERANCE

    largest = 0.0
    for trial, truth in zip(trials, truths, strict=True):
        try:
            error = trial.error(config, truth)
        except RefusalError as refusal:
            return "refused", 0.0, str(refusal)
        except Exception as fault:  # whatever a driver or compiler raises
            return "failed", 0.0, f"{type(fault).__name__}: {fault}".splitlines()[0][:200]
        if not error <= TOLERANCE:
            return "wrong", error, trial.name
        largest = max(largest, error)
    return _FINE, largest, ""


def examine(entry: Entry, trials: Sequence[Trial], left: Callable[[], float]) -> list[Row]:
    """A row for the blocks in use and for each candidate; shorter if the time ends."""
    truths = [trial.truth() for trial in trials]
    rows = []
    for config in (entry.now, *entry.candidates):
        if left() < 0:
            break
        state, error, note = check(config, trials, truths)
        rows.append(Row(entry.name, _text(config), state, error, note=note))
    return rows


def tune(
    entry: Entry, timer: Timer, left: Callable[[], float]
) -> tuple[list[Row], tuple[Config, float] | None]:
    """Find the best blocks for a class.

    Args:
        left: seconds.

    Returns:
        What was found of each candidate, none if the time ended before; and the blocks that are
        better than those in use, with their ratio.
    """
    trials = entry.trials()
    rows = examine(entry, trials, left)
    if len(rows) <= len(entry.candidates):
        return [], None
    good = [
        config
        for config, row in zip((entry.now, *entry.candidates), rows, strict=True)
        if row.state == _FINE
    ]
    if not good or good[0] != entry.now:  # there is nothing to be measured against
        return rows, None

    def compare(configs: Sequence[Config], count: int) -> list[Ratio]:
        times = []
        for trial in trials:
            runs = [timer.prepare(partial(trial.run, config)) for config in configs]
            times.append(timer.rounds(runs, count))
        return ratios(times)

    first = dict(zip(good[1:], compare(good, _ROUNDS), strict=True)) if good[1:] else {}
    finalists = sorted(first, key=lambda c: first[c].middle)[:_FINALISTS]
    *found, again = compare([entry.now, *finalists, entry.now], _FINAL_ROUNDS)
    last = dict(zip(finalists, found, strict=True))
    better_ones = [c for c in finalists if better(last[c], again)]
    best = min(better_ones, key=lambda c: last[c].middle, default=None)
    known = first | last | {entry.now: again}
    timed = []
    for config, row in zip((entry.now, *entry.candidates), rows, strict=True):
        ratio = known.get(config)
        state = "now" if config == entry.now else "chosen" if config == best else row.state
        if ratio is not None:
            row = replace(row, ratio=ratio.middle, worst=ratio.worst)
        timed.append(replace(row, state=state))
    return timed, None if best is None else (best, last[best].middle)


def against_vendor(entry: Entry, config: Config, timer: Timer) -> float | None:
    """Time of these blocks over that of the vendor's library; None where there is no choice."""
    times = []
    for trial in entry.trials():
        if trial.vendor is None:
            return None
        runs = [timer.prepare(trial.vendor), timer.prepare(partial(trial.run, config))]
        times.append(timer.rounds(runs, _FINAL_ROUNDS))
    return ratios(times)[0].middle


def _text(config: Config) -> str:
    from benchmarks.tune_cases import blocks

    return " ".join(map(str, blocks(config)))


def wanted(target: str, sizes: Any, device: Any, only: str) -> Iterator[Entry]:
    from benchmarks.tune_cases import entries

    return (entry for entry in entries(target, sizes, device) if only in entry.name)


def compile_part(target: str, only: str, part: str) -> None:
    """Every n-th candidate into Triton's cache, without a GPU; ``part`` is ``i/n``."""
    import torch
    from qvlfast.kernels.ahead import compiling_for

    from benchmarks.tune_cases import Sizes

    index, parts = map(int, part.split("/"))
    count = 0
    with compiling_for(target):
        for entry in wanted(target, Sizes(), torch.device("meta"), only):
            trials = entry.trials()
            for config in (entry.now, *entry.candidates):
                count += 1
                if count % parts == index:
                    _compile(config, trials)


def _compile(config: Config, trials: Sequence[Trial]) -> None:
    for trial in trials:
        try:
            trial.run(config)
        except Exception as fault:  # said again, and noted, by who runs it on the device
            print(f"{_text(config)}, {trial.name}: {type(fault).__name__}", file=sys.stderr)


def compile_all(target: str, only: str, workers: int, seconds: float) -> None:
    """Fill Triton's cache with several processes; what they do not reach is compiled when used."""
    command = [sys.executable, "-m", "benchmarks.tune", "--target", target, "--only", only]
    started = [
        subprocess.Popen([*command, "--compile", f"{i}/{workers}"], stderr=subprocess.DEVNULL)
        for i in range(workers)
    ]
    end = time.monotonic() + seconds
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def dry_run(target: str, only: str) -> int:
    """Check every candidate on tiny shapes in the interpreter; 1 if one is not as the truth."""
    import torch

    from benchmarks.tune_cases import DRY

    bad = count = 0
    for entry in wanted(target, DRY, torch.device("cpu"), only):
        rows = examine(entry, entry.trials(), lambda: math.inf)
        faults = [row for row in rows if row.state in _UNFIT]
        count, bad = count + len(rows), bad + len(faults)
        print(f"{entry.name}: {len(rows)} candidates, {len(faults)} not as they should be")
        for row in faults:
            print(f"    {row.blocks}: {row.state} {row.error:.1e} {row.note}")
    print(
        f"{target}: {count} candidates, {bad} not as they should be; nothing was timed or written"
    )
    return int(bad > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the most it takes (default: 8)")
    parser.add_argument("--only", default="", help="part of the names of classes")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in the interpreter")
    parser.add_argument("--target", default="sm_90", help="of a dry run (default: sm_90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # Read by Triton when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1" if options.dry_run else "0"
    import torch
    from qvlfast.kernels.configs import TARGETS

    if options.target not in TARGETS:
        parser.error(f"target {options.target!r} is unknown: use one of {', '.join(TARGETS)}")
    if options.dry_run:
        return dry_run(options.target, options.only)
    if options.compile:
        compile_part(options.target, options.only, options.compile)
        return 0
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU here: --dry-run goes without")
    return on_device(options.only, options.minutes * 60, options.workers)


def on_device(only: str, seconds: float, workers: int) -> int:
    """Tune for the GPU of this machine and write what was found."""
    import torch
    from qvlfast.kernels.common import target_of
    from qvlfast.kernels.configs import TARGETS

    from benchmarks.tune_cases import Sizes

    device = torch.device("cuda")
    target, clock = target_of(device), Clock(device, seconds)
    if target not in TARGETS:
        print(f"{target} has no entry in kernels/configs.py", file=sys.stderr)
        return 2
    compile_all(target, only, workers, seconds / 2)
    every = list(wanted(target, Sizes(), device, only))
    about = machine(device)
    tune_all(target, every, GraphTimer(clock), lambda: clock.left, about)
    return 0


def tune_all(
    target: str,
    every: Sequence[Entry],
    timer: Timer,
    left: Callable[[], float],
    about: dict[str, str],
    *,
    tables: Path = TABLES,
    table: Path = RESULTS.parent / "tune.csv",
) -> None:
    """Tune all classes that there is time for, and write ``tables`` and ``table``.

    Args:
        left: seconds.
        about: the machine, of :func:`benchmarks.gpu.machine`.
    """
    rows: list[Row] = []
    chosen: dict[Entry, tuple[Config, float]] = {}
    vendor: dict[Entry, float] = {}
    timed = 0
    for entry in every:
        found, best = tune(entry, timer, left)
        if found and any(row.state in ("now", "chosen") for row in found):
            ratio = against_vendor(entry, best[0] if best else entry.now, timer)
            if ratio is not None:
                vendor[entry] = ratio
        rows += found
        timed += bool(found)
        if best is not None:
            chosen[entry] = best
        what = f"{_text(best[0])}, {best[1]:.3f} of the time" if best else _text(entry.now)
        print(f"{entry.name}: {what}" if found else f"{entry.name}: out of time", flush=True)
    if rows:
        write(rows, about, table)
        note = (
            f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, "
            f"{datetime.date.today()}, {about['commit']}: {timed} of {len(every)} classes timed"
        )
        tables.write_text(render(*updated(target, note, chosen, vendor), tables.read_text()))
    print(f"{timed} of {len(every)} classes timed, {len(chosen)} changed")


if __name__ == "__main__":
    sys.exit(main())
