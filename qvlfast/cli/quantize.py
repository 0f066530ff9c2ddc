"""Write a quantised copy of a checkpoint.

The copy is in the compressed-tensors format, which transformers and vLLM read too. It is written
shard by shard, so that a checkpoint larger than the memory can be quantised.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_hub_options, size_text
from .streams import naming, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint folder or a hub id")
    parser.add_argument("target", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument(
        "--format",
        choices=("int8", "int4"),
        default="int8",
        help="int8: a scale for each channel; int4: also a multiplier for each group",
    )
    parser.add_argument(
        "--group", type=int, choices=(32, 64, 128), help="inputs of a group, for int4; default: 64"
    )
    parser.add_argument("--vision", action="store_true", help="the vision blocks' linears as well")
    parser.add_argument(
        "--keep-down-proj",
        action="store_true",
        help="leave down_proj, whose inputs have the largest outliers, as it is",
    )
    add_hub_options(parser)


def run(options: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    from ..checkpoint import locate
    from ..quant import Quantization
    from ..quant.convert import convert

    if options.group is not None and options.format != "int4":
        raise ValueError(f"--group is for --format int4: {options.format} has no groups")
    plan = Quantization(
        options.format,
        vision=options.vision,
        down_proj=not options.keep_down_proj,
        group=options.group or 64,
    )
    source = locate(options.source, revision=options.revision, local_files_only=options.offline)
    try:
        with naming(options.target):
            done = convert(source, options.target, plan, say)
    except SafetensorError as error:  # what its library makes of a full disk
        raise ValueError(f"{options.target} is not finished: {error}") from error
    print(
        f"{options.target}: {done.linears} linears in {plan.format}, "
        f"{size_text(done.bytes_in)} became {size_text(done.bytes_out)}"
    )
    return 0
