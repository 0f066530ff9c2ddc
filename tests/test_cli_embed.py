"""``qvlfast embed`` as a process: what it reads and writes, and what survives an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from benchmarks.checkpoints import write_checkpoint
from qvlfast import Embedder
from tests.samples import frames, picture

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "layers": 1, "hidden": 32, "ffn": 32, "heads": 1, "kv_heads": 1, "vision_hidden": 32,
    "vision_depth": 1, "vision_ffn": 32, "vision_heads": 2, "deepstack": (0,),
}  # fmt: skip
# The same inputs in other batches: float32 sums in another order.
SAME = 1e-5


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint so small that the command itself is what takes time."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model", SMALL)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "qvlfast", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def qvlfast(
    *arguments: str | Path, code: int = 0, stdin: bytes | BinaryIO = b"", cwd: Path = ROOT
) -> tuple[str, str]:
    """Run the command; checks its exit code, returns stdout and stderr."""
    given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, timeout=300,
        check=False, **given,
    )  # fmt: skip
    out, error = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, f"exit code {done.returncode}\n{out}\n{error}"
    assert "Traceback" not in error
    return out, error


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), "utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of good and bad items, with pictures beside it."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "media").mkdir()
    picture(80, 60).save(folder / "media" / "one.png")
    for i, frame in enumerate(frames(2, 64, 64)):
        frame.save(folder / f"frame{i}.png")
    lines = [
        '"a text"',
        '{"text": "another", "id": "second"}',
        "",
        "this is not JSON",
        '{"image": "media/one.png", "id": 7}',
        '{"image": "media/none.png", "id": "gone"}',
        '{"video": ["frame0.png", "frame1.png"], "text": "moving"}',
        '{"txt": "unknown key"}',
        '{"text": "with its own", "instruction": "Find it"}',
        '{"image": "https://example.org/a.png"}',
    ]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "items.jsonl"


GOOD, BAD = (0, 1, 3, 5, 7), (2, 4, 6, 8)
IDS = [0, "second", 2, 7, "gone", 5, 6, 7, 8]
CODES = ["invalid_json", "not_found", "invalid_type", "not_allowed"]


@pytest.fixture(scope="module")
def expected(small_checkpoint: Path, mixed: Path) -> np.ndarray:
    folder = mixed.parent
    with Embedder.from_pretrained(small_checkpoint) as embedder:
        return embedder.encode(
            [
                "a text",
                "another",
                {"image": folder / "media/one.png"},
                {"video": [folder / "frame0.png", folder / "frame1.png"], "text": "moving"},
                {"text": "with its own", "instruction": "Find it"},
            ]
        )


def check_rows(rows: np.ndarray, expected: np.ndarray) -> None:
    assert rows.dtype == np.float32
    assert rows.shape == (9, expected.shape[1])
    assert np.isnan(rows[list(BAD)]).all()
    np.testing.assert_allclose(rows[list(GOOD)], expected, atol=SAME)


def check_errors(out: Path) -> None:
    errors = read_lines(out.with_name(f"{out.name}.errors.jsonl"))
    assert [e["index"] for e in errors] == list(BAD)
    assert [e["code"] for e in errors] == CODES
    assert [e["id"] for e in errors] == [IDS[i] for i in BAD]
    assert all(e["message"] for e in errors)


def check_left_over(out: Path, *side: str) -> None:
    """Only the output and its side files are there in the end."""
    names = {out.name, *(f"{out.name}.{name}" for name in side)}
    assert {path.name for path in out.parent.iterdir()} == names


def test_npy(small_checkpoint: Path, mixed: Path, expected: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    _, error = qvlfast("embed", small_checkpoint, mixed, "-o", out, code=1)
    check_rows(np.load(out), expected)
    check_errors(out)
    ids = read_lines(tmp_path / "out.npy.ids.jsonl")
    assert ids == [{"index": i, "id": name} for i, name in enumerate(IDS)]
    check_left_over(out, "errors.jsonl", "ids.jsonl")
    assert "4 of 9 items failed" in error


def test_safetensors(
    small_checkpoint: Path, mixed: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    qvlfast("embed", small_checkpoint, mixed, "-o", out, code=1)
    check_rows(load_file(out)["vectors"], expected)
    check_errors(out)
    check_left_over(out, "errors.jsonl", "ids.jsonl")


def test_jsonl(small_checkpoint: Path, mixed: Path, expected: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    qvlfast("embed", small_checkpoint, mixed, "-o", out, code=1)
    entries = read_lines(out)
    assert [(e["index"], e["id"]) for e in entries] == [(i, IDS[i]) for i in GOOD]
    got = np.array([e["embedding"] for e in entries], np.float32)
    np.testing.assert_allclose(got, expected, atol=SAME)
    check_errors(out)
    check_left_over(out, "errors.jsonl")


def test_parquet(small_checkpoint: Path, mixed: Path, expected: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    qvlfast("embed", small_checkpoint, mixed, "-o", out, code=1)
    table = pq.read_table(out)
    check_rows(np.stack(table["embedding"].to_numpy()).astype(np.float32), expected)
    assert table["id"].to_pylist() == [str(name) for name in IDS]
    codes = table["error"].to_pylist()
    assert [codes[i] for i in BAD] == CODES
    assert {codes[i] for i in GOOD} == {None}
    check_left_over(out, "errors.jsonl")


@pytest.mark.parametrize("output", ["uint8", "binary"])
def test_other_types(small_checkpoint: Path, mixed: Path, output: str, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    arguments = ("--output", output, "--dimensions", "24", "--batch-tokens", "1")
    qvlfast("embed", small_checkpoint, mixed, "-o", out, *arguments, code=1)
    with Embedder.from_pretrained(small_checkpoint, batch_tokens=1) as embedder:
        encoded = embedder.encode(["a text", "another"], output=output, dimensions=24, details=True)
    rows = np.load(out)
    assert rows.dtype == encoded.vectors.dtype
    np.testing.assert_array_equal(rows[:2], encoded.vectors)
    assert not rows[list(BAD)].any() or output == "binary"
    scales = tmp_path / "out.npy.scales.npy"
    assert scales.exists() == (encoded.scales is not None)
    if encoded.scales is not None:
        np.testing.assert_array_equal(np.load(scales)[:2], encoded.scales)
        tensors = tmp_path / "out.safetensors"
        qvlfast("embed", small_checkpoint, mixed, "-o", tensors, *arguments, code=1)
        loaded = load_file(tensors)
        np.testing.assert_array_equal(loaded["vectors"], rows)
        np.testing.assert_array_equal(loaded["scales"], np.load(scales))


def test_folder(small_checkpoint: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    (media / "b" / "deep").mkdir(parents=True)
    picture(64, 64).save(media / "z.png")
    picture(64, 32, seed=1).save(media / "b" / "deep" / "ä ü.JPG", format="JPEG")
    (media / "notes.txt").write_text("not a picture")
    (media / "a.png").write_bytes(b"damaged")
    (media / ".hidden.png").write_bytes(b"hidden")
    out = tmp_path / "out.npy"
    qvlfast("embed", small_checkpoint, media, "-o", out, code=1)
    rows = np.load(out)
    with Embedder.from_pretrained(small_checkpoint) as embedder:
        good = embedder.encode([{"image": media / "b/deep/ä ü.JPG"}, {"image": media / "z.png"}])
    np.testing.assert_allclose(rows[1:], good, atol=SAME)
    names = [entry["id"] for entry in read_lines(tmp_path / "out.npy.ids.jsonl")]
    assert names == ["a.png", "b/deep/ä ü.JPG", "z.png"]
    errors = read_lines(tmp_path / "out.npy.errors.jsonl")
    assert [(e["id"], e["code"]) for e in errors] == [("a.png", "unreadable")]


@pytest.mark.parametrize(
    ("stdin", "options", "count"),
    [
        ("grüße\n\n日本".encode(), (), 3),
        (b'\n"one"\n\n{"text": "two"}\n', (), 2),
        (b'"one"\n"two"\n', ("--format", "text"), 2),
    ],
    ids=["text", "jsonl", "text by option"],
)
def test_standard_input(
    small_checkpoint: Path, stdin: bytes, options: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    out = tmp_path / "out.npy"
    qvlfast("embed", small_checkpoint, "-", "-o", out, *options, stdin=stdin)
    texts = stdin.decode().splitlines()
    if count == 2 and not options and stdin.startswith(b"\n"):
        texts = ["one", "two"]
    with Embedder.from_pretrained(small_checkpoint) as embedder:
        np.testing.assert_allclose(np.load(out), embedder.encode(texts), atol=SAME)


def test_no_items(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    qvlfast("embed", small_checkpoint, "-", "-o", out, stdin=b"")
    assert np.load(out).shape == (0, 32)


def test_too_long(small_checkpoint: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "long.jsonl", ["word " * 300, "short", "another " * 200])
    out = tmp_path / "out.npy"
    limit = ("--max-length", "64")
    _, error = qvlfast("embed", small_checkpoint, lines, "-o", out, *limit)
    assert "text was lost from the end: 2 items" in error and "warning" not in error
    qvlfast(
        "embed", small_checkpoint, lines, "-o", out, *limit, "--no-truncate", "--restart", code=1
    )
    assert read_lines(tmp_path / "out.npy.errors.jsonl")[0]["code"] == "too_long"


def test_an_output_is_not_overwritten(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    qvlfast("embed", small_checkpoint, "-", "-o", out, stdin=b"one\ntwo\n")
    before = out.read_bytes()
    _, error = qvlfast("embed", small_checkpoint, "-", "-o", out, stdin=b"three\n", code=2)
    assert "--restart" in error
    assert out.read_bytes() == before
    qvlfast("embed", small_checkpoint, "-", "-o", out, "--restart", stdin=b"three\n")
    assert np.load(out).shape == (1, 32)


def start_and_stop(arguments: Sequence[str | Path], journal: Path, how: signal.Signals) -> int:
    """Start a run, end it by a signal once it has stored something, and return its exit code."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 2:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert b"Traceback" not in error
    return process.returncode


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[Any] = [f"text number {i} " + "word " * (i % 40) for i in range(3000)]
    for i in range(0, 3000, 500):
        lines[i] = {"nothing": i}
    return write_lines(tmp_path_factory.mktemp("many") / "many.jsonl", lines)


@pytest.fixture(scope="module")
def uninterrupted(small_checkpoint: Path, many: Path) -> Path:
    out = many.parent / "whole.npy"
    qvlfast("embed", small_checkpoint, many, "-o", out, "--batch-tokens", "1", code=1)
    return out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(
    small_checkpoint: Path, many: Path, uninterrupted: Path, how: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "out.npy"
    work = tmp_path / "out.npy.work"
    arguments = ("embed", small_checkpoint, many, "-o", out, "--batch-tokens", "1")
    code = start_and_stop(arguments, work / "journal.jsonl", how)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists()
    done = read_lines(work / "journal.jsonl")[-1]["done"]
    assert 0 < done < 3000
    # A process that was killed may leave more than it had committed.
    for name in ("rows.raw", "ids.jsonl", "errors.jsonl", "journal.jsonl"):
        with (work / name).open("ab") as file:
            file.write(b'{"half a li')
    _, error = qvlfast(*arguments, code=1)
    assert f"going on after {done} items" in error
    for suffix in ("", ".ids.jsonl", ".errors.jsonl"):
        got = out.with_name(out.name + suffix).read_bytes()
        assert got == uninterrupted.with_name(uninterrupted.name + suffix).read_bytes()
    check_left_over(out, "ids.jsonl", "errors.jsonl")


def test_batches_do_not_change_the_result(
    small_checkpoint: Path, many: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.npy"
    arguments = ("embed", small_checkpoint, many, "-o", out)
    start_and_stop(arguments, tmp_path / "out.npy.work/journal.jsonl", signal.SIGKILL)
    qvlfast(*arguments, code=1)
    np.testing.assert_allclose(np.load(out), np.load(uninterrupted), atol=SAME)


def test_a_run_goes_on_with_what_it_was_begun_with_only(
    small_checkpoint: Path, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.npy"
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(many.read_bytes())
    arguments = ("embed", small_checkpoint, lines, "-o", out)
    journal = tmp_path / "out.npy.work" / "journal.jsonl"
    start_and_stop(arguments, journal, signal.SIGKILL)
    before = journal.read_bytes()

    _, error = qvlfast(*arguments, "--dimensions", "8", code=2)
    assert "dimensions was None, now 8" in error
    _, error = qvlfast(*arguments, "--format", "text", code=2)
    assert "format was 'jsonl', now 'text'" in error
    assert "--restart" in error
    other = write_checkpoint(tmp_path / "other", SMALL, seed=1)
    _, error = qvlfast("embed", other, lines, "-o", out, code=2)
    assert "the model is another one" in error
    text = lines.read_text(encoding="utf-8")
    lines.write_text('"inserted"\n' + text, encoding="utf-8")
    _, error = qvlfast(*arguments, code=2)
    assert "no longer those" in error
    assert journal.read_bytes() == before

    lines.write_text('"only one"\n', encoding="utf-8")
    qvlfast(*arguments, "--restart")
    assert np.load(out).shape == (1, 32)


def test_two_processes_do_not_share_an_output(
    small_checkpoint: Path, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.npy"
    arguments = ("embed", small_checkpoint, many, "-o", out)
    first = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        while not (tmp_path / "out.npy.work" / "journal.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second begins
        _, error = qvlfast(*arguments, code=2)
        assert "another process" in error
    finally:
        first.kill()
        first.wait()


def peak_bytes(arguments: Sequence[str | Path]) -> int:
    """The most memory that the command took."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """50,000 lines take what 5,000 take; their vectors alone are 100 MB, the texts 25."""
    model = write_checkpoint(tmp_path / "model", {**SMALL, "hidden": 512})
    peaks = []
    for count in (5_000, 50_000):
        lines = write_lines(
            tmp_path / f"{count}.jsonl", [f"{i} " + "some words " * 20 for i in range(count)]
        )
        out = tmp_path / f"{count}.npy"
        peaks.append(peak_bytes(("embed", model, lines, "-o", out)))
        assert np.load(out, mmap_mode="r").shape == (count, 512)
    assert peaks[1] - peaks[0] < 30 << 20, peaks
