"""Check and time everything on a GPU, in one command of under 8 minutes; needs no network.

    python -m benchmarks.gpu                 writes benchmarks/results/gpu.csv
    python -m benchmarks.gpu --dry-run       the same steps at tiny sizes in Triton's interpreter

Random weights and inputs. First every op of backend='triton' against the reference in float32 on
the same values, then its time beside cuBLAS, flash-attn (where installed) and torch, by CUDA
events with the cache flushed before each run; a kernel whose check failed is not timed. Last the
whole model against transformers, with and without CUDA graphs, and its memory against the plan.
Exits with 1 if a check failed. Wants torch from 2.11 on with the Triton that belongs to it.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
_SECONDS = 450.0  # of 480; what is under way then is finished
_REPEATS = 20
_FLUSH = 256 << 20  # bytes, more than any second-level cache has


@dataclass(frozen=True)
class Row:
    """One line. Times are medians in microseconds; ``ratio`` is peer over ours; 0 is not timed.

    ``state``: ok, failed, refused, skipped; ``note`` says why.
    """

    stage: str
    op: str
    case: str
    dtype: str
    state: str
    error: float = 0.0
    tolerance: float = 0.0
    ours_us: float = 0.0
    peer: str = ""
    peer_us: float = 0.0
    ratio: float = 0.0
    tflops: float = 0.0
    gb_s: float = 0.0
    note: str = ""


class Clock:
    """How long there is, and how long things take on this device."""

    def __init__(self, device: Any, seconds: float) -> None:
        import torch

        self.device = device
        self.start = time.monotonic()
        self.end = self.start + seconds
        cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device) if cuda else None

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def microseconds(self, run: Callable[[], Any]) -> float:
        """The median of some runs, after some that do not count."""
        if self._flush is None:
            return self.rounds([run], 1)[0][0]
        for _ in range(3):
            run()
        return statistics.median(taken for (taken,) in self.rounds([run], _REPEATS))

    def rounds(self, runs: Sequence[Callable[[], Any]], count: int) -> list[list[float]]:
        """Microseconds of each run in each round, ``[count][len(runs)]``: one after the other,
        so that what slows the device down for a while slows all of them."""
        import torch

        if self._flush is None:
            return [[_host_microseconds(run) for run in runs] for _ in range(count)]
        pairs = []
        for run in [*runs] * count:
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        taken = [begin.elapsed_time(end) * 1e3 for begin, end in pairs]
        return [taken[i : i + len(runs)] for i in range(0, len(taken), len(runs))]


def _host_microseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def check(case: Any, ops: Any) -> tuple[Row, Callable[[], Any] | None]:
    """The row of a check, and what to time if it passed."""
    from qvlfast.errors import BackendError

    base = ("op", case.op, case.name, str(case.dtype).removeprefix("torch."))
    try:
        run = case.build(ops, case.inputs)
        got = run()
    except BackendError as error:
        return Row(*base, "refused", tolerance=case.tolerance, note=str(error)), None
    except Exception as error:  # whatever a driver or compiler raises is the answer of this case
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(*base, "failed", tolerance=case.tolerance, note=text[:200]), None
    found = distance(got, case.truth())
    good = found <= case.tolerance  # NaN is not
    row = Row(*base, "ok" if good else "failed", error=found, tolerance=case.tolerance)
    return row, run if good else None


def distance(got: Any, truth: Any) -> float:
    """The largest error over the largest value of the truth; quantised rows as what they mean."""
    plain = [x if hasattr(x, "abs") else x.values.float() * x.scale[:, None] for x in (got, truth)]
    one, other = (x.float() for x in plain)
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def op_rows(clock: Clock, sizes: Any, *, fp8: bool) -> list[Row]:
    """Every op, checked and timed."""
    from benchmarks.gpu_cases import cases
    from qvlfast.backends.triton import TritonOps

    ops, rows = TritonOps(clock.device), []
    for case in cases(sizes, clock.device, fp8=fp8):
        base = ("op", case.op, case.name, str(case.dtype).removeprefix("torch."))
        # A third of the time is for whole models.
        if clock.left < _SECONDS / 3:
            rows.append(Row(*base, "skipped", note="out of time"))
            continue
        row, run = check(case, ops)
        if run is None:
            rows.append(row)
            continue
        ours = clock.microseconds(run)
        speed = {"tflops": case.flops / ours / 1e6, "gb_s": case.bytes / ours / 1e3}
        values = asdict(row) | speed | {"ours_us": ours}
        timed = []
        for name, peer in case.peers.items():
            note, taken = "", 0.0
            try:
                taken = clock.microseconds(peer(case.inputs))
            except Exception as error:  # a peer that is not there, or does not take this
                note = f"{name}: {type(error).__name__}: {error}".splitlines()[0][:200]
            ratio = taken / ours
            timed.append(values | {"peer": name, "peer_us": taken, "ratio": ratio, "note": note})
        rows += [Row(**found) for found in timed or [values]]
    return rows


def machine(device: Any) -> dict[str, str]:
    """What the figures belong to."""
    import platform

    import torch
    import triton

    from qvlfast.flash import installed_version

    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu"
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if cuda else "none"
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "device": name,
        "arch": capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flash_attn": installed_version() or "",
        "commit": done.stdout.strip(),
    }


def write(rows: Sequence[Any], about: dict[str, str], path: Path) -> None:
    """Some dataclass instances of one kind as CSV, each with what it belongs to."""
    names = [field.name for field in fields(rows[0])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *about], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(values | about)


def line(row: Row) -> str:
    """As DeepGEMM prints: time, rates, and how many times as fast as the peer."""
    text = f"{row.state:8}{row.op:18}{row.case:26}{row.dtype:10}error {row.error:8.1e}"
    if row.ours_us:
        text += f"{row.ours_us:10.1f} us{row.tflops:8.1f} TFLOP/s{row.gb_s:8.0f} GB/s"
    if row.peer_us:
        text += f"  x{row.ratio:.2f} {row.peer}"
    return f"{text}  {row.note}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in the interpreter")
    parser.add_argument("--out", type=Path, help="default: results/gpu.csv; of a dry run none")
    parser.add_argument("--only", choices=("ops", "models"), help="one half")
    options = parser.parse_args(arguments)
    # Read by Triton when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1" if options.dry_run else "0"
    import torch

    from benchmarks.gpu_cases import DRY, Sizes
    from benchmarks.gpu_models import model_rows

    if not options.dry_run and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU here: --dry-run goes without")
    device = torch.device("cpu" if options.dry_run else "cuda")
    clock = Clock(device, math.inf if options.dry_run else _SECONDS)
    fp8 = options.dry_run or torch.cuda.get_device_capability() >= (8, 9)
    about = machine(device)
    print(", ".join(f"{k} {v}" for k, v in about.items() if v))
    rows: list[Row] = []
    if options.only != "models":
        rows += op_rows(clock, DRY if options.dry_run else Sizes(), fp8=fp8)
    if options.only != "ops":
        rows += model_rows(clock, dry=options.dry_run, fp8=fp8)
    print("\n".join(map(line, rows)))
    path = options.out or (None if options.dry_run else RESULTS)
    if path:
        write(rows, about, path)
    failed = [row for row in rows if row.state == "failed"]
    print(f"{len(rows)} rows, {len(failed)} failed, {time.monotonic() - clock.start:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
