"""What it would be worth to run vision and text side by side: ``python -m benchmarks.stages``.

On a CPU both stages want all cores, so the engine takes one after the other. Here two processes
time them both ways: each with all cores while the other waits, and both at once, each bound to half
of the cores. Texts are timed by their time in the decoder, pictures by that in the tower; rounds
alternate. The last line is how much more both do in the same time side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import write_checkpoint
from qvlfast import _C, Embedder

from .records import RESULTS, SETTLE, append, here
from .scheduler import picture, words

KINDS = ("text", "vision")


@dataclass(frozen=True)
class Row:
    """One line of the CSV: medians of seconds for a call with all cores, and with half of them
    beside the other stage. ``ratio`` is their quotient, which for ``both`` is the sum: above 1,
    side by side is that much faster."""

    stage: str
    in_turn: float
    side_by_side: float
    ratio: float
    rounds: int
    shape: str
    weights: str
    threads: int
    isa: str
    machine: str
    torch: str
    commit: str


def serve(
    pipe: Connection, kind: str, cores: set[int], folder: Path, options: argparse.Namespace
) -> None:
    """Answer each number of seconds with the times of the calls that began within them."""
    os.sched_setaffinity(0, cores)  # before the threads start
    _C.set_num_threads(len(cores))
    torch.set_num_threads(len(cores))
    items: list[Any] = [words(60, i) for i in range(16)]
    if kind == "vision":
        items = [{"image": picture(options.side, 0)}]
    with Embedder.from_pretrained(
        folder,
        device="cpu",
        dtype=options.dtype,
        quantization=options.quantization,
        cache_bytes=0,
        vision_cache_bytes=0,
    ) as embedder:
        embedder.encode(items)
        pipe.send([])
        while (seconds := pipe.recv()) is not None:
            times: list[float] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                before = embedder.metrics().stage_seconds[kind]
                embedder.encode(items)
                times.append(embedder.metrics().stage_seconds[kind] - before)
            pipe.send(times)


def measure(folder: Path, options: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Seconds of calls, by stage and ``alone`` or ``beside``."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    places = {
        ("text", "alone"): set(cores),
        ("vision", "alone"): set(cores),
        ("text", "beside"): set(cores[:half]),
        ("vision", "beside"): set(cores[half : 2 * half]),
    }
    found: dict[tuple[str, str], list[float]] = {place: [] for place in places}
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = {}
        for (kind, how), own in places.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, kind, own, folder, options))
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            ours.recv()
            pipes[kind, how] = ours
        for _ in range(options.rounds):
            together = [("text", "beside"), ("vision", "beside")]
            for asked in ([("text", "alone")], [("vision", "alone")], together):
                time.sleep(SETTLE)
                for place in asked:
                    pipes[place].send(options.seconds)
                for place in asked:
                    # The last call of the one that goes on longer has the machine to itself.
                    times = pipes[place].recv()
                    found[place] += times[:-1] if place in together and len(times) > 1 else times
    return found


def rows(found: dict[tuple[str, str], list[float]], options: argparse.Namespace) -> list[Row]:
    made, total = [], 0.0
    for kind in (*KINDS, "both"):
        alone, beside, ratio = 0.0, 0.0, total
        if kind != "both":
            alone, beside = (statistics.median(found[kind, how]) for how in ("alone", "beside"))
            ratio = alone / beside
            total += ratio
        made.append(
            Row(
                stage=kind,
                in_turn=round(alone, 4),
                side_by_side=round(beside, 4),
                ratio=round(ratio, 3),
                rounds=options.rounds,
                shape=options.shape if options.model is None else options.model.name,
                weights=options.quantization or options.dtype,
                **here(),
            )
        )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="2b", help="random weights of this shape")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--seconds", type=float, default=15, help="of calls in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "stages.csv")
    options = parser.parse_args(arguments)
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("one core: there is nothing to share out")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            folder = write_checkpoint(Path(scratch) / "model", options.shape, dtype="bfloat16")
        found = rows(measure(folder, options), options)
    append(found, options.out)
    for row in found:
        seconds = f"{row.in_turn} s, beside the other {row.side_by_side} s: " * (row.stage in KINDS)
        print(f"{row.stage}: {seconds}{row.ratio} ×")


if __name__ == "__main__":
    main()
