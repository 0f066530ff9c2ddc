"""How well an embedder and a reranker find emoji by words: ``python -m benchmarks.quality``.

Everything runs through this package. The gallery is every emoji that ships with it, drawn once at
a size, place and background that training never saw; the queries are committed, in three groups:

- ``seen``: names and keywords from training, so that only the pictures are new;
- ``unseen``: keywords that training never saw, of words that it saw in others;
- ``pairs``: names of emoji in a language of which training saw no word for that emoji.

A query is answered where a picture of any emoji that its language calls so comes first (recall@1)
or among the first ten (recall@10); MRR is the mean of one over its place. Intervals are 95%
bootstrap over queries. Then the first 20 pictures of each query are reranked; the last lines are
what that gains, with intervals of the difference for the same queries.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.records import commit, machine
from qvlfast import Embedder, Reranker
from qvlfast.gallery import EMBEDDER, RERANKER, load_gallery
from qvlfast.vectors import VECTOR_TYPES, VectorType, convert, cut, similarity

from .emoji_data import EVALUATION, Wording, read_evaluation, render

RESULTS = Path(__file__).parent / "results" / "quality.csv"
RENDERING_SEED = 77_000_017
CANVASES = (56, 112)
TOP = 20
RESAMPLES = 2000

Ranks = NDArray[np.int64]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One line of the CSV; ``low`` and ``high`` bound the value before them."""

    group: str
    stage: str
    queries: int
    gallery: int
    dimensions: int
    output: str
    recall_at_1: float
    recall_at_1_low: float
    recall_at_1_high: float
    recall_at_10: float
    recall_at_10_low: float
    recall_at_10_high: float
    mrr: float
    mrr_low: float
    mrr_high: float
    dtype: str
    machine: str
    commit: str


def recall(ranks: Ranks, k: int) -> NDArray[np.float64]:
    """1 for each query whose answer is among the first ``k``, else 0; ``ranks`` count from 1."""
    return (ranks <= k).astype(np.float64)


def reciprocal(ranks: Ranks) -> NDArray[np.float64]:
    """1 / rank of each query; their mean is the MRR."""
    return 1.0 / ranks


def interval(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """The mean, and the bounds of its 95% bootstrap interval over the queries."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def rank_of_answers(scores: NDArray[np.float32], wordings: Sequence[Wording]) -> Ranks:
    """The place, from 1, of the best answer of each query.

    A candidate with the same score as the best answer comes before it, so that a model that
    scores everything alike does not look perfect.

    Args:
        scores: ``[Q, N]``, higher is better.
    """
    ranks = np.empty(len(wordings), np.int64)
    for i, (row, wording) in enumerate(zip(scores, wordings, strict=True)):
        answers = list(wording.targets)
        others = np.delete(row, answers)
        ranks[i] = 1 + np.count_nonzero(others >= row[answers].max())
    return ranks


def rerank(
    reranker: Reranker,
    pictures: Sequence[Image.Image],
    scores: NDArray[np.float32],
    wordings: Sequence[Wording],
) -> Ranks:
    """The places after the embedder's first :data:`TOP` pictures of each query are rescored.

    Args:
        scores: ``[Q, N]`` of the embedder.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    pairs = [
        (wording.text, {"image": pictures[i]})
        for wording, top in zip(wordings, order.tolist(), strict=True)
        for i in top
    ]
    judged = reranker.predict(pairs, show_progress=False).reshape(order.shape)
    # What was not rescored stays behind what was, in its old order.
    rescored = scores.astype(np.float64) - 1e3
    np.put_along_axis(rescored, order, judged, axis=1)
    return rank_of_answers(rescored.astype(np.float64), wordings)


def draw_gallery(seed: int = RENDERING_SEED) -> list[Image.Image]:
    """One RGB picture of every emoji, 56 to 112 pixels wide and high."""
    rng = random.Random(seed)
    return [render(emoji.sprite, rng.randint(*CANVASES), rng) for emoji in load_gallery()]


def make_row(ranks: Ranks, settings: Mapping[str, Any], before: Ranks | None = None) -> Row:
    """Scores of one group of queries; where ``before`` is given, how much they are above its."""
    scores: dict[str, Any] = {}
    measures: dict[str, Callable[[Ranks], NDArray[np.float64]]] = {
        "recall_at_1": lambda ranks: recall(ranks, 1),
        "recall_at_10": lambda ranks: recall(ranks, 10),
        "mrr": reciprocal,
    }
    for name, measure in measures.items():
        values = measure(ranks) if before is None else measure(ranks) - measure(before)
        names = (name, f"{name}_low", f"{name}_high")
        scores |= dict(zip(names, (round(v, 4) for v in interval(values)), strict=True))
    return Row(queries=len(ranks), machine=machine(), commit=commit(), **scores, **settings)


def evaluate(
    embedder: Embedder,
    reranker: Reranker | None,
    groups: Mapping[str, Sequence[Wording]],
    dimensions: Sequence[int],
    outputs: Sequence[VectorType],
    rerank_queries: int | None,
    dtype: str,
) -> list[Row]:
    """Score every group at every length and type of the vectors; print each row as it comes."""
    pictures = draw_gallery()
    start = time.perf_counter()
    documents = embedder.encode([{"image": p} for p in pictures], show_progress=False)
    found = {
        group: embedder.encode([w.text for w in wordings], show_progress=False)
        for group, wordings in groups.items()
    }
    count = len(pictures) + sum(map(len, found.values()))
    seconds = time.perf_counter() - start
    print(f"{count} inputs in {seconds:.1f} s, {count / seconds:.0f} a second", flush=True)

    rows: list[Row] = []

    def add(
        ranks: Ranks, group: str, stage: str, size: int, output: str, before: Ranks | None = None
    ) -> None:
        settings: dict[str, Any] = {
            "group": group,
            "stage": stage,
            "dimensions": size,
            "output": output,
        }
        settings |= {"gallery": len(pictures), "dtype": dtype}
        rows.append(make_row(ranks, settings, before))
        print(describe(rows[-1]), flush=True)

    for size in dimensions:
        for output in outputs:
            stored = convert(cut(documents, size, normalize=True), output)[0]
            for group, wordings in groups.items():
                queries = convert(cut(found[group], size, normalize=True), output)[0]
                scores = similarity(queries, stored, output)
                add(rank_of_answers(scores, wordings), group, "embedder", size, output)
    if reranker is None:
        return rows
    for group, wordings in groups.items():
        chosen = wordings[:rerank_queries]
        scores = similarity(found[group][: len(chosen)], documents)
        size = embedder.dimensions
        before = rank_of_answers(scores, chosen)
        start = time.perf_counter()
        after = rerank(reranker, pictures, scores, chosen)
        seconds = time.perf_counter() - start
        print(f"{TOP * len(chosen)} pairs in {seconds:.1f} s", flush=True)
        add(before, group, "before reranking", size, "float32")
        add(after, group, f"top {TOP} reranked", size, "float32")
        add(after, group, "gain", size, "float32", before)
    return rows


def describe(row: Row) -> str:
    """A row for the terminal."""
    parts = [f"{row.group:7} {row.stage:16} {row.dimensions:4} {row.output:8} n={row.queries:<5}"]
    for name in ("recall_at_1", "recall_at_10", "mrr"):
        value, low, high = (getattr(row, name + end) for end in ("", "_low", "_high"))
        parts.append(f"{name} {value:.3f} [{low:.3f}, {high:.3f}]")
    return "  ".join(parts)


def write(rows: Sequence[Row], path: Path) -> None:
    """Replace the file with these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", type=Path, default=EMBEDDER)
    parser.add_argument("--reranker", type=Path, default=RERANKER)
    parser.add_argument("--embedder-only", action="store_true", help="rerank nothing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of both models")
    parser.add_argument(
        "--dimensions", type=int, nargs="+", help="lengths; the whole, a third and a sixth"
    )
    parser.add_argument(
        "--output", choices=VECTOR_TYPES, nargs="+", default=["float32", "int8", "binary"]
    )
    parser.add_argument("--queries", type=int, help="at most so many of each group")
    parser.add_argument(
        "--rerank-queries", type=int, help="at most so many of each group are reranked"
    )
    parser.add_argument("--data", type=Path, default=EVALUATION, help="the queries")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where the scores go")
    options = parser.parse_args(arguments)
    groups = {name: rows[: options.queries] for name, rows in read_evaluation(options.data).items()}
    place = {"device": options.device, "dtype": options.dtype}
    reranker = None
    if not options.embedder_only:
        reranker = Reranker.from_pretrained(options.reranker, **place)
    with Embedder.from_pretrained(options.model, **place) as embedder:
        rows = evaluate(
            embedder,
            reranker,
            groups,
            options.dimensions or [embedder.dimensions // part for part in (1, 3, 6)],
            options.output,
            options.rerank_queries,
            options.dtype,
        )
    if reranker is not None:
        reranker.close()
    write(rows, options.csv)


if __name__ == "__main__":
    main()
