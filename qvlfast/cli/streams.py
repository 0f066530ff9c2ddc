"""Standard input, output and error, which may be closed, full, or of a narrow encoding; and the
names of files that errors lack."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

# Embeddings, overrides and isolates of Unicode's bidirectional algorithm.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Output:
    """Standard output whose errors name it, wherever in the work they come."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with naming("standard output"):
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is held.

        Raises:
            OSError: it cannot be written. It is dropped then: it would fail again when Python
                ends, with a complaint of Python's own.
        """
        try:
            with naming("standard output"):
                self._stream.flush()
        except OSError:
            discard(self._stream)
            raise


def prepare() -> None:
    """Make the three streams usable, whatever the process was started with.

    A closed one would leave its number to the next file that is opened, which then got what is
    meant for the stream. Reading a closed input is left to :func:`open_source`, which says so;
    writing to a closed output fails as on any other; a closed error takes everything.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """A message on standard error. Where that cannot be written, the work goes on without."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)
    flush_messages()


@contextlib.contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Warnings are a line each, without the source that they come from."""

    def show(message: object, *_: object, **__: object) -> None:
        say(f"qvlfast: warning: {one_line(message)}")

    with warnings.catch_warnings():
        # Of Pillow, from half the size up that it refuses.
        warnings.filterwarnings("ignore", r"Image size \(.*\) exceeds limit")
        warnings.showwarning = show
        yield


def flush_messages() -> None:
    """Write what standard error still holds, or drop it: it would end Python with another code."""
    try:
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Let a stream lead nowhere from now on."""
    with contextlib.suppress(io.UnsupportedOperation):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an ``OSError`` that names no file the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def one_line(text: object) -> str:
    """A text whose control characters, line ends and changes of direction are escaped: it keeps to
    its line, and lets what follows be."""
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in _DIRECTIONS
        else c
        for c in str(text)
    )


def json_text(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that standard output can write: plain where it is UTF-8, otherwise ASCII.

    A lone surrogate is left to the stream, whose escape of it is that of JSON.
    """
    plain = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not plain, indent=indent)
