"""The CPU kernels one by one, against torch and against the processor's limits.

    python -m benchmarks.cpu_ops [--only gemm] [--quick]

Rounds alternate between ours and torch's; limits are measured right after each case
(benchmarks.limits).
Products of few rows get weights that are in no cache: several copies take turns. ``error`` is the
rms distance to float64 on the same operands, relative to the rms of the result; of products on
some rows and columns. Most of it is the rounding of the result to bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qvlfast import _C
from qvlfast.backends.native import NativeOps
from qvlfast.ops import Forest, Linear, Ops, QuantisedRows, Rows

from .limits import measure
from .records import RESULTS, SETTLE, append, here

# (N, K) of the linears, by model and name.
SHAPES = {
    "2B q, o": (2048, 2048),
    "2B gate_up": (12288, 2048),
    "2B down": (2048, 6144),
    "2B vision qkv": (3072, 1024),
    "2B vision fc1": (4096, 1024),
    "2B vision fc2": (1024, 4096),
    "8B q, o": (4096, 4096),
    "8B gate_up": (24576, 4096),
    "8B down": (4096, 12288),
    "8B vision qkv": (3456, 1152),
    "8B vision fc1": (4304, 1152),
    "8B vision fc2": (1152, 4304),
}
ROWS = (1, 16, 512)
FEW_ROWS = 16
# Copies of a weight take more together than a last-level cache holds.
_COLD_BYTES = 160 << 20
_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times are medians in microseconds; ``share`` is ``rate`` by ``limit``;
    ``ratio`` is the peer's time by ours, of the same round."""

    op: str
    case: str
    rows: int
    format: str
    ours_us: float
    rate: float
    unit: str
    limit: float
    share: float
    peer: str
    peer_us: float
    ratio: float
    error: float
    rounds: int
    isa: str
    threads: int
    machine: str
    torch: str
    commit: str


@dataclass(frozen=True)
class Timed:
    ours: float
    peer: float
    ratio: float


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> Timed:
    """Medians in seconds; calls of a millisecond are repeated within a round."""
    ours(), peer()

    def times(work: Callable[[], object], repeats: int) -> float:
        time.sleep(SETTLE)
        work()
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - begun) / repeats

    repeats = [max(1, round(0.05 / max(times(work, 1), 1e-6))) for work in (ours, peer)]
    pairs = [(times(ours, repeats[0]), times(peer, repeats[1])) for _ in range(rounds)]
    return Timed(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def relative_error(got: Tensor, exact: Tensor) -> float:
    difference = (got.double() - exact).square().mean().sqrt()
    return float(difference / exact.square().mean().sqrt())


class Bench:
    """What all cases of a run share."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def row(
        self,
        op: str,
        case: str,
        count: int,
        form: str,
        timed: Timed,
        work: tuple[float, str],
        peer: str,
        error: float,
    ) -> Row:
        """A line; ``work`` is how much was done and in which unit, flop or byte."""
        amount, unit = work
        limits = measure()  # right after the case, since the machine's speed drifts
        limit = limits.read if unit == "GB/s" else limits.flops[form]
        rate = amount / timed.ours
        made = Row(
            op=op,
            case=case,
            rows=count,
            format=form,
            ours_us=round(timed.ours * 1e6, 1),
            rate=round(rate / 1e9, 1),
            unit=unit,
            limit=round(limit / 1e9, 1),
            share=round(rate / limit, 3),
            peer=peer,
            peer_us=round(timed.peer * 1e6, 1),
            ratio=round(timed.ratio, 2),
            error=float(f"{error:.2e}"),
            rounds=self.rounds,
            **here(),
        )
        print(
            f"{op:14} {case:22} M={count:<5} {form:5} {made.ours_us:>10} µs {made.rate:>8} {unit} "
            f"{100 * made.share:5.1f} % of the limit  {made.ratio:6.2f} × torch  "
            f"error {made.error:.1e}",
            flush=True,
        )
        return made


def gemm_rows(bench: Bench, names: Sequence[str], row_counts: Sequence[int]) -> Iterator[Row]:
    """Linears of the models in every format."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        n, k = SHAPES[name]
        weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
        for form, size in _BYTES.items():
            copies = max(1, round(_COLD_BYTES / (n * k * size)))
            packed = NativeOps.prepare([weight], form=None if form == "bf16" else form)
            others = [
                NativeOps.prepare([weight], form=None if form == "bf16" else form)
                for _ in range(min(copies, 24) - 1)
            ]
            peers = [weight, *(weight.clone() for _ in range(round(_COLD_BYTES / (2 * n * k))))]
            for count in row_counts:
                x = torch.randn(count, k, generator=generator).bfloat16()
                yield _gemm_row(bench, name, x, form, [packed, *others], peers)


def _gemm_row(
    bench: Bench, name: str, x: Tensor, form: str, layers: list[Linear], peers: list[Tensor]
) -> Row:
    n, k = SHAPES[name]
    rows: Rows = x
    if form != "bf16":
        values = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty(len(x))
        _C.quantise_rows(x, values, scale)
        rows = QuantisedRows(values, scale, x.dtype)
    cold = len(x) <= FEW_ROWS
    ours = cycle(layers if cold else layers[:1])
    theirs = cycle(peers if cold else peers[:1])
    timed = alternate(
        lambda: NativeOps.linear(rows, next(ours)),
        lambda: F.linear(x, next(theirs)),
        bench.rounds,
    )
    some = np.random.default_rng(0).choice(n, min(n, 96), replace=False)
    wide = torch.empty(n, k)
    _C.unpack(layers[0].weight, wide)
    picked = torch.from_numpy(some)
    left = rows.values.double() * rows.scale[:, None] if isinstance(rows, QuantisedRows) else x
    exact = left[:16].double() @ wide[picked].double().T
    error = relative_error(NativeOps.linear(rows, layers[0])[:16, picked], exact)
    unit = "GB/s" if cold else "Gop/s"
    work = layers[0].weight.nbytes if cold else 2.0 * len(x) * n * k
    limit_form = "int8" if form == "int4" and not cold else form
    made = bench.row("gemm", name, len(x), limit_form, timed, (work, unit), "torch bf16", error)
    return Row(**{**vars(made), "format": form})


ATTENTION = {
    "vision 4096 x 64": (4096, 16, 16, 64, False),
    "vision 1024 x 72": (1024, 16, 16, 72, False),
    "decoder 2048 x 128": (2048, 16, 8, 128, True),
    "decoder 512 x 128": (512, 16, 8, 128, True),
}


def attention_row(bench: Bench, name: str) -> Row:
    """One sequence, in bfloat16."""
    length, heads, key_heads, dim, causal = ATTENTION[name]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(length, h, dim, generator=generator).bfloat16()
        for h in (heads, key_heads, key_heads)
    )
    forest, scale = Forest.plain([length]), dim**-0.5
    q_heads, k_heads, v_heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    timed = alternate(
        lambda: NativeOps.attention(q, k, v, forest, causal=causal, scale=scale),
        lambda: F.scaled_dot_product_attention(
            q_heads, k_heads, v_heads, is_causal=causal, scale=scale, enable_gqa=True
        ),
        bench.rounds,
    )
    exact = Ops.attention(q.float(), k.float(), v.float(), forest, causal=causal, scale=scale)
    got = NativeOps.attention(q, k, v, forest, causal=causal, scale=scale)
    work = (4.0 * length * length * heads * dim / (2 if causal else 1), "Gop/s")
    error = relative_error(got, exact.double())
    return bench.row("attention", name, length, "bf16", timed, work, "torch sdpa", error)


def rowwise_rows(bench: Bench) -> Iterator[Row]:
    """Norms, ropes and rounding, which memory or the caches bound."""
    tokens, hidden = 4096, 2048
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weight, bias = (torch.randn(hidden, generator=generator).bfloat16() for _ in range(2))
    heads = x.view(tokens, 16, 128)
    angle = torch.rand(tokens, 64, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    eps = 1e-6

    def row(name: str, ours: Callable[[], Any], peer: Callable[[], Any], exact: Any) -> Row:
        error = relative_error(ours(), exact.double())  # the first answer, of what is in place
        timed = alternate(ours, peer, bench.rounds)
        shape, work = f"{tokens} x {hidden}", (2.0 * x.nbytes, "GB/s")
        return bench.row(name, shape, tokens, "bf16", timed, work, "torch", error)

    yield row(
        "rms_norm",
        lambda: NativeOps.rms_norm(x, weight, eps),
        lambda: F.rms_norm(x, (hidden,), weight, eps),
        Ops.rms_norm(x.float(), weight.float(), eps),
    )
    yield row(
        "layer_norm",
        lambda: NativeOps.layer_norm(x, weight, bias, eps),
        lambda: F.layer_norm(x, (hidden,), weight, bias, eps),
        Ops.layer_norm(x.float(), weight.float(), bias.float(), eps),
    )
    head = weight[:128]
    exact = heads.float()
    Ops.norm_rope(exact, head.float(), cos, sin, eps)

    def rotate(ops: type[Ops]) -> Callable[[], Tensor]:
        rotated = heads.clone()

        def run() -> Tensor:
            ops.norm_rope(rotated, head, cos, sin, eps)
            return rotated

        return run

    yield row("norm_rope", rotate(NativeOps), rotate(Ops), exact)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="ops whose name holds this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one shape of each, three rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_ops.csv")
    options = parser.parse_args(arguments)
    bench = Bench(3 if options.quick else options.rounds)
    names, row_counts, attended = list(SHAPES), list(ROWS), list(ATTENTION)
    if options.quick:
        names, row_counts, attended = ["2B vision fc2"], [1, 48], ["decoder 512 x 128"]
    with torch.inference_mode():
        rows = []
        if options.only in "gemm":
            rows += list(gemm_rows(bench, names, row_counts))
        if options.only in "attention":
            rows += [attention_row(bench, name) for name in attended]
        if options.only in "rowwise":
            rows += list(rowwise_rows(bench))
    append(rows, options.out)


if __name__ == "__main__":
    main()
