"""Train the small models that come with the package, on the CPU.

    python -m benchmarks.train_small embedder --out RUN
    python -m benchmarks.train_small reranker --out RUN2

The embedder is trained from nothing, the reranker from the embedder that ships. Each step's data
depends on the seed, the step's number and how many processes share it, so ``--resume`` goes on as
if nothing had happened. ``OUT`` holds the checkpoint in bfloat16 (renewed at every report), the
states of the training's parts, and their logs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qvlfast.gallery import EMBEDDER

from .team import together
from .train_embedder import train_embedder
from .train_reranker import train_reranker

STEPS = {"embedder": 2000, "reranker": 1200}
RATE = 1.5e-3


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_small")
    parser.add_argument("kind", choices=("embedder", "reranker"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--embedder", type=Path, default=EMBEDDER, help="what the reranker starts from"
    )
    parser.add_argument("--steps", type=int, help=f"by default {STEPS}")
    parser.add_argument("--rate", type=float, default=RATE, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    schedule = (options.steps or STEPS[options.kind], options.rate, options.resume)
    if options.kind == "embedder":
        together(options.workers, train_embedder, options.out, *schedule)
    else:
        together(options.workers, train_reranker, options.out, options.embedder, *schedule)


if __name__ == "__main__":
    main()
