"""Predict what each kernel costs on each GPU, from its machine code and the roofline; needs no GPU.

    python -m benchmarks.costs      writes results/costs.csv and docs/costs.md

Nothing here was measured by us. Registers and shared memory are those of results/aot.csv; peaks
are of public data sheets. A time is the least that the roofline allows: every operand crosses the
memory bus once, or the matrix unit never waits. Run it again after benchmarks.aot.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qvlfast.kernels.configs import PROCESSORS, gemm_config

from benchmarks import aot
from benchmarks.records import RESULTS

TABLE = RESULTS / "costs.csv"
PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
ROWS = (1, 40, 3000)  # those of aot_cases.py
TOKENS = 4096


@dataclass(frozen=True)
class Arch:
    """A GPU: GB/s, dense tera-operations a second, and what one multiprocessor holds.

    ``matrix``: by kind; a kind that the source does not state, or the GPU lacks, is not in it.
    """

    name: str
    source: str
    gb_s: float
    matrix: dict[str, float]
    warps: int
    blocks: int
    shared_kb: int


# Without sparsity, sums in float32. Multiprocessors are those of configs.py; warps, blocks and
# shared memory are of the CUDA programming guide's table of compute capabilities; the warps and
# blocks of sm_110 are taken to be those of sm_120.
ARCHS = {
    "sm_80": Arch(
        "A100 80 GB SXM", "NVIDIA A100 data sheet",
        2039, {"float16": 312, "int8": 624}, 64, 32, 164,
    ),
    "sm_87": Arch(
        "Jetson AGX Orin 64 GB",
        "NVIDIA Jetson AGX Orin technical brief: 170 sparse int8 TOPS of the GPU, so 85 dense, and "
        "half of it in 16 bits",
        204.8, {"float16": 42.5, "int8": 85}, 48, 16, 164,
    ),
    "sm_89": Arch(
        "RTX 4090", "NVIDIA Ada GPU architecture whitepaper",
        1008, {"float16": 165.2, "int8": 660.6, "fp8": 330.3}, 48, 24, 100,
    ),
    "sm_90": Arch(
        "H100 SXM", "NVIDIA H100 data sheet, sparse figures halved",
        3350, {"float16": 989.5, "int8": 1979, "fp8": 1979}, 64, 32, 228,
    ),
    "sm_100": Arch(
        "B200", "NVIDIA HGX B200 data sheet, per GPU, sparse figures halved",
        8000, {"float16": 2250, "int8": 4500, "fp8": 4500}, 64, 32, 228,
    ),
    "sm_110": Arch(
        "Jetson Thor T5000",
        "NVIDIA Jetson Thor data sheet: 2070 sparse FP4 TFLOP/s, so a quarter of it in dense FP8 "
        "and an eighth in 16 bits; int8 is not derived, since it does not go through tcgen05",
        273, {"float16": 258.8, "fp8": 517.5}, 48, 24, 228,
    ),
    "sm_120": Arch(
        "RTX 5090", "NVIDIA RTX Blackwell GPU architecture whitepaper",
        1792, {"float16": 209.5, "int8": 838, "fp8": 419}, 48, 24, 100,
    ),
}  # fmt: skip
MULTIPLIED_AS = {"int4": "int8", "int4_float": "float16"}
REGISTERS = 65_536  # of a multiprocessor, on all of them


@dataclass(frozen=True)
class Work:
    """What an op has to do: ``bytes`` in and out of memory, ``operations`` of the matrix unit."""

    op: str
    case: str
    kind: str
    bytes: int
    operations: int
    programs: int
    blocks: str


@dataclass(frozen=True)
class Row:
    """A prediction. ``bound``: memory or arithmetic; ``bound_us``: least microseconds at it."""

    target: str
    op: str
    case: str
    kind: str
    bytes: int
    operations: int
    bound: str
    bound_us: float
    programs: int
    waves: float
    occupancy: float
    registers: int
    shared_bytes: int


def resident(arch: Arch, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that one multiprocessor holds at a time; 0 if not even one fits.

    Registers are handed to a warp by 256, so 8 a thread. Shared memory is handed out by 128 bytes,
    and CUDA takes 1 KB for itself with every block.
    """
    by_warps = arch.warps // warps
    by_registers = REGISTERS // (-(-max(registers, 1) // 8) * 8 * 32) // warps
    by_shared = arch.shared_kb * 1024 // (-(-shared_bytes // 128) * 128 + 1024)
    return min(arch.blocks, by_warps, by_registers, by_shared)


def roofline(bytes_: int, operations: int, gb_s: float, tera: float) -> tuple[str, float]:
    """Which of memory and arithmetic takes longer, and its microseconds."""
    memory = bytes_ / gb_s / 1e3
    arithmetic = operations / tera / 1e6 if operations else 0.0
    return ("arithmetic", arithmetic) if arithmetic > memory else ("memory", memory)


def product_bytes(
    kind: str, m: int, n: int, k: int, *, gated: bool, residual: bool, split: int
) -> int:
    """Operands, scales, result and residual, each once; parts of a split sum twice.

    Args:
        n: outputs, after gating.
    """
    rows = n * (1 + gated)
    value = 2 if kind in ("float16", "int4_float") else 1
    weight = rows * k // 2 + rows * k // 64 if "int4" in kind else rows * k * value
    scales = {"float16": 0, "int4_float": 4 * rows}.get(kind, 4 * (m + rows))
    parts = 2 * 4 * split * m * n if split > 1 else 0
    return m * k * value + weight + scales + 2 * m * n * (1 + residual) + parts


def product_work(
    target: str, case: str, kind: str, m: int, n: int, k: int, *,
    gated: bool = False, residual: bool = False, activation: str = "none",
) -> Work:  # fmt: skip
    config = gemm_config(
        kind, target, m, n, k, activation=activation, gated=gated, residual=residual
    )
    op = ("gated_" if gated else "") + "linear" + ("" if kind == "float16" else f"_{kind}")
    size = product_bytes(kind, m, n, k, gated=gated, residual=residual, split=config.split)
    programs = -(-m // config.m) * -(-n // config.n) * config.split
    blocks = " ".join(f"{name}={value}" for name, value in asdict(config).items())
    return Work(op, case, kind, size, 2 * m * n * k * (1 + gated), programs, blocks)


def products(target: str) -> Iterator[Work]:
    """The decoder's linears of both models, and the vision tower's in 16 bits."""
    for size, hidden, ffn, vision, vision_ffn in (
        ("2b", 2048, 6144, 1024, 4096),
        ("8b", 4096, 12288, 1152, 4304),
    ):
        for kind in ("float16", "int8", "int4", "int4_float", "fp8"):
            for m in ROWS:
                if kind == "int4" and m > 64:
                    continue  # multiplied as int8, after the weight was widened
                for name, n, k, gated, onto in (
                    ("q", hidden, hidden, False, False),
                    ("o", hidden, hidden, False, True),
                    ("gate up", ffn, hidden, True, False),
                    ("down", hidden, ffn, False, True),
                ):
                    case = f"{size} {name} m={m} n={n} k={k}"
                    yield product_work(target, case, kind, m, n, k, gated=gated, residual=onto)
        m = TOKENS
        for name, n, k, activation, onto in (
            ("qkv", 3 * vision, vision, "none", False),
            ("fc1", vision_ffn, vision, "gelu_tanh", False),
            ("fc2", vision, vision_ffn, "none", True),
        ):
            case = f"{size} vision {name} m={m} n={n} k={k}"
            yield product_work(
                target, case, "float16", m, n, k, activation=activation, residual=onto
            )


def others(target: str, compiled: Sequence[aot.Row]) -> Iterator[Work]:
    """Attention, patch embedding and a norm, with the blocks that were compiled for them."""

    def blocks_of(op: str, case: str) -> tuple[str, dict[str, str]]:
        row = next(
            r for r in compiled
            if (r.target, r.op, r.dtype, r.case) == (target, op, "bfloat16", case)
        )  # fmt: skip
        return row.blocks, dict(pair.split("=") for pair in row.blocks.split())

    t = TOKENS
    for case, heads, kv, dim, causal in (
        ("2b text", 16, 8, 128, True),
        ("8b text", 32, 8, 128, True),
        ("2b vision", 16, 16, 64, False),
        ("8b vision", 16, 16, 72, False),
    ):
        blocks, block = blocks_of("attention", case)
        pairs = t * (t + 1) // 2 if causal else t * t
        programs = math.ceil(t / (int(block["m"]) // (heads // kv))) * kv
        size = 2 * dim * 2 * t * (heads + kv)
        yield Work(
            "attention", f"{case} tokens={t}", "float16", size, 4 * heads * dim * pairs, programs,
            blocks,
        )  # fmt: skip
    blocks, block = blocks_of("patch_embed", "2b k=768")
    k, c = 768, 1024
    size = t * k + 2 * c * k + 2 * t * c + 2 * 48 * 48 * c + 4 * c
    programs = math.ceil(t / int(block["m"])) * math.ceil(c / int(block["n"]))
    yield Work(
        "patch_embed", f"2b patches={t} k={k}", "float16", size, 2 * t * k * c, programs, blocks
    )
    for form, width in (("float", 2), ("int8", 1)):
        blocks, block = blocks_of("rms_norm", f"2b hidden {form}")
        h = 2048
        size = t * h * (2 + width) + 2 * h + (0 if form == "float" else 4 * t)
        programs = math.ceil(t / int(block["rows"]))
        yield Work("rms_norm", f"2b {form} tokens={t}", "float16", size, 0, programs, blocks)


def predict(target: str, work: Work, compiled: Sequence[aot.Row]) -> Row:
    """Of several compilations with the same blocks the one with most registers counts.

    Raises:
        LookupError: benchmarks.aot has compiled none with these blocks.
    """
    wanted = (target, work.op, "bfloat16", work.blocks)
    found = [r for r in compiled if (r.target, r.op, r.dtype, r.blocks) == wanted]
    if not found:
        raise LookupError(f"{' '.join(wanted)} is not in {aot.TABLE.name}: run benchmarks.aot")
    registers = max(row.registers for row in found)
    shared = max(row.shared_bytes for row in found)
    arch, warps = ARCHS[target], found[0].warps
    held = resident(arch, registers, shared, warps)
    kind = MULTIPLIED_AS.get(work.kind, work.kind)
    bound, least = roofline(work.bytes, work.operations, arch.gb_s, arch.matrix[kind])
    return Row(
        target, work.op, work.case, work.kind, work.bytes, work.operations, bound,
        float(f"{least:.4g}"), work.programs,
        float(f"{work.programs / (held * PROCESSORS[target]):.3g}"),
        float(f"{held * warps / arch.warps:.3g}"), registers, shared,
    )  # fmt: skip


def predictions(compiled: Sequence[aot.Row]) -> list[Row]:
    """All targets; a kind whose peak is not known has none."""
    rows = []
    for target, arch in ARCHS.items():
        for work in (*products(target), *others(target, compiled)):
            if MULTIPLIED_AS.get(work.kind, work.kind) in arch.matrix:
                rows.append(predict(target, work, compiled))
    return rows


HEAD = """# What the kernels should cost: predictions

Made by `python -m benchmarks.costs`; do not edit. **Every number in the tables by GPU is a
prediction, none was measured.** The time is the least that the roofline allows: operands cross the
memory bus once at the data sheet's rate, or the matrix unit is never idle; real ones take longer.
Programs, waves and occupancy come from the grid and from the registers and shared memory of the
compiled code (`benchmarks/results/aot.csv`); tensor memory of sm_100 and 110 is not counted. All
rows, the 8B's too, are in `benchmarks/results/costs.csv`. float16 stands for bfloat16; int4 is
multiplied in int8, and above 64 rows it is int8; int4_float, its weights by rows of 16 bits, is
multiplied in those. A causal product counts the visible pairs only.

## Measured by others

Theirs, on their code, at their shapes; none of it is a figure of qvlfast.

| what | whose | figure |
|---|---|---|
| FP8 product, scales by row, with quantising, H100 | FBGEMM, pull request 2766 | 1102 TFLOP/s |
| the same product in bf16, cuBLAS, H100 | FBGEMM, pull request 2766 | 755 TFLOP/s |
| attention in Triton | published comparisons | 60–77% of FlashAttention-3 |
| prefill of 79 tokens in FP8, the 2B, RTX 4090 | FlashRT | 6.6 ms |
| a picture of 3888 patches, the 2B, Orin 32 GB | FlashRT | 504 ms |

## Peaks

Dense, in TFLOP/s or TOP/s; – is not derived, or not there. The sources were not opened again when
this was written: look a figure up before quoting it.

| target | GPU | GB/s | 16 bits | int8 | FP8 | source |
|---|---|---|---|---|---|---|
"""


def shown(row: Row) -> bool:
    """The page has the 2B's widest linears and what is no linear; the CSV has the rest."""
    return row.case.startswith("2b") and not row.case.startswith(("2b q ", "2b o "))


def render(rows: Sequence[Row]) -> str:
    """The page of the predictions."""
    text = HEAD
    for target, arch in ARCHS.items():
        peaks = " | ".join(f"{arch.matrix.get(k, '–')}" for k in ("float16", "int8", "fp8"))
        text += f"| {target} | {arch.name} | {arch.gb_s} | {peaks} | {arch.source} |\n"
    for target, arch in ARCHS.items():
        text += f"\n## Predicted for {target}, {arch.name}\n\n"
        names = ["op", "case", "kind", "MB", "GFLOP", "bound", "least µs"]
        names += ["programs", "waves", "occupancy"]
        text += f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n"
        for row in rows:
            if row.target == target and shown(row):
                text += (
                    f"| {row.op} | {row.case} | {row.kind} | {row.bytes / 1e6:.1f} "
                    f"| {row.operations / 1e9:.2f} | {row.bound} | {row.bound_us:.1f} "
                    f"| {row.programs} | {row.waves:.2f} | {row.occupancy:.0%} |\n"
                )
    return text


def read_table() -> list[Row]:
    types = {"int": int, "float": float, "str": str}
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{f.name: types[str(f.type)](line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]


def main() -> None:
    rows = predictions(aot.read_table())
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    PAGE.write_text(render(read_table()), encoding="utf-8")
    print(f"{len(rows)} predictions in {TABLE.name} and {PAGE.name}")


if __name__ == "__main__":
    main()
