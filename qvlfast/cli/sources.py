"""Where items come from: a JSONL or text file, standard input, or a folder of media.

A source yields :class:`Line` values. They are cheap until parsed, so that a resumed run passes
quickly over what is already done.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError
from ..inputs import PICTURE_SUFFIXES, shorten

FORMATS = ("auto", "jsonl", "text")
PICTURES = frozenset({*PICTURE_SUFFIXES, ".tif"} - {".svg"})
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
)

_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text"}
_DEEPEST = 2  # a list of videos, each a list of frames
_SCHEMES = ("http://", "https://", "file://", "data:")
_BOM = b"\xef\xbb\xbf"
# How an array or an object over several lines begins.
_BEGUN_ARRAY, _BEGUN_OBJECT = rb"\[\s*(?:$|[\[{\"])", rb"\{\s*(?:$|\")"


@dataclass(frozen=True)
class Line:
    """One item before it is looked at.

    Attributes:
        index: its place among all items, from 0.
        raw: what it is recognised by when a run goes on.
        kind: ``jsonl``, ``text`` or ``file``.
        base: the folder that relative names of media start from.
    """

    index: int
    raw: bytes
    kind: str
    base: Path

    def parse(self) -> tuple[str | int, Any]:
        """Its id (the index if it has none) and the input.

        Raises:
            InputError: it is no item.
        """
        if self.kind == "file":
            name = os.fsdecode(self.raw.partition(b"\0")[0])
            key = "image" if Path(name).suffix.lower() in PICTURES else "video"
            return name, {key: self.base / name}
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError("invalid_text", f"the line is not UTF-8: {error}") from None
        return (
            (self.index, text) if self.kind == "text" else parse_json(text, self.base, self.index)
        )


def parse_json(text: str, base: Path, index: int) -> tuple[str | int, Any]:
    """One item as JSON: a string, or an object with an input's keys and perhaps an ``id``.

    Args:
        base: the folder that relative names of media start from.
        index: the id of an item that names none.

    Raises:
        InputError: ``invalid_json`` or ``invalid_type``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "invalid_json",
            f"{shorten(text)!r} is not JSON ({error}); for plain lines: --format text",
        ) from None
    if isinstance(value, str):
        return index, value
    if not isinstance(value, dict):
        raise InputError(
            "invalid_type", f"the line is {shorten(text)}, expected a JSON string or object"
        )
    name = value.pop("id", index)
    if isinstance(name, bool) or not isinstance(name, str | int):
        shown = f"a {type(name).__name__}" if isinstance(name, list | dict) else repr(name)
        raise InputError("invalid_type", f"`id` is {shown}, expected a string or a whole number")
    for key in ("image", "video"):
        if key in value:
            value[key] = _from_base(value[key], base, _DEEPEST)
    return name, value


def _from_base(value: Any, base: Path, depth: int) -> Any:
    """Names in lists down to ``depth``; what lies deeper is no input, which its check will say."""
    if isinstance(value, list):
        return [_from_base(part, base, depth - 1) for part in value] if depth else value
    if not isinstance(value, str) or not value.strip() or value.lower().startswith(_SCHEMES):
        return value
    return os.path.join(base, value)


class Source:
    """Items in order.

    Attributes:
        form: ``jsonl``, ``text`` or ``file``, as :attr:`Line.kind`.
        total: how many there are, None where only the end will tell.
    """

    def __init__(self, lines: Iterable[Line], form: str, total: int | None, name: str) -> None:
        self.form = form
        self.total = total
        self.name = name
        self._lines = lines

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines)


def open_source(name: str, form: str = "auto") -> Source:
    """Open a file, a folder, or ``-`` for standard input.

    Waits for the first line of what is no regular file.

    Args:
        form: one of :data:`FORMATS`. With ``auto`` a file named ``.jsonl``, ``.ndjson`` or
            ``.json`` is JSONL, one named ``.txt`` is text; other files and standard input are
            JSONL if their first line that is not blank is a JSON object or string.

    Raises:
        ValueError: no name, a folder without media, or one JSON document in place of lines.
        OSError: it cannot be read.
    """
    if not name:
        raise ValueError("the name of the input is empty: give a file, a folder, or -")
    if name == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed: give a file or a folder")
        return _stream(sys.stdin.buffer, form, Path.cwd(), "standard input")
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    suffix = path.suffix.lower()
    if form == "auto":
        form = _BY_SUFFIX.get(suffix, "auto")
    if not path.is_file() and path.exists():
        return _stream(path.open("rb"), form, path.parent, name)
    with path.open("rb") as file:  # fails here and not in the middle of the work
        form = _form_of(_head(file), form, name, array=suffix == ".json")
    total = sum(1 for _ in _file_lines(path, form))
    return Source(_file_lines(path, form), form, total, name)


def _folder(path: Path) -> Source:
    names = []
    for parent, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and Path(file).suffix.lower() in PICTURES | VIDEOS:
                names.append(Path(parent, file).relative_to(path).as_posix())
    if not names:
        raise ValueError(
            f"{path} holds no pictures or videos ({', '.join(sorted(PICTURES | VIDEOS))})"
        )
    names.sort()
    return Source(_Files(path, names), "file", len(names), str(path))


class _Files:
    def __init__(self, base: Path, names: list[str]) -> None:
        self._base = base
        self._names = names

    def __iter__(self) -> Iterator[Line]:
        for index, name in enumerate(self._names):
            try:
                size = (self._base / name).stat().st_size
            except OSError:
                size = -1  # a dangling link: reading it will say so
            yield Line(index, os.fsencode(name) + b"\0%d" % size, "file", self._base)


def _stream(file: BinaryIO, form: str, base: Path, name: str) -> Source:
    """Of a pipe, which can be read once."""
    head = _head(file)
    form = _form_of(head, form, name)
    return Source(_numbered(chain(head, file), form, base), form, None, name)


def _file_lines(path: Path, form: str) -> Iterator[Line]:
    with path.open("rb") as file:
        yield from _numbered(file, form, path.parent)


def _numbered(lines: Iterable[bytes], form: str, base: Path) -> Iterator[Line]:
    """Items of lines: blank ones are items of a text, and nothing in JSONL."""
    index = 0
    first = True
    for line in lines:
        raw = line.rstrip(b"\r\n")
        if first:
            raw = raw.removeprefix(_BOM)
            first = False
        if form == "text" or raw.strip():
            yield Line(index, raw, form, base)
            index += 1


def _head(file: BinaryIO) -> list[bytes]:
    """The lines up to the first that is not blank."""
    head = []
    for line in file:
        head.append(line)
        if line.removeprefix(_BOM).strip():
            break
    return head


def _form_of(head: list[bytes], form: str, name: str, array: bool = False) -> str:
    """The format of an input, ``text`` or ``jsonl``.

    Args:
        head: its lines up to the first that is not blank.
        form: what it is said to be.
        array: whether an array is certainly a document, and no item.

    Raises:
        ValueError: it is one JSON document of many items. Some of its lines may well look like
            items.
    """
    if form == "text":
        return form
    plain = "" if form == "jsonl" else "; for plain lines: --format text"
    line = head[-1].removeprefix(_BOM).strip() if head else b""
    value: Any = None
    if form == "jsonl":
        begun_array, begun_object = line == b"[" or (array and line[:1] == b"["), line == b"{"
    else:
        begun_array = re.match(_BEGUN_ARRAY, line) is not None
        begun_object = re.match(_BEGUN_OBJECT, line) is not None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            begun_array, begun_object = isinstance(value, list), False
    if begun_array:
        raise ValueError(
            f"{name} is one JSON array: write an item a line, as `jq -c '.[]'` does{plain}"
        )
    if begun_object:
        raise ValueError(
            f"{name} has items of many lines: write one a line, as `jq -c .` does{plain}"
        )
    return "jsonl" if form == "jsonl" or isinstance(value, str | dict) else "text"
