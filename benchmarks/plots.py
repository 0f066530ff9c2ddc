"""The committed results as plots in docs/plots: ``python -m benchmarks.plots``.

A CSV is added to by every run; of rows that measure the same on the same machine the last one
counts. A CSV that is not there has no plot. The plots hold nothing but what the rows say, so the
same rows give the same files.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .records import RESULTS
from .svg import Bar, Chart, Column, Groups, Panel, Scale, linear, logarithmic, render

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
FORMATS = ("float32", "bf16", "int8", "int4", "fp8", "int8+vision", "int4+vision")

Row = Mapping[str, str]
# A run's circumstances, with which rows are compared among themselves.
CPU = ("shape", "dtype", "peer", "isa", "threads", "machine")
OPS = ("isa", "threads", "machine")
SCHEDULER = ("shape", "weights", "isa", "threads", "machine")

UNITS = {"GB/s": "% of memory's reading speed", "Gop/s": "% of the multiply-adds' peak"}

OF_CALLS = (
    "Whole encode calls, preprocessing included, against the peer's forward pass; medians of the "
    "ratios of rounds that alternate."
)
OF_KERNELS = (
    "Dashed: what the processor did in the same run, in multiply-adds from register to register "
    "(int4 as int8), or in reading memory. Of products with few rows the bytes are those of the "
    "packed weight."
)
ABOVE = (
    " Above 100%: the machine ran slower while the limit was measured, or a cache held operands."
)
OF_SCHEDULER = (
    "Times of whole calls, preprocessing included; medians of rounds that alternate, and of their "
    "ratios. Cases with transformers: against that in place of sharing off. What the bulk job "
    "should reach: its rate alone, times the part that interactive work leaves."
)
OF_ACCURACY = (
    "The embedder that comes along; pictures found by words of training (seen), not of training "
    "(unseen), or in a language in which training saw no word for that emoji (pairs). Lines are "
    "95% intervals. Dashed: bf16; in brackets: points from it, on the same queries. Axes do not "
    "begin at 0."
)


def newest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each key, at the place of the first."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[tuple(row[k] for k in key)] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in key), []).append(row)
    return found


def where(row: Row) -> str:
    """The machine, as far as the CSV has it."""
    parts = [row["machine"]]
    if "isa" in row:
        parts += [row["isa"], f"{row['threads']} threads"]
    return ", ".join(parts)


def sources(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    """A caption line for each machine, and one for the file."""
    keys = [k for k in ("machine", "isa", "threads") if k in rows[0]]
    lines = []
    for group in grouped(rows, keys).values():
        parts = [where(group[0])]
        if "torch" in group[0]:
            parts.append("torch " + ", ".join(dict.fromkeys(row["torch"] for row in group)))
        parts.append("commit " + ", ".join(dict.fromkeys(row["commit"] for row in group)))
        lines.append("; ".join(parts) + ".")
    return (*lines, f"From benchmarks/results/{name}, by python -m benchmarks.plots.")


def by_format(rows: Iterable[Row], form: Callable[[Row], str]) -> list[tuple[str, Row]]:
    return sorted(((form(row), row) for row in rows), key=lambda pair: FORMATS.index(pair[0]))


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def calls(rows: Sequence[Row]) -> Chart:
    """How many times as fast as the peer whole calls are."""

    def form(row: Row) -> str:
        if row["quantization"] != "none":
            return row["quantization"]
        return "bf16" if row["dtype"] == "bfloat16" else row["dtype"]

    rows = newest(rows, (*CPU, "case", "quantization", "backend"))
    # One scale, so that machines and peers can be compared.
    scale = Scale(linear([float(row["speedup"]) for row in rows]), "×", mark=1.0)
    panels = []
    for setting in grouped(rows, CPU).values():
        groups: dict[str, list[Bar]] = {}
        for (case,), several in grouped(setting, ["case"]).items():
            tokens = f"{int(several[0]['tokens']):,}"
            groups[f"{case}, {tokens} tokens"] = [
                Bar(name, float(row["speedup"]), times(float(row["speedup"])))
                for name, row in by_format(several, form)
            ]
        one = setting[0]
        axis = f"times as fast as {one['peer']} in {one['dtype']} (1×, dashed); more is better"
        column = Column("", axis, scale, groups)
        panels.append(Panel(f"Shape {one['shape']}, {where(one)}", (column,)))
    captions = (OF_CALLS, *sources(rows, "cpu.csv"))
    return Chart("Whole calls on a CPU", FORMATS, tuple(panels), captions)


def kernels(rows: Sequence[Row]) -> Chart:
    """Rates as percent of what the processor did in the same run."""
    rows = newest(rows, (*OPS, "op", "case", "rows", "format"))
    panels = []

    def columns(rows: Sequence[Row], titled: bool) -> tuple[Column, ...]:
        """One for each M, the rows of x, if that is the title."""
        ticks = linear([1e2, *(100 * float(row["share"]) for row in rows)], most=4)
        made = []
        for (unit, *count), some in grouped(rows, ("unit", "rows")[: 1 + titled]).items():
            groups: Groups = {
                label: [
                    Bar(form, 100 * float(row["share"]), f"{100 * float(row['share']):.0f}%")
                    for form, row in by_format(several, lambda row: row["format"])
                ]
                for (label,), several in grouped(some, ["case"]).items()
            }
            scale = Scale(ticks, "%", mark=100.0)
            made.append(Column("".join(f"M = {n}" for n in count), UNITS[unit], scale, groups))
        return tuple(made)

    for setting in grouped(rows, OPS).values():
        place = where(setting[0])
        products = [row for row in setting if row["op"] == "gemm"]
        others = [row for row in setting if row["op"] != "gemm"]
        if products:
            panels.append(Panel(f"Products of M rows; {place}", columns(products, True)))
        for (unit,), some in grouped(others, ["unit"]).items():
            title, named = "Attention", some
            if unit == "GB/s":
                title = "Row-wise"
                named = [{**row, "case": f"{row['op']} {row['case']}"} for row in some]
            panels.append(Panel(f"{title}; {place}", columns(named, False)))
    note = OF_KERNELS + ABOVE * any(float(row["share"]) > 1 for row in rows)
    captions = (note, *sources(rows, "cpu_ops.csv"))
    return Chart("CPU kernels against the processor's limits", FORMATS, tuple(panels), captions)


def scheduler(rows: Sequence[Row]) -> Chart:
    """What sharing saves, and what the scheduler itself costs."""
    rows = newest(rows, (*SCHEDULER, "case"))
    panels = []
    for setting in grouped(rows, SCHEDULER).values():
        shared: dict[str, list[Bar]] = {}
        own: dict[str, list[Bar]] = {}
        for row in setting:
            on, off = float(row["on"]), float(row["off"])
            form = "bf16" if row["weights"] == "bfloat16" else row["weights"]
            if row["case"].startswith("queue"):
                # ``on`` is with the short queue, ``off`` with the long one.
                text = f"{times(off / on)}: {on:g} and {off:g} µs a request"
                own[row["case"]] = [Bar(form, off / on, text)]
            elif "interactive" in row["case"]:
                text = f"{times(on / off)}: {on:g} against {off:g} {row['unit']}"
                own[row["case"]] = [Bar(form, on / off, text)]
            else:
                ratio = float(row["ratio"])
                text = f"{times(ratio)}: {on:g} against {off:g} s"
                shared[row["case"]] = [Bar(form, ratio, text)]
        one = setting[0]
        title = f"shape {one['shape']}, {one['weights']}, {where(one)}"
        for groups, what, axis in (
            (shared, "With sharing and caches", "times as fast as without; more is better"),
            (own, "The scheduler itself", "queue: long by short; others: beside by alone"),
        ):
            if groups:
                values = [bar.value for bars in groups.values() for bar in bars]
                scale = Scale(logarithmic(values), "×", base=1.0, log=True)
                panels.append(Panel(f"{what}: {title}", (Column("", axis, scale, groups),)))
    captions = (OF_SCHEDULER, *sources(rows, "scheduler.csv"))
    title = "What the scheduler saves, and what it costs"
    return Chart(title, FORMATS, tuple(panels), captions)


def accuracy(rows: Sequence[Row]) -> Chart:
    """recall@10 of the embedder by format of its weights, and by cut and type of its vectors."""
    recalls = [row for row in rows if row["measure"] == "recall@10"]
    recalls = newest(recalls, ("model", "machine", "plan", "group", "dimensions", "output"))
    most = max(int(row["dimensions"]) for row in recalls)

    def form(row: Row) -> str:
        return row["plan"].split(",")[0]

    def bar(row: Row, differs: bool) -> Bar:
        value, low, high = (100 * float(row[k]) for k in ("value", "low", "high"))
        text = f"{value:.1f}"
        if differs and row["plan"] != "bf16":
            text += f" ({float(row['against_bf16']):+.1f})".replace("-", "−")
        return Bar(form(row), value, text, (low, high))

    def columns(rows: Sequence[Row], label: Callable[[Row], str], differs: bool) -> Panel:
        made = []
        for (group,), some in grouped(rows, ["group"]).items():
            groups: dict[str, list[Bar]] = {}
            for _, row in by_format(some, form):
                groups.setdefault(label(row), []).append(bar(row, differs))
            if not differs:  # as the CSV has them, rather than by format
                groups = {label(row): groups[label(row)] for row in some}
            ends = [v for bars in groups.values() for b in bars for v in b.interval or ()]
            base = [bars[0].value for name, bars in groups.items() if differs and name == "bf16"]
            scale = Scale(linear(ends, False, 4), "%", -1.0, base[0] if base else None)
            title = f"{group}, {int(some[0]['count']):,} queries"
            made.append(Column(title, "recall@10", scale, groups))
        title = "By format of the weights" if differs else "By length and type of the vectors"
        return Panel(title, tuple(made))

    panels = []
    for _, some in grouped(recalls, ("model", "machine")).items():
        whole = [r for r in some if int(r["dimensions"]) == most and r["output"] == "float32"]
        plain = [row for row in some if row["plan"] in ("bf16", "int8", "int4")]
        panels.append(columns(whole, lambda row: row["plan"], True))
        panels.append(columns(plain, lambda r: f"{r['dimensions']} × {r['output']}", False))
    captions = (OF_ACCURACY, *sources(recalls, "accuracy.csv"))
    return Chart("recall@10 of the quantised embedder", FORMATS, tuple(panels), captions)


SUBJECTS: dict[str, tuple[str, Callable[[Sequence[Row]], Chart]]] = {
    "calls": ("cpu.csv", calls),
    "kernels": ("cpu_ops.csv", kernels),
    "scheduler": ("scheduler.csv", scheduler),
    "accuracy": ("accuracy.csv", accuracy),
}


def plots(results: Path = RESULTS) -> dict[str, str]:
    """The SVG files that the results give, by name; a CSV that is not there is told."""
    made = {}
    for name, (table, draw) in SUBJECTS.items():
        path = results / table
        if not path.exists():
            print(f"{table} is not there: no plot of {name}")
            continue
        with path.open(newline="", encoding="utf-8") as file:
            made[f"{name}.svg"] = render(draw(list(csv.DictReader(file))))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the CSVs")
    parser.add_argument("--out", type=Path, default=PLOTS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in plots(options.results).items():
        (options.out / name).write_text(text, encoding="utf-8")
        print(f"{options.out / name}")


if __name__ == "__main__":
    main()
