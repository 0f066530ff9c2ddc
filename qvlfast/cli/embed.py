"""Embed a file of items, a folder of media or standard input.

INPUT is one of
  FILE.jsonl  one item a line: a string, or an object with text, image, video (each one value
              or a list), instruction, fps, max_frames and, if wanted, an id; names of media
              are relative to the file's folder
  FILE.txt    one text a line
  FOLDER      its pictures and videos, also those in folders below, sorted by name
  -           standard input, read as JSONL or as text

An interrupted run goes on where it stopped when the same command is given again. Failed items go
to OUT.errors.jsonl; their rows are NaN (zero in integer types), and .jsonl leaves them out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import (
    add_device_options,
    add_hub_options,
    add_input_options,
    model_arguments,
    positive_int,
)
from .streams import say

if TYPE_CHECKING:
    from ..config import ModelConfig
    from .sources import Line, Source
    from .work import Digest, Work
    from .writers import Layout

_COMMIT_ITEMS = 1024
_COMMIT_SECONDS = 1.0

# What decides the numbers, beyond the model and the input; the rest of the options only decides
# how fast they come.
_DECISIVE = (
    "instruction", "dimensions", "output", "no_normalize", "dtype", "quantization", "weight_only",
    "max_length", "no_truncate", "min_pixels", "max_pixels", "fps", "max_frames",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("input", metavar="INPUT", help="see above")
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        type=Path,
        required=True,
        help="what to write: .npy, .safetensors, .parquet or .jsonl",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="of INPUT; auto goes by the name, and where that says nothing by the first line: a "
        "JSON object or string there means jsonl",
    )
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an earlier run left and begin anew"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    group = parser.add_argument_group("what the vectors are")
    group.add_argument(
        "--dimensions", metavar="N", type=positive_int, help="keep the first N values (Matryoshka)"
    )
    group.add_argument(
        "--output",
        choices=("float32", "int8", "uint8", "binary", "ubinary"),
        default="float32",
        help="type of the values",
    )
    group.add_argument("--no-normalize", action="store_true", help="do not scale to unit length")
    add_input_options(parser)
    add_device_options(parser)
    add_hub_options(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint import locate
    from ..config import load_config
    from .sources import open_source
    from .work import Work
    from .writers import check_suffix, finish, side_files

    check_suffix(options.out)
    beside = list(side_files(options.out).values())
    _check_input_is_kept(options.input, [options.out, *beside])
    source = open_source(options.input, options.format)
    folder = locate(options.model, revision=options.revision, local_files_only=options.offline)
    layout = _layout(options, load_config(folder))
    decisive = {name: getattr(options, name) for name in _DECISIVE}
    decisive["format"] = source.form
    work = Work(options.out, beside, {"model": fingerprint(folder), **decisive}, options.restart)
    try:
        _embed(options, source, work, layout)
        state = work.state
        finish(work, layout)
    finally:
        work.close()
    if not options.quiet:
        _report_cut(state.cut)
    if state.failed:
        say(f"qvlfast: {state.failed} of {state.done} items failed: see {options.out}.errors.jsonl")
    return int(state.failed > 0)


def _check_input_is_kept(name: str, outputs: Sequence[Path]) -> None:
    """Refuse an input that would be overwritten, under whatever name.

    Raises:
        ValueError: it is one of ``outputs``, or in the folder of the unfinished run.
    """
    from .work import work_folder

    try:
        given = os.fstat(0) if name == "-" else os.stat(name)
    except OSError:
        return  # opening it says what is wrong
    folder = work_folder(outputs[0])
    for path in (*outputs, *(folder.iterdir() if folder.is_dir() else ())):
        with contextlib.suppress(OSError):
            if os.path.samestat(given, path.stat()):
                what = "standard input" if name == "-" else name
                raise ValueError(f"{what} is one of the outputs, {path}: name another OUT")


def fingerprint(folder: Path) -> str:
    """Recognises a checkpoint by its small files and by samples of its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".safetensors"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _layout(options: argparse.Namespace, config: ModelConfig) -> Layout:
    from ..vectors import check_dimensions
    from .writers import Layout

    full = config.text.hidden_size
    floats = options.dimensions or full
    if floats > full:
        raise ValueError(f"--dimensions {floats}: this model's vectors have {full} values")
    check_dimensions(floats, options.output)
    bits = options.output in ("binary", "ubinary")
    dtypes = {"float32": "<f4", "int8": "|i1", "binary": "|i1"}
    return Layout(
        width=floats // 8 if bits else floats,
        dtype=dtypes.get(options.output, "|u1"),
        scaled=options.output in ("int8", "uint8"),
        floats=floats,
    )


def _embed(options: argparse.Namespace, source: Source, work: Work, layout: Layout) -> None:
    """Bring ``work`` to the end of ``source``."""
    from .work import Digest

    digest = Digest()
    lines = iter(source)
    _pass_over(lines, digest, work, source)
    first = next(lines, None)
    if first is None:
        return
    if work.state.done and not options.quiet:
        say(f"qvlfast: going on after {work.state.done} items")

    from .. import Embedder

    embedder = Embedder.from_pretrained(options.model, **model_arguments(options))
    with embedder:
        outcomes = _outcomes(embedder, chain([first], lines), options)
        keeper = _Keeper(work, layout, options.output, digest)
        try:
            _store(outcomes, keeper, source.total, options.quiet)
        except KeyboardInterrupt:
            keeper.commit()
            say(
                f"\nqvlfast: stopped after {work.state.done} items; the same command goes on from "
                "there"
            )
            # Leaving in the ordinary way waits for the batch that is under way: minutes, for a
            # large one. Everything worth keeping is on the disk.
            os._exit(130)
        except BaseException:
            keeper.commit()
            raise


def _pass_over(lines: Iterator[Line], digest: Digest, work: Work, source: Source) -> None:
    """Skip what is done, and see that it is what was done."""
    done = work.state.done
    passed = 0
    for _ in range(done):
        line = next(lines, None)
        if line is None:
            break
        digest.add(line.raw)
        passed += 1
    if passed < done or (done and digest.value != work.state.digest):
        raise ValueError(
            f"the first {done} items of {source.name} are no longer those that {work.output} was "
            "begun with: bring them back to go on, or give --restart to begin anew"
        )


Outcome = tuple["Line", str | int, Any, bool]
"""A line, its id, its vector or exception, and whether its text was cut."""


def _outcomes(
    embedder: Any, lines: Iterator[Line], options: argparse.Namespace
) -> Iterator[Outcome]:
    """The answer of each line, in order, a bounded number of them under way."""
    from ..errors import InputError

    waiting: deque[tuple[Line, str | int, InputError | None]] = deque()

    def values() -> Iterator[Any]:
        for line in lines:
            name: str | int = line.index
            try:
                name, value = line.parse()
            except InputError as error:
                waiting.append((line, name, error))
                yield None  # answered with an error, which the one above replaces
            else:
                waiting.append((line, name, None))
                yield value

    for outcome in embedder.encode_iter(
        values(),
        options.instruction,
        dimensions=options.dimensions,
        normalize=not options.no_normalize,
        on_error="return",
        details=True,
    ):
        line, name, error = waiting.popleft()
        if isinstance(outcome, Exception):
            yield line, name, error or outcome, False
        else:
            yield line, name, outcome.vectors, outcome.usage[0].truncated_tokens > 0


def _store(outcomes: Iterator[Outcome], keeper: _Keeper, total: int | None, quiet: bool) -> None:
    from tqdm import tqdm

    start, before = time.monotonic(), keeper.work.state.done
    with tqdm(
        total=total, initial=before, unit="item", disable=True if quiet else None, file=sys.stderr
    ) as bar:
        for outcome in outcomes:
            keeper.add(outcome)
            bar.update()
    keeper.commit()
    if not quiet:
        count, seconds = keeper.work.state.done - before, time.monotonic() - start
        say(f"qvlfast: {count} items in {seconds:.1f} s, {count / max(seconds, 1e-9):.1f} a second")


class _Keeper:
    """Gathers outcomes, and commits them to the disk now and then."""

    def __init__(self, work: Work, layout: Layout, output: Any, digest: Digest) -> None:
        self.work = work
        self._layout = layout
        self._output = output
        self._digest = digest
        self._gathered: list[Outcome] = []
        self._committed = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        self._gathered.append(outcome)
        late = time.monotonic() - self._committed > _COMMIT_SECONDS
        if late or len(self._gathered) >= _COMMIT_ITEMS:
            self.commit()

    def commit(self) -> None:
        """Write what was gathered."""
        # Taken first, so that an interruption in the middle cannot make it be written twice.
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._write(gathered)
        self._committed = time.monotonic()

    def _write(self, gathered: list[Outcome]) -> None:
        import numpy as np

        from ..vectors import convert
        from .work import json_bytes

        rows = np.full((len(gathered), self._layout.floats), np.nan, np.float32)
        ids, errors = [], []
        for row, (line, name, answer, _) in zip(rows, gathered, strict=True):
            entry = {"index": line.index, "id": name}
            ids.append(json_bytes(entry))
            self._digest.add(line.raw)
            if isinstance(answer, Exception):
                code = getattr(answer, "code", "failed")
                errors.append(json_bytes({**entry, "code": code, "message": str(answer)}))
            else:
                row[:] = answer
        stored, scales = convert(rows, self._output)
        state = self.work.state
        self.work.append(
            self._layout.records(stored, scales),
            b"".join(ids),
            b"".join(errors),
            done=state.done + len(gathered),
            failed=state.failed + len(errors),
            cut=state.cut + sum(cut for *_, cut in gathered),
            digest=self._digest.value,
        )


def _report_cut(count: int) -> None:
    if count:
        say(
            f"qvlfast: cut to --max-length, so that text was lost from the end: {count} items; "
            "--no-truncate makes them errors"
        )
