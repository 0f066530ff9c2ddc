"""Compile the Triton kernels of a checkpoint into the cache.

A service with backend='triton' then starts without compiling. For the GPU of this machine, or with
--target for one elsewhere: then neither a GPU nor the weights need be here, and the cache folder
(TRITON_CACHE_DIR) is to be copied to where the same version of Triton runs.
"""

from __future__ import annotations

import argparse
import sys
import time

from .options import DTYPES, add_quantization_options, quantization


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="a checkpoint folder or a cached hub id")
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="the GPU of this machine: auto or cuda:1"
    )
    parser.add_argument(
        "--target", metavar="ARCH", help="compile for this architecture instead, such as sm_87"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    add_quantization_options(parser, "as the service will load it")
    parser.add_argument(
        "--only", choices=("embedder", "reranker"), help="default: the kernels of both"
    )
    parser.add_argument("--text-only", action="store_true", help="leave out the vision tower")


def run(options: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint, locate
    from ..config import load_config
    from ..warmup import cache_folder, compile_model, target_here
    from .info import own_dtype
    from .plan import Planner, Wish, find_device

    target = options.target or target_here(options.device)
    folder = locate(options.model, local_files_only=True)
    checkpoint, config = Checkpoint(folder), load_config(folder)
    dtype = own_dtype(checkpoint) if options.dtype == "auto" else options.dtype
    planner = Planner(checkpoint, config, find_device(target, None))
    setup = planner.setup(Wish(dtype, quantization(options), "triton", 1, 1, 1))
    launches, start = 0, time.monotonic()

    def progress(op: str) -> None:
        nonlocal launches
        launches += 1
        if sys.stderr.isatty():
            print(f"\r{launches:5} launches, now {op:24}", end="", file=sys.stderr)

    made = compile_model(
        config,
        setup,
        target,
        reranker=None if options.only is None else options.only == "reranker",
        pictures=not options.text_only,
        progress=progress,
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for op, count in made.items():
        print(f"  {op:24}{count:4}")
    seconds = time.monotonic() - start
    print(
        f"{sum(made.values())} kernels for {target}, compiled or found in {cache_folder()}, "
        f"in {seconds:.0f} s"
    )
    return 0
