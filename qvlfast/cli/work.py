"""What an unfinished ``embed`` has on disk, so that the same command can go on with it.

Beside the output stands a folder ``OUT.work``:

    rows.raw       one record an item, appended
    ids.jsonl      {"index", "id"} of each item
    errors.jsonl   {"index", "id", "code", "message"} of each failed item
    journal.jsonl  a header, then the sizes of the three files after each commit
    *.tmp          the files that are asked for, while they are written

A commit syncs the three files first and the journal after them, so whatever the last whole line
of the journal says is on the disk. What lies beyond it, because the process was killed, is cut
off. Only files of these names are ever removed from the folder, and a folder without a journal is
somebody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .streams import naming

_VERSION = 1
_PARTS = ("rows.raw", "ids.jsonl", "errors.jsonl")
_JOURNAL = "journal.jsonl"
_TEMPORARY = ("output.tmp", "ids.tmp", "errors.tmp", "scales.tmp")
_OURS = (*_PARTS, _JOURNAL, *_TEMPORARY)


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        done: items.
        failed: those of them that are errors.
        cut: those of them whose text was cut to the length limit.
        digest: of the items so far, see :class:`Digest`.
        sizes: bytes of the three files.
    """

    done: int = 0
    failed: int = 0
    cut: int = 0
    digest: str = ""
    sizes: tuple[int, int, int] = (0, 0, 0)


class Digest:
    """Recognises the items that a run has passed."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, raw: bytes) -> None:
        self._hash.update(b"%d\n" % len(raw))
        self._hash.update(raw)

    @property
    def value(self) -> str:
        return self._hash.hexdigest()


class Work:
    """The folder of one run. Only one process may have it open.

    Args:
        output: the file that is to be made.
        beside: files beside it that are made or, if they are left from an earlier run, removed.
        fingerprint: everything that decides the result, named as a user knows it.
        restart: throw away what an earlier run left, the finished output included.

    Raises:
        ValueError: one of the files exists, the folder is not of this command or is damaged,
            another process works on it, or what was begun there was begun with another
            fingerprint.
    """

    def __init__(
        self, output: Path, beside: Sequence[Path], fingerprint: Mapping[str, Any], restart: bool
    ) -> None:
        self.output = output
        self.folder = work_folder(output)
        begun = (self.folder / _JOURNAL).is_file()
        for path in (output, *beside):
            if path.is_dir():
                raise ValueError(f"{path} is a folder: name another output")
            if os.path.lexists(path) and not (restart or begun):
                raise ValueError(f"{path} exists: --restart replaces it")
        if self.folder.is_dir() and not begun and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is not of an interrupted run, and this output needs a folder of "
                "that name: rename it, or name another output"
            )
        self.folder.mkdir(exist_ok=True)
        self.state = State()
        self._files: list[BinaryIO] = []
        self._journal = (self.folder / _JOURNAL).open("a+b")
        try:
            self._lock()
            if restart:
                self._journal.truncate(0)
            self.state = self._resume(dict(fingerprint))
            self._files = [(self.folder / name).open("ab") for name in _PARTS]
            for file, size in zip(self._files, self.state.sizes, strict=True):
                if os.fstat(file.fileno()).st_size < size:
                    raise self._damaged()
                file.truncate(size)
        except BaseException:
            self._journal.close()
            raise

    def append(
        self,
        rows: bytes,
        ids: bytes,
        errors: bytes,
        *,
        done: int,
        failed: int,
        cut: int,
        digest: str,
    ) -> None:
        """Store the next items for good.

        Args:
            rows, ids, errors: what is added to the three files.
            done, failed, cut, digest: the new :class:`State`.
        """
        for name, file, data in zip(_PARTS, self._files, (rows, ids, errors), strict=True):
            with naming(self.folder / name):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        first, second, third = (file.tell() for file in self._files)
        self.state = State(done, failed, cut, digest, (first, second, third))
        self._write_line(asdict(self.state))

    def path(self, part: str) -> Path:
        """One of the files of the folder."""
        return self.folder / part

    def lines(self, part: str) -> Iterator[dict[str, Any]]:
        """The entries of ``ids.jsonl`` or ``errors.jsonl``."""
        with self.path(part).open("rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Give up the lock. The folder stays if there is something in it to go on with."""
        if self.state.done == 0:
            self._remove_files()
        for file in (*self._files, self._journal):
            # What was committed is on the disk; what a full disk did not take has been reported.
            with contextlib.suppress(OSError):
                file.close()

    def remove(self) -> None:
        """Delete the folder of a run that is finished."""
        self._remove_files()
        self.close()

    def _remove_files(self) -> None:
        for name in _OURS:
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody has put other files there
            self.folder.rmdir()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self.output}") from None

    def _resume(self, fingerprint: dict[str, Any]) -> State:
        self._journal.seek(0)
        entries = []
        for line in self._journal:
            if not line.endswith(b"\n"):
                break  # the process was killed while it wrote this
            entries.append(self._parsed(line))
        if len(entries) < 2:  # begun, and nothing done
            self._journal.truncate(0)
            self._write_line({"version": _VERSION, **fingerprint})
            return State()
        header = entries[0]
        begun = {"version": _VERSION, **json.loads(json.dumps(fingerprint))}
        changed = [key for key in begun if header.get(key) != begun[key]]
        if changed:
            details = "; ".join(_difference(k, header.get(k), begun[k]) for k in changed)
            raise ValueError(
                f"{self.output} was begun by another command ({details}): give that one again to "
                "go on, or --restart to begin anew"
            )
        self._journal.truncate(sum(len(json_bytes(entry)) for entry in entries))
        last = entries[-1]
        try:
            return State(**{**last, "sizes": tuple(last["sizes"])})
        except (KeyError, TypeError):
            raise self._damaged() from None

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise self._damaged() from None
        if not isinstance(entry, dict):
            raise self._damaged()
        return entry

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.folder / _JOURNAL} is damaged: --restart begins anew")

    def _write_line(self, value: Mapping[str, Any]) -> None:
        with naming(self.folder / _JOURNAL):
            self._journal.write(json_bytes(value))
            self._journal.flush()
            os.fsync(self._journal.fileno())


def work_folder(output: Path) -> Path:
    """Where a run keeps what is not finished."""
    return output.with_name(f"{output.name}.work")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """One line of JSON. A lone surrogate becomes the escape that JSON has for it."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _difference(key: str, before: Any, now: Any) -> str:
    if key in ("model", "input"):
        return f"the {key} is another one"
    return f"{key} was {before!r}, now {now!r}"
