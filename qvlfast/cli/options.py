"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..quant import Quantization

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4", "fp8")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the default after each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        hidden = (None, False, argparse.SUPPRESS)
        if text and action.option_strings and action.default not in hidden and action.default != []:
            return f"{text} (default: %(default)s)"
        return text


def positive_int(text: str) -> int:
    """A whole number from 1 up."""
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def byte_count(text: str) -> int:
    """Bytes: ``8G``, ``512M``, ``1.5GiB``; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 8G, 512M or a number")
    value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def byte_budget(text: str) -> int:
    """Bytes as :func:`byte_count` reads them, or 0."""
    return 0 if text.strip() == "0" else byte_count(text)


def size_text(count: int) -> str:
    """Bytes for a reader, in units of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def add_quantization_options(parser: argparse._ActionsContainer, help: str) -> None:
    """The format of the weights, and that it is theirs alone."""
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=help)
    parser.add_argument(
        "--weight-only",
        action="store_true",
        help="with --quantization int4: do not round the inputs of the products to int8; needs the "
        "triton or the reference backend",
    )


def quantization(options: argparse.Namespace) -> Quantization | None:
    """What those two options ask for.

    Raises:
        ValueError: they contradict each other.
    """
    from ..quant import Quantization

    if options.quantization is None:
        if options.weight_only:
            raise ValueError("--weight-only needs --quantization int4")
        return None
    return Quantization(options.quantization, weight_only=options.weight_only)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """The device, how it holds the weights, and what computes."""
    group = parser.add_argument_group("what it runs on")
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:1")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights; auto is that of the checkpoint",
    )
    add_quantization_options(
        group,
        "quantise the linears of the text model while loading; otherwise they stay as stored",
    )
    group.add_argument(
        "--backend", metavar="NAME", default="auto", help="auto, native, reference or triton"
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="equal inputs give equal bits in any batch, or the model is not loaded; needs the "
        "native backend",
    )
    group.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="launch each kernel of short batches of text, where the triton backend would replay "
        "a CUDA graph",
    )


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """How inputs become prompts and batches."""
    group = parser.add_argument_group("how inputs are read")
    group.add_argument(
        "--instruction", metavar="TEXT", help="for inputs that bring none; default: the model's own"
    )
    group.add_argument(
        "--max-length",
        metavar="TOKENS",
        type=positive_int,
        help="the most tokens a prompt may have (default: 8192, 10240 for rerank)",
    )
    group.add_argument(
        "--no-truncate",
        action="store_true",
        help="longer inputs are errors; otherwise their text is cut",
    )
    group.add_argument(
        "--min-pixels", metavar="N", type=positive_int, default=4096, help="of a picture, resized"
    )
    group.add_argument(
        "--max-pixels",
        metavar="N",
        type=positive_int,
        default=1_843_200,
        help="of a picture, resized",
    )
    group.add_argument(
        "--fps",
        metavar="X",
        type=positive_float,
        default=1.0,
        help="frames a second that are taken from video files",
    )
    group.add_argument(
        "--max-frames",
        metavar="N",
        type=positive_int,
        default=64,
        help="the most frames taken from a video",
    )
    group.add_argument(
        "--allow-media-domain",
        metavar="HOST",
        action="append",
        default=[],
        help="fetch pictures and videos from this host (.host: its subdomains too); may be given "
        "again. Without it no URL is fetched",
    )
    group = parser.add_argument_group("how it is run")
    group.add_argument(
        "--batch-tokens",
        metavar="N",
        type=positive_int,
        default=16_384,
        help="the most tokens in one forward pass; 1 runs every input alone",
    )
    group.add_argument(
        "--batch-patches",
        metavar="N",
        type=positive_int,
        default=16_384,
        help="the most picture patches (16 x 16 pixels) in one forward pass",
    )
    group.add_argument(
        "--cache-bytes",
        metavar="SIZE",
        type=byte_budget,
        default="512M",
        help="for keys and values of shared beginnings, and for answers, kept from batch to batch; "
        "0: none",
    )
    group.add_argument(
        "--vision-cache-bytes",
        metavar="SIZE",
        type=byte_budget,
        default="256M",
        help="for pictures that come again; 0: none",
    )


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Where a hub id is taken from."""
    group = parser.add_argument_group("where the model comes from")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit, for a hub id")
    group.add_argument("--offline", action="store_true", help="never download")


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``from_pretrained`` that these options stand for."""
    arguments: dict[str, Any] = {
        "device": options.device,
        "dtype": options.dtype,
        "quantization": quantization(options),
        "backend": options.backend,
        "deterministic": options.deterministic,
        "cuda_graphs": not options.no_cuda_graphs,
        "truncate": not options.no_truncate,
        "min_pixels": options.min_pixels,
        "max_pixels": options.max_pixels,
        "fps": options.fps,
        "max_frames": options.max_frames,
        "allow_media_domains": options.allow_media_domain,
        "batch_tokens": options.batch_tokens,
        "batch_patches": options.batch_patches,
        "cache_bytes": options.cache_bytes,
        "vision_cache_bytes": options.vision_cache_bytes,
        "revision": options.revision,
        "local_files_only": options.offline,
    }
    if options.max_length is not None:
        arguments["max_length"] = options.max_length
    return arguments
