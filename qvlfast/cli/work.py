"""What an unfinished ``embed`` has on disk, so that the same command can go on with it.

Beside the output stands a folder ``OUT.work``:

    rows.raw       one record an item, appended
    ids.jsonl      {"index", "id"} of each item
    errors.jsonl   {"index", "id", "code", "message"} of each failed item
    journal.jsonl  a header, then the sizes of the three files after each commit

A commit syncs the three files first and the journal after them, so whatever the last whole line
of the journal says is on the disk. What lies beyond it, because the process was killed, is cut
off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

_VERSION = 1
_PARTS = ("rows.raw", "ids.jsonl", "errors.jsonl")
_JOURNAL = "journal.jsonl"


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
        fingerprint: everything that decides the result, named as a user knows it.
        restart: throw away what an earlier run left, the finished output included.

    Raises:
        ValueError: the output exists, another process works on it, or what was begun there was
            begun with another fingerprint.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.work")
        if output.is_dir():
            raise ValueError(f"{output} is a folder: name a file")
        if not restart and output.exists() and not self.folder.exists():
            raise ValueError(f"{output} exists: --restart replaces it")
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
        for file, data in zip(self._files, (rows, ids, errors), strict=True):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        first, second, third = (file.tell() for file in self._files)
        self.state = State(done, failed, cut, digest, (first, second, third))
        self._write_line(asdict(self.state))

    def path(self, part: str) -> Path:
        """One of the three files."""
        return self.folder / part

    def lines(self, part: str) -> Iterator[dict[str, Any]]:
        """The entries of ``ids.jsonl`` or ``errors.jsonl``."""
        with self.path(part).open("rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Give up the lock. The folder stays if there is something in it to go on with."""
        if self.state.done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        for file in (*self._files, self._journal):
            file.close()

    def remove(self) -> None:
        """Delete the folder of a run that is finished."""
        shutil.rmtree(self.folder)
        self.close()

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
            entries.append(json.loads(line))
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
        return State(**{**last, "sizes": tuple(last["sizes"])})

    def _write_line(self, value: Mapping[str, Any]) -> None:
        self._journal.write(json_bytes(value))
        self._journal.flush()
        os.fsync(self._journal.fileno())


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """One line of JSON. A lone surrogate becomes the escape that JSON has for it."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _difference(key: str, before: Any, now: Any) -> str:
    if key in ("model", "input"):
        return f"the {key} is another one"
    return f"{key} was {before!r}, now {now!r}"
