"""What quantisation costs: ``python -m benchmarks.accuracy``; docs/accuracy.md reads the result.

On the trained embedder that comes along: retrieval of :mod:`benchmarks.quality`, with Matryoshka
cuts and vector types, and cosines to bfloat16. On the trained reranker: the order in which it puts
the same pictures, and how often the right one comes first.
On a random model of full size, as it is and with what makes real ones hard to round: outlier
channels behind the norms, and massive activations in ``down_proj``'s input (``--full``).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from qvlfast import Embedder, Quantization, Reranker
from qvlfast.gallery import EMBEDDER, RERANKER
from qvlfast.vectors import VectorType, convert, cut, similarity

from .checkpoints import write_checkpoint
from .cpu import picture
from .emoji_data import EVALUATION, Wording, read_evaluation
from .quality import TOP, draw_gallery, interval, rank_of_answers, recall, reciprocal
from .records import RESULTS, append, commit, machine

PLANS: dict[str, Quantization | None] = {
    "float32": None,
    "bf16": None,
    "int8": Quantization("int8"),
    "int8, vision too": Quantization("int8", vision=True),
    "int8, not down_proj": Quantization("int8", down_proj=False),
    "int4": Quantization("int4"),
    "int4, groups of 32": Quantization("int4", group=32),
    "int4, weights only": Quantization("int4", weight_only=True),
    "fp8": Quantization("fp8"),
}
CUTS: tuple[tuple[int, VectorType], ...] = (
    (192, "float32"),
    (192, "int8"),
    (192, "binary"),
    (64, "float32"),
    (64, "int8"),
    (64, "binary"),
)
RERANKED = 400  # queries of each group
# Channels behind each norm, and rows of gate and up, that are made larger by so much.
OUTLIERS, OUTLIER_FACTOR = 6, 24.0
MASSIVE, MASSIVE_FACTOR = 3, 36.0


@dataclass(frozen=True)
class Row:
    """One line of the CSV: a mean with its 95% interval, and its distance from bf16 in points."""

    model: str
    plan: str
    group: str
    measure: str
    dimensions: int
    output: str
    count: int
    value: float
    low: float
    high: float
    against_bf16: float
    machine: str
    commit: str


class Card:
    """Collects rows; those of bf16 are what the others are compared with."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._bf16: dict[tuple[Any, ...], NDArray[np.float64]] = {}

    def add(
        self,
        model: str,
        plan: str,
        group: str,
        measure: str,
        values: NDArray[np.float64],
        dimensions: int = 0,
        output: str = "",
    ) -> None:
        """One value a query or input."""
        key = (model, group, measure, dimensions, output)
        if plan == "bf16":
            self._bf16[key] = values
        base = self._bf16.get(key)
        mean, low, high = interval(values)
        row = Row(
            model=model,
            plan=plan,
            group=group,
            measure=measure,
            dimensions=dimensions,
            output=output,
            count=len(values),
            value=round(mean, 5),
            low=round(low, 5),
            high=round(high, 5),
            against_bf16=0.0 if base is None else round(100 * float(mean - base.mean()), 3),
            machine=machine(),
            commit=commit(),
        )
        self.rows.append(row)
        print(
            f"{model:9} {plan:20} {group:9} {measure:16} {dimensions or '':4} {output:8} "
            f"{mean:.4f} [{low:.4f}, {high:.4f}]  {row.against_bf16:+.2f} points",
            flush=True,
        )


def settings(plan: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``; ``auto`` is the reference for what has no CPU kernels: FP8,
    and int4 weights alone."""
    dtype = "float32" if plan == "float32" else "bfloat16"
    return {"device": "cpu", "dtype": dtype, "quantization": PLANS[plan], "backend": "auto"}


def cosines(vectors: NDArray[np.float32], base: NDArray[np.float32]) -> NDArray[np.float64]:
    return (vectors.astype(np.float64) * base).sum(axis=1)


def score_embedder(card: Card, groups: Mapping[str, Sequence[Wording]]) -> NDArray[np.int64]:
    """Retrieval under every plan; returns the first pictures of each query, for the reranker."""
    documents = [{"image": picture} for picture in draw_gallery()]
    texts = [wording.text for wordings in groups.values() for wording in wordings]
    vectors: dict[str, NDArray[np.float32]] = {}
    for plan in PLANS:
        with Embedder.from_pretrained(EMBEDDER, **settings(plan)) as embedder:
            vectors[plan] = embedder.encode([*documents, *texts], show_progress=False)
    tops = np.empty(0, np.int64)
    # bf16 comes first, since the others are compared with it.
    for plan in ("bf16", *(plan for plan in PLANS if plan != "bf16")):
        pictures = vectors[plan][: len(documents)]
        start = len(documents)
        for group, wordings in groups.items():
            found = vectors[plan][start : start + len(wordings)]
            start += len(wordings)
            for size, output in CUTS:
                stored, queries = (
                    convert(cut(x, size, normalize=True), output)[0] for x in (pictures, found)
                )
                ranks = rank_of_answers(similarity(queries, stored, output), wordings)
                for measure, values in (
                    ("recall@1", recall(ranks, 1)),
                    ("recall@10", recall(ranks, 10)),
                    ("MRR", reciprocal(ranks)),
                ):
                    card.add("embedder", plan, group, measure, values, size, output)
            if plan == "bf16":
                order = np.argsort(-similarity(found[:RERANKED], pictures), axis=1)[:, :TOP]
                tops = np.concatenate([tops.reshape(-1, TOP), order])
        for kind, rows in (
            ("pictures", slice(len(documents))),
            ("texts", slice(len(documents), None)),
        ):
            values = cosines(vectors[plan][rows], vectors["bf16"][rows])
            card.add("embedder", plan, kind, "cosine to bf16", values)
            card.add("embedder", plan, kind, "least cosine", values[[values.argmin()]])
    return tops


def score_reranker(
    card: Card, folder: Path, groups: Mapping[str, Sequence[Wording]], tops: NDArray[np.int64]
) -> None:
    """How alike the orders of the same pictures are: pairs in the same order as in bfloat16; and
    how often a right picture comes first."""
    pictures = draw_gallery()
    asked = [w for wordings in groups.values() for w in wordings[:RERANKED]]
    pairs = [
        (wording.text, {"image": pictures[i]})
        for wording, top in zip(asked, tops.tolist(), strict=True)
        for i in top
    ]
    names = np.array([name for name, rows in groups.items() for _ in rows[:RERANKED]])
    scores: dict[str, NDArray[np.float64]] = {}
    for plan in ("bf16", *(plan for plan in PLANS if plan != "bf16")):
        with Reranker.from_pretrained(folder, **settings(plan)) as reranker:
            made = reranker.predict(pairs, show_progress=False)
        scores[plan] = made.astype(np.float64).reshape(tops.shape)
        base, own = scores["bf16"], scores[plan]
        first, second = np.triu_indices(TOP, 1)
        same = np.sign(own[:, first] - own[:, second]) == np.sign(base[:, first] - base[:, second])
        card.add("reranker", plan, "all", "pairs in order", same.mean(axis=1))
        firsts = (own.argmax(axis=1) == base.argmax(axis=1)).astype(np.float64)
        card.add("reranker", plan, "all", "same first", firsts)
        card.add("reranker", plan, "all", "score distance", np.abs(own - base).mean(axis=1))
        best = np.take_along_axis(tops, own.argmax(axis=1)[:, None], axis=1)[:, 0].tolist()
        hits = [float(i in wording.targets) for i, wording in zip(best, asked, strict=True)]
        for group in groups:
            card.add("reranker", plan, group, "recall@1", np.array(hits)[names == group])


def plant_outliers(folder: Path) -> None:
    """Make a random checkpoint as hard to round as trained ones.

    A few channels of every norm grow, which the following weights undo, so that the model computes
    the same in exact arithmetic; and a few rows of gate and up grow, whose products are activations
    far beyond the others, undone in ``down_proj``.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    for name in [n for n in tensors if n.endswith("input_layernorm.weight")]:
        stem = name.removesuffix("input_layernorm.weight")
        readers = {
            "input_layernorm": [f"self_attn.{part}_proj" for part in "qkv"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }
        for norm, linears in readers.items():
            weight = tensors[f"{stem}{norm}.weight"]
            chosen = torch.randperm(len(weight), generator=generator)[:OUTLIERS]
            weight[chosen] *= OUTLIER_FACTOR
            for linear in linears:
                tensors[f"{stem}{linear}.weight"][:, chosen] /= OUTLIER_FACTOR
        up, down = (tensors[f"{stem}mlp.{part}_proj.weight"] for part in ("up", "down"))
        chosen = torch.randperm(len(up), generator=generator)[:MASSIVE]
        up[chosen] *= MASSIVE_FACTOR
        down[:, chosen] /= MASSIVE_FACTOR
    save_file(tensors, path, metadata={"format": "pt"})


def score_full(card: Card, shape: str) -> None:
    """Cosines to bfloat16 of a few texts and pictures, with and without planted outliers."""
    words = ["river", "stone", "light", "green", "cloud", "paper"]
    rng = np.random.default_rng(3)
    items: list[Any] = [" ".join(rng.choice(words, n)) for n in (3, 9, 20, 40, 60, 90)]
    items += [{"image": picture(side)} for side in (128, 192)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch) / "model", shape, dtype="bfloat16")
        for group in ("random", "outliers"):
            if group == "outliers":
                plant_outliers(folder)
            base: NDArray[np.float32] | None = None
            for plan in ("bf16", "int8", "int8, not down_proj", "int4", "int4, groups of 32"):
                with Embedder.from_pretrained(folder, **settings(plan)) as embedder:
                    vectors = embedder.encode(items, show_progress=False)
                base = vectors if base is None else base
                values = cosines(vectors, base)
                card.add(f"{shape}", plan, group, "cosine to bf16", values)
                card.add(f"{shape}", plan, group, "least cosine", values[[values.argmin()]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", metavar="SHAPE", help="also a random model of this shape: 2b")
    parser.add_argument("--reranker", type=Path, default=RERANKER, help="its folder")
    parser.add_argument("--queries", type=int, help="at most so many of each group")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.csv")
    options = parser.parse_args(arguments)
    groups = {name: rows[: options.queries] for name, rows in read_evaluation(EVALUATION).items()}
    card = Card()
    tops = score_embedder(card, groups)
    score_reranker(card, options.reranker, groups, tops)
    if options.full:
        score_full(card, options.full)
    options.out.unlink(missing_ok=True)
    append(card.rows, options.out)


if __name__ == "__main__":
    main()
