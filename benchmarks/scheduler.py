"""What the scheduler saves, and what it costs: ``python -m benchmarks.scheduler``.

One model, random weights unless ``--model`` names a checkpoint, behind two engines: one with
everything shared and cached, one without. Rounds alternate between the two, and the medians of a
case and of its ratios are kept, because machines are shared and their speed drifts. Times are those
of whole calls, preprocessing included; caches are empty at the start of each, except in the cases
called "again": there the query is known, and each call has a document of its own, because answers
are kept, too. ``interactive`` and ``queue`` measure the scheduler alone, see there.
``--peer transformers`` adds the official recipe for reranking, see benchmarks.pairwise: it is slow.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.checkpoints import write_checkpoint
from qvlfast import _C, Embedder, Reranker
from qvlfast.cost import Budget, Cost, Rates
from qvlfast.engine import Engine
from qvlfast.model import Model
from qvlfast.runner import Runner, Sharing
from qvlfast.runtime import Runtime
from qvlfast.scheduler import Scheduler

from .cpu import plan_of
from .pairwise import Recipe
from .records import RESULTS, append, here

ON, OFF = Sharing(True, 512 << 20, 256 << 20), Sharing(False, 0, 0)
PICTURED = "rerank, picture query, 20 x 100"
WORDS = ["river", "stone", "light", "green", "cloud", "paper", "house", "road", "field", "glass"]


@dataclass(frozen=True)
class Row:
    """One line of the CSV: medians with sharing and without, and of their ratio, without over with
    (of ``interactive``, ``queue`` and the recipe see :func:`interactive`, :func:`queue`,
    :func:`against`)."""

    case: str
    unit: str
    on: float
    off: float
    ratio: float
    tokens_on: int
    tokens_off: int
    rounds: int
    shape: str
    weights: str
    threads: int
    isa: str
    machine: str
    torch: str
    commit: str


@dataclass(frozen=True)
class Pair:
    """Both classes around one model, with an engine of their own."""

    embedder: Embedder
    reranker: Reranker

    def forget(self) -> None:
        for one in (self.embedder, self.reranker):
            one._runtime.served.runner.forget()

    def computed(self) -> int:
        return sum(m.metrics().tokens_computed for m in (self.embedder, self.reranker))


def pair(loaded: Reranker, sharing: Sharing, stack: ExitStack) -> Pair:
    """The loaded model once more, without its weights being there twice."""
    runtime = loaded._runtime
    scorer = runtime.model
    pooler = Model(scorer.config, replace(scorer.weights, answer_rows=None), scorer.ops)
    engine = Engine()

    def around(model: Model) -> Runtime:
        runner = Runner(model, torch.device("cpu"), sharing)
        served = engine.serve(runner, Budget(work=2.0 * Budget().tokens))
        stack.callback(engine.close, served)
        return Runtime(runtime.config, runtime.prompter, engine, served, runtime.options)

    return Pair(Embedder(around(pooler)), Reranker(around(scorer)))


def words(tokens: int, seed: int) -> str:
    """A text of so many tokens: each word is one."""
    return " " + " ".join(np.random.default_rng(seed).choice(WORDS, tokens))


def text(loaded: Reranker, tokens: int, seed: int) -> str:
    """:func:`words`, and a look at whether the tokenizer agrees."""
    made = words(tokens, seed)
    length, empty = (len(loaded._prepare_pair(("q", d), None).ids) for d in (made, ""))
    assert length - empty == tokens
    return made


def picture(side: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pictured(loaded: Reranker, side: int) -> tuple[dict[str, Any], list[str]]:
    """A query with a picture, and 20 documents of 100 tokens."""
    query = {"text": "which of these", "image": picture(side, 0)}
    return query, [text(loaded, 100, i) for i in range(20)]


def cases(loaded: Reranker, side: int) -> dict[str, Callable[[Pair], Any]]:
    """Whole calls, by name. ``side`` is that of the query's picture."""
    query, short = pictured(loaded, side)
    long = [text(loaded, 150, i) for i in range(50)]
    question = text(loaded, 60, 99)
    texts = [text(loaded, 12, i) for i in range(64)]
    tasks = ["Retrieve", "Classify this", "Find texts that say the same", "Name the topic of this"]
    mixed = [{"text": t, "instruction": tasks[i % 4]} for i, t in enumerate(texts)]
    twice = [{"image": picture(side // 2, i % 8)} for i in range(16)]
    seeds = count(1000)

    def one_by_one(p: Pair) -> None:
        for item in twice:
            p.embedder.encode(item)

    return {
        PICTURED: lambda p: p.reranker.rank(query, short),
        "rerank, text query 60, 50 x 150": lambda p: p.reranker.rank(question, long),
        "64 x 12 tokens, one instruction": lambda p: p.embedder.encode(texts),
        "64 x 12 tokens, 4 instructions": lambda p: p.embedder.encode(mixed),
        "16 pictures, half repeated, one call": lambda p: p.embedder.encode(twice),
        "16 pictures, half repeated, a call each": one_by_one,
        "rerank, picture query, 1 x 100, again": lambda p: p.reranker.rank(
            query, [words(100, next(seeds))]
        ),
    }


def measure(
    work: Callable[[Pair], Any], on: Pair, off: Pair, seconds: float, warm: bool
) -> tuple[list[tuple[float, float]], int, int]:
    """Times of rounds, as many as fit, and the tokens that each computes in one."""
    times: list[tuple[float, float]] = []
    tokens = [0, 0]
    if warm:
        work(on)
        work(on)
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() + sum(times[-1]) < end:
        took = []
        for i, side in enumerate((on, off) if len(times) % 2 else (off, on)):
            which = i if len(times) % 2 else 1 - i
            if not warm:
                side.forget()
            before = side.computed()
            start = time.perf_counter()
            work(side)
            took.append((which, time.perf_counter() - start))
            tokens[which] = side.computed() - before
        times.append((dict(took)[0], dict(took)[1]))
    return times, tokens[0], tokens[1]


def against(
    recipe: Recipe, on: Pair, query: dict[str, Any], documents: list[str], seconds: float
) -> tuple[list[tuple[float, float]], int, int]:
    """:func:`measure`, against the recipe in place of sharing off: of its pairs, each the same
    work, one is timed and counted as often as there are documents."""
    prompt = on.reranker._prepare_pair((query, documents[0]), None)
    inputs = recipe.inputs(prompt)
    theirs, ours = recipe.score(inputs), on.reranker.predict((query, documents[0]))
    print(f"scores of one pair: {ours:.4f}, recipe {theirs:.4f}", flush=True)
    times: list[tuple[float, float]] = []
    end, computed = time.perf_counter() + seconds, 0
    while not times or time.perf_counter() < end:
        on.forget()
        before, start = on.computed(), time.perf_counter()
        on.reranker.rank(query, documents)
        middle = time.perf_counter()
        recipe.score(inputs)
        times.append((middle - start, len(documents) * (time.perf_counter() - middle)))
        computed = on.computed() - before
    return times, computed, len(documents) * len(prompt.ids)


def queue() -> Iterator[tuple[str, str, float, float]]:
    """Microseconds of the scheduler for a request, in and out: with 10,000 and, as ``off``, with
    1,000,000 waiting. No engine, no model."""
    found = []
    for waiting in (10_000, 1_000_000):
        scheduler: Scheduler[int] = Scheduler()
        lane = scheduler.add_lane(Budget(), Rates(1e-4, 0.2, 3e-5))
        ladder = (8, 12, 18, 27, 40, 60)
        costs = [Cost(60 + i, (), tuple((hash((i, n)), n) for n in ladder)) for i in range(50)]
        start = time.perf_counter()
        for i in range(waiting):
            lane.admit()
            scheduler.push(lane, i, costs[i % 50], 0.0, level=i % 3, client=i % 20, deadline=1e9)
        while (batch := scheduler.pop(1.0)) is not None:
            scheduler.finished(batch, 1.0, 0.1)
        found.append(1e6 * (time.perf_counter() - start) / waiting)
    yield "queue, 10,000 and 1,000,000 waiting", "us a request", found[0], found[1]


def interactive(
    loaded: Reranker, on: Pair, requests: int
) -> Iterator[tuple[str, str, float, float]]:
    """Single texts that come at random, at 40% of what the model can do, beside a bulk job. Each
    is another one, or it would be answered from the cache.

    ``on`` is the 99th percentile of their times with the bulk job and ``off`` without it, in
    seconds, so that the ratio is below 1. Then the tokens a second of the bulk job beside them, and
    as ``off`` alone, times the part of the time that they leave.
    """
    first, *warm = (text(loaded, 12, 1000 + i) for i in range(11))
    quiet, busy = (
        [text(loaded, 12, seed + i) for i in range(requests)] for seed in (1 << 20, 1 << 21)
    )
    on.embedder.encode(first)
    alone = []
    for short in warm:
        start = time.perf_counter()
        on.embedder.encode(short)
        alone.append(time.perf_counter() - start)
    gaps = np.random.default_rng(0).exponential(statistics.median(alone) / 0.4, requests)

    def trace(texts: Sequence[str]) -> float:
        times: list[float] = []

        def ask(short: str) -> None:
            start = time.perf_counter()
            on.embedder.encode(short, priority="interactive")
            times.append(time.perf_counter() - start)

        threads = []
        for gap, short in zip(gaps, texts, strict=True):
            time.sleep(gap)
            threads.append(threading.Thread(target=ask, args=(short,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return float(np.percentile(times, 99))

    before = on.computed()
    without = trace(quiet)
    own = (on.computed() - before) / float(gaps.sum())
    ended = threading.Event()
    endless = (text(loaded, 100, i) for i in count())

    def bulk() -> None:
        for _ in on.embedder.encode_iter(
            endless, batch_tokens=768, priority="bulk", vision_cache=False
        ):
            if ended.is_set():
                return

    def rate(work: Callable[[], Any]) -> float:
        before, start = on.computed(), time.perf_counter()
        work()
        return (on.computed() - before) / (time.perf_counter() - start)

    thread = threading.Thread(target=bulk)
    thread.start()
    time.sleep(2 * sum(alone))
    bulk_alone = rate(lambda: time.sleep(max(5.0, float(gaps.sum()))))
    beside: list[float] = []
    both = rate(lambda: beside.append(trace(busy)))
    ended.set()
    thread.join()
    yield "interactive, p99 beside a bulk job", "s", beside[0], without
    yield "bulk job beside interactive", "tokens/s", both - own, 0.6 * bulk_alone


def run(options: argparse.Namespace, folder: Path) -> None:
    """Every case that was asked for; each is written as soon as it is there."""

    def add(case: str, unit: str, on: float, off: float, **more: Any) -> None:
        values = {"ratio": off / on, "tokens_on": 0, "tokens_off": 0, "rounds": 1, **more}
        values["ratio"] = round(values["ratio"], 3)
        row = Row(
            case=case,
            unit=unit,
            on=float(f"{on:.4g}"),
            off=float(f"{off:.4g}"),
            shape=options.shape if options.model is None else options.model.name,
            weights=options.quantization or options.dtype,
            **here(),
            **values,
        )
        append([row], options.out)
        print(f"{case}: {row.on} {unit}, without {row.off}: {row.ratio} x", flush=True)

    def add_rounds(name: str, found: tuple[list[tuple[float, float]], int, int]) -> None:
        times, with_, without = found
        add(
            name,
            "s",
            statistics.median(a for a, _ in times),
            statistics.median(b for _, b in times),
            ratio=statistics.median(b / a for a, b in times),
            tokens_on=with_,
            tokens_off=without,
            rounds=len(times),
        )

    if options.only in "queue":
        for case in queue():
            add(*case)
    with ExitStack() as stack:
        loaded = stack.enter_context(
            Reranker.from_pretrained(
                folder,
                device="cpu",
                dtype=options.dtype,
                quantization=plan_of(options.quantization or "none"),
            )
        )
        on, off = pair(loaded, ON, stack), pair(loaded, OFF, stack)
        off.embedder.encode("warm up")
        for name, work in cases(loaded, options.side).items():
            if options.only not in name:
                continue
            add_rounds(name, measure(work, on, off, options.seconds, "again" in name))
        if options.peer is not None and options.only in PICTURED:
            recipe = Recipe(folder, getattr(torch, options.dtype))
            found = against(recipe, on, *pictured(loaded, options.side), options.seconds)
            add_rounds(f"{PICTURED}, against {recipe.name}, one pair timed x 20", found)
        if options.only in "interactive":
            for case in interactive(loaded, on, options.requests):
                add(*case)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="2b", help="random weights of this shape")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--quantization", choices=["int8", "int4", "int8+vision", "int4+vision"])
    parser.add_argument("--side", type=int, default=1024, help="of the query's picture, in pixels")
    parser.add_argument("--seconds", type=float, default=30, help="of rounds for a case")
    parser.add_argument("--peer", choices=["transformers"], help="its recipe for reranking too")
    parser.add_argument("--requests", type=int, default=150, help="of the interactive trace")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS / "scheduler.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(_C.num_threads())
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            folder = write_checkpoint(Path(scratch) / "model", options.shape, dtype="bfloat16")
        run(options, folder)


if __name__ == "__main__":
    main()
