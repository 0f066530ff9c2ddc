"""``qvlfast embed`` and the files of its user: none is lost, and errors name them."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from qvlfast.cli import main
from qvlfast.cli.sources import open_source
from qvlfast.cli.work import Work
from qvlfast.inputs import parse_item
from tests.test_cli_embed import qvlfast, read_lines, small_checkpoint, write_lines

__all__ = ["small_checkpoint"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command ends with."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qvlfast: ") and error.count("\n") == 1, error
    return error


def everything(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_input_is_not_overwritten(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "same.jsonl", ["one", "two"])
    (tmp_path / "link.jsonl").symlink_to(lines)
    (tmp_path / "hard.jsonl").hardlink_to(lines)
    (tmp_path / "out.npy.ids.jsonl").symlink_to(lines)
    (tmp_path / "other.npy.work").mkdir()
    (tmp_path / "other.npy.work" / "ids.jsonl").symlink_to(lines)
    before = everything(tmp_path)
    for name in ("same.jsonl", "link.jsonl", "hard.jsonl", "out.npy", "other.npy"):
        error = refused(
            capsys, "embed", small_checkpoint, lines, "-o", tmp_path / name, "--restart"
        )
        assert "is one of the outputs" in error
    with lines.open("rb") as stdin:
        command = ("embed", small_checkpoint, "-", "-o", lines, "--restart")
        _, error = qvlfast(*command, code=2, stdin=stdin)
    assert "standard input is" in error
    assert everything(tmp_path) == before


def test_a_folder_of_the_user_is_not_touched(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", ["one"])
    out = tmp_path / "out.npy"
    folder = tmp_path / "out.npy.work"
    folder.mkdir()
    (folder / "precious.txt").write_text("precious")
    before = everything(tmp_path)
    for option in ("--quiet", "--restart"):
        error = refused(capsys, "embed", small_checkpoint, lines, "-o", out, option)
        assert f"{folder} is not of an interrupted run" in error
    assert everything(tmp_path) == before
    # An empty one is what a process leaves that was killed at once.
    (folder / "precious.txt").unlink()
    assert main(["embed", str(small_checkpoint), str(lines), "-o", str(out), "--quiet"]) == 0
    assert not folder.exists()


def test_files_that_come_to_our_folder_stay(tmp_path: Path) -> None:
    work = Work(tmp_path / "out.npy", [], {"model": "one"}, restart=False)
    (work.folder / "precious.txt").write_text("precious")
    work.remove()
    assert everything(tmp_path) == {"out.npy.work/precious.txt": b"precious"}


@pytest.mark.parametrize(
    ("out", "kept"),
    [
        ("out.npy", "out.npy.ids.jsonl"),
        ("out.npy", "out.npy.errors.jsonl"),
        ("out.npy", "out.npy.scales.npy"),
        ("out.safetensors", "out.safetensors.ids.jsonl"),
        ("out.jsonl", "out.jsonl.errors.jsonl"),
    ],
)
def test_side_files_are_not_overwritten(
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    out: str,
    kept: str,
) -> None:
    lines = write_lines(tmp_path / "in.jsonl", ["one"])
    (tmp_path / kept).write_text("mine")
    before = everything(tmp_path)
    command = ("embed", small_checkpoint, lines, "-o", tmp_path / out, "--quiet")
    assert f"{kept} exists: --restart replaces it" in refused(capsys, *command)
    assert everything(tmp_path) == before
    assert main([*map(str, command), "--restart"]) == 0
    assert everything(tmp_path).get(kept) != b"mine"


def test_what_no_format_writes_is_left_alone(small_checkpoint: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "in.jsonl", ["one"])
    for name in ("out.jsonl.ids.jsonl", "out.jsonl.tmp", "out.jsonl.errors.jsonl.tmp"):
        (tmp_path / name).write_text("mine")
    before = everything(tmp_path)
    out = tmp_path / "out.jsonl"
    assert main(["embed", str(small_checkpoint), str(lines), "-o", str(out), "--quiet"]) == 0
    out.unlink()
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "journal",
    [
        b"garbage\n",
        b"[1]\n[2]\n",
        b'{"version": 1, "model": "one"}\n{"done": 5}\n',
        b'{"version": 1, "model": "one"}\n{"done": 5, "sizes": [9, 9, 9]}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["no JSON", "no objects", "no state", "files cut short", "deep"],
)
def test_a_damaged_journal(tmp_path: Path, journal: bytes) -> None:
    folder = tmp_path / "out.npy.work"
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(journal)
    with pytest.raises(ValueError, match=r"journal\.jsonl is damaged: --restart"):
        Work(tmp_path / "out.npy", [], {"model": "one"}, restart=False)
    assert (folder / "journal.jsonl").read_bytes() == journal
    Work(tmp_path / "out.npy", [], {"model": "one"}, restart=True).remove()
    assert not folder.exists()


def test_one_json_document_is_not_lines(
    small_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = {
        "array.json": '[\n {"text": "a"},\n {"text": "b"}\n]\n',
        "line.json": '[{"text": "a"}, {"text": "b"}]\n',
        "array.jsonl": '\n[\n {"text": "a"},\n {"text": "b"}\n]\n',
        "object.json": '{\n "text":\n "b"\n}\n',
    }
    for name, text in documents.items():
        (tmp_path / name).write_text(text)
    before = everything(tmp_path)
    for name in documents:
        out = tmp_path / "out.npy"
        assert "jq -c" in refused(capsys, "embed", small_checkpoint, tmp_path / name, "-o", out)
    assert everything(tmp_path) == before
    for text in documents.values():
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        error = refused(capsys, "embed", small_checkpoint, "-", "-o", tmp_path / "out.npy")
        assert "standard input " in error and "jq -c" in error and "--format text" in error
    for text in ('[{"text": "a"}, \n {"text": "b"}]', '["a",\n"b"]', '{"text": "a",\n "fps": 2}'):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        error = refused(capsys, "embed", small_checkpoint, "-", "-o", tmp_path / "out.npy")
        assert "jq -c" in error and "--format text" in error
    (tmp_path / "first.jsonl").write_text('["a bad item"]\n"a good one"\n')
    assert open_source(str(tmp_path / "first.jsonl")).total == 2


@pytest.mark.parametrize(
    ("form", "text", "kind", "found"),
    [
        ("auto", b"\xef\xbb\xbf\n \n{}\n\nx", "jsonl", [b"{}", b"x"]),
        ("auto", b'\xef\xbb\xbf"a"\r\n"b"', "jsonl", [b'"a"', b'"b"']),
        ("auto", b'{"text": "a"}\n"b"', "jsonl", [b'{"text": "a"}', b'"b"']),
        ("auto", b"\n[1\n\n", "text", [b"", b"[1", b""]),
        ("auto", b"[1] a reference\n{", "text", [b"[1] a reference", b"{"]),
        ("auto", b"", "text", []),
        ("text", b"[\n{", "text", [b"[", b"{"]),
        ("jsonl", b"[1]\nx", "jsonl", [b"[1]", b"x"]),
    ],
)
def test_pipes_are_read_once(
    form: str, text: bytes, kind: str, found: list[bytes], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.jsonl.gz"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text,))
    writer.start()
    source = open_source(str(pipe), form)
    writer.join()
    lines = list(source)
    assert source.total is None and [line.raw for line in lines] == found
    assert [line.index for line in lines] == list(range(len(found)))
    assert {line.kind for line in lines} <= {kind} and {line.base for line in lines} <= {tmp_path}
    file = tmp_path / "file"
    file.write_bytes(text)
    assert list(open_source(str(file), form)) == lines


@pytest.mark.parametrize("name", ["image", "video", "id", "text", "fps", "unknown"])
@pytest.mark.parametrize("depth", [3, 400, 600, 5000, 100_000])
def test_a_deep_value_is_an_item_s_error(tmp_path: Path, name: str, depth: int) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"{name}": {"[" * depth}"a.png"{"]" * depth}}}\n"good"\n')
    first, second = open_source(str(path))
    with pytest.raises(ValueError):
        parse_item(first.parse()[1])
    assert second.parse() == (1, "good")


def test_deep_values_end_no_command(small_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    deep = [f'{{"image": {"[" * depth}{"]" * depth}}}' for depth in (300, 600, 900)]
    path.write_text("\n".join(['"good"', *deep, '"too"', ""]))
    out = tmp_path / "out.npy"
    qvlfast("embed", small_checkpoint, path, "-o", out, "--quiet", code=1)
    assert np.isfinite(np.load(out)).all(axis=1).tolist() == [True, False, False, False, True]
    assert [entry["index"] for entry in read_lines(tmp_path / "out.npy.errors.jsonl")] == [1, 2, 3]
    printed, _ = qvlfast("rerank", small_checkpoint, "query", path, "--json", code=1)
    assert sorted(json.loads(line)["index"] for line in printed.splitlines()) == [0, 4]


def test_names_of_media_are_relative_to_the_file(tmp_path: Path) -> None:
    lines = [{"image": ["a.png"]}, {"video": [["b.png", "c.png"], ["d.png", "e.png"]]}]
    first, second = open_source(str(write_lines(tmp_path / "in.jsonl", lines)))
    assert first.parse()[1] == {"image": [f"{tmp_path}/a.png"]}
    videos = [[f"{tmp_path}/{name}.png" for name in pair] for pair in ("bc", "de")]
    assert second.parse()[1] == {"video": videos}


def test_an_empty_name_is_no_input(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npy"
    assert "input is empty" in refused(capsys, "embed", small_checkpoint, "", "-o", out)
    assert "input is empty" in refused(capsys, "rerank", small_checkpoint, "query", "")
    assert not out.exists()
