"""Compile every Triton kernel ahead of time and read the machine code; needs no GPU.

    python -m benchmarks.aot                     compile for all targets, write results/aot.csv
    python -m benchmarks.aot --targets sm_90     only these; the table keeps the others' rows
    python -m benchmarks.aot --check             write nothing; fail where a rule below is broken

The kernels are launched by their own wrappers on tensors without storage, at the shapes of the 2B
and 8B models; the launch is recorded instead of run, so that what is compiled is what would be.
Each target is compiled in a process of its own, because some abort.

Rules: it compiles; nothing is spilled (in float32, which is there for checking, a few registers may
be); shared memory is under the target's limit; products but those in float32 use the target's own
matrix instruction for their operands, and those whose loads are staged copy asynchronously.
Counts are compared with the table only under the Triton that made it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")
TABLE = Path(__file__).parent / "results" / "aot.csv"

# Kilobytes of shared memory that one block may have (CUDA programming guide). sm_110 is not in the
# edition read: held to the least until it is.
SHARED_KB = {
    "sm_80": 163,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_110": 99,
    "sm_120": 99,
}
# mma.sync, wgmma and tcgen05 in machine code, for 16-bit, integer and e4m3 operands.
MATRIX = re.compile(r"\b(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC[HIQ]MMA)\b")
ASYNC_COPY = re.compile(r"\b(LDGSTS|UTMALDG)\b")
SPILL = re.compile(r"\b(STL|LDL)\b")
FLOAT32_SPILLS = 16
# What ptxas says to a target that is newer than it is.
UNKNOWN = "is not defined for option 'gpu-name'"


@dataclass(frozen=True)
class Row:
    """One kernel on one target. ``error`` is empty when it compiled."""

    target: str
    op: str
    dtype: str
    case: str
    blocks: str
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    spills: int
    matrix: str
    matrix_count: int
    async_copies: int
    triton: str
    error: str


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def work(target: str) -> None:
    """Compile everything for one target; a row of JSON a line."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Only here: in this process Triton is imported without its interpreter.
    from benchmarks.aot_cases import record, specialise

    for op, dtype, case, kernel, args, config, constants in record(target):
        signature, values, attributes = specialise(kernel, args, constants)
        stages = getattr(config, "stages", 1)
        blocks = " ".join(f"{k}={v}" for k, v in asdict(config).items())
        row = Row(target, op, dtype, case, blocks, config.warps, stages, 0, 0, 0, "", 0, 0,
                  triton.__version__, "")  # fmt: skip
        print(json.dumps(asdict(row) | {"error": "aborted"}), flush=True)
        try:
            compiled = triton.compile(
                ASTSource(kernel, signature, values, attributes),
                target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
                options={
                    "num_warps": config.warps,
                    "num_stages": stages,
                    "enable_fp_fusion": True,
                },
            )
            result = (
                asdict(row)
                | read_code(compiled.asm["cubin"])
                | {"shared_bytes": compiled.metadata.shared}
            )
        except Exception as error:  # whatever the compiler raises is the row's answer
            lines = str(error).strip().splitlines() or [type(error).__name__]
            fatal = [line for line in lines if " fatal " in line or UNKNOWN in line]
            result = asdict(row) | {"error": (fatal or lines)[-1][:200]}
        print(json.dumps(result), flush=True)


def read_code(cubin: bytes) -> dict[str, Any]:
    """Registers and instruction counts of one kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [tool("cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")
    found = MATRIX.findall(code)
    registers = re.search(r"REG:(\d+)", usage)
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": len(SPILL.findall(code)),
        "matrix": " ".join(sorted(set(found))),
        "matrix_count": len(found),
        "async_copies": len(ASYNC_COPY.findall(code)),
    }


def compile_target(target: str) -> list[Row]:
    """All rows of a target, from a process of its own without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.aot", "--worker", target]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        print(f"{target}: the compiler ended with {done.returncode}\n{done.stderr[-2000:]}")
    return parse_rows(done.stdout)


def parse_rows(output: str) -> list[Row]:
    """A worker's rows; each case is announced as aborted before it is compiled."""
    rows: list[Row] = []
    for line in output.splitlines():
        if rows and rows[-1].error == "aborted":
            rows.pop()
        rows.append(Row(**json.loads(line)))
    return rows


def expected_matrix(row: Row) -> tuple[str, ...]:
    """The instructions, any of which a product of this row's kind should be made of."""
    kind = "I" if "int" in row.op else "Q" if "fp8" in row.op else "H"
    if row.op.endswith("int4_float"):
        kind = "H"  # the weight is widened to the rows' dtype
    blocks = dict(pair.split("=") for pair in row.blocks.split())
    few = int(blocks["m"]) < 64  # wgmma and tcgen05 take 64 rows
    if row.target in ("sm_90", "sm_100", "sm_110") and few:
        # There mma.sync has no e4m3: it is widened to float16, exactly.
        return ("QMMA", "HMMA") if kind == "Q" else (f"{kind}MMA",)
    if row.target == "sm_90":
        return (f"{kind}GMMA",)
    if row.target == "sm_100" or (row.target == "sm_110" and kind != "I"):
        return (f"UTC{kind}MMA",)
    return (f"{kind}MMA",)


def broken(row: Row) -> str:
    """The rule that a row breaks, or nothing."""
    if row.error:
        return row.error
    if row.spills > (FLOAT32_SPILLS if row.dtype == "float32" else 0):
        return f"{row.spills} spills"
    if row.shared_bytes > SHARED_KB[row.target] * 1024:
        return f"{row.shared_bytes} bytes of shared memory, at most {SHARED_KB[row.target]} KB fit"
    if row.dtype != "float32" and ("linear" in row.op or row.op in ("patch_embed", "attention")):
        expected = expected_matrix(row)
        if not set(expected) & set(row.matrix.split()):
            return f"matrix instruction {row.matrix or 'none'}, expected {' or '.join(expected)}"
        if row.stages > 1 and not row.async_copies:
            return "no asynchronous copies"
    return ""


def compare(rows: list[Row], known: list[Row]) -> list[str]:
    """Rows that differ from the table's, where the same Triton made both."""

    def key(row: Row) -> tuple[str, ...]:
        return row.target, row.op, row.dtype, row.case, row.triton

    before = {key(row): row for row in known}
    return [
        f"{' '.join(key(row))}: {row} differs from the table's {before[key(row)]}"
        for row in rows
        if key(row) in before and before[key(row)] != row
    ]


def read_table() -> list[Row]:
    types: dict[str, Any] = {f.name: int if f.type == "int" else str for f in fields(Row)}
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [Row(**{k: types[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]


def write_table(rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: TARGETS.index(row.target))
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--check", action="store_true", help="judge, and do not write the table")
    parser.add_argument("--jobs", type=int, default=2, help="targets compiled at once")
    parser.add_argument("--worker", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    targets = options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: give some of {', '.join(TARGETS)}")
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for part in pool.map(compile_target, targets) for row in part]
    newer = sorted({row.target for row in rows if UNKNOWN in row.error})
    if newer:
        print(f"not compiled, since this Triton's assembler does not know them: {', '.join(newer)}")
        rows = [row for row in rows if row.target not in newer]
    faults = [f"{r.target} {r.op} {r.dtype} {r.case}: {broken(r)}" for r in rows if broken(r)]
    if options.check:
        faults += compare(rows, read_table())
    else:
        kept = read_table() if TABLE.exists() else []
        write_table(rows + [row for row in kept if row.target not in targets])
    print(f"{len(rows)} kernels compiled, {len(faults)} against the rules")
    print("\n".join(faults))
    sys.exit(bool(faults) or not rows)


if __name__ == "__main__":
    main()
