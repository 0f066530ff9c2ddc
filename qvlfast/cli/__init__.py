"""The command line ``qvlfast``.

One module a command, with ``add_arguments`` and ``run``. What takes time to import is imported
when a command runs, so that help is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import TextIO, cast

from . import demo, embed, info, quantize, rerank, streams, verify, warmup
from .options import HelpFormatter

OK = 0
SOME_FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130

_EPILOG = """\
exit codes:
  0    done
  1    done, but some items failed (embed, rerank) or a check did (verify)
  2    a wrong option, input or checkpoint; one line on stderr says which
  130  stopped by Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``options.run`` is the chosen command."""
    parser = argparse.ArgumentParser(
        prog="qvlfast",
        description="Inference for Qwen3-VL-Embedding and Qwen3-VL-Reranker.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (embed, rerank, info, quantize, warmup, verify, demo):
        name = module.__name__.rpartition(".")[2]
        first_line, _, rest = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=first_line.rstrip("."),
            description=f"{first_line}\n{rest.rstrip()}",
            formatter_class=HelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those after the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit code. ``argparse`` itself exits, with 2, on unknown options.
    """
    streams.prepare()
    output = cast(TextIO, streams.Output(sys.stdout))
    try:
        with contextlib.redirect_stdout(output), streams.warnings_as_messages():
            try:
                options = build_parser().parse_args(arguments)
                code: int = options.run(options)
            finally:
                streams.flush_messages()  # those of argparse
                output.flush()  # here, so that a closed pipe or a full disk is met inside
        return code
    except KeyboardInterrupt:
        streams.say("\nqvlfast: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return SOME_FAILED  # the reader has left (`qvlfast … | head`)
    except Exception as error:
        from ..errors import QvlfastError

        text = _message(error)
        if not isinstance(error, QvlfastError | ValueError | OSError):
            from ..execution import is_memory_fault

            if not is_memory_fault(error):
                raise
            text = f"not enough memory ({text}): `qvlfast info MODEL` says what it needs"
        streams.say(f"qvlfast: {text}")
        return USER_ERROR


def _message(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return streams.one_line(f"{error.filename}: {error.strerror or error}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return streams.one_line("; ".join(lines) or type(error).__name__)


class _Version(argparse.Action):
    """``--version``: the version is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .. import __version__

        print(f"qvlfast {__version__}")  # parser.exit would print it on stderr
        parser.exit()
