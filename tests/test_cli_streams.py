"""The command line with streams that are closed, full or narrow, and with options it refuses."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from qvlfast.cli import main
from qvlfast.cli.streams import naming, one_line, warnings_as_messages
from tests.test_cli_embed import (
    ROOT,
    command,
    environment,
    qvlfast,
    read_lines,
    small_checkpoint,
    write_lines,
)

__all__ = ["small_checkpoint"]


def shell(
    redirection: str, *arguments: str | Path, variables: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run the command with streams as a shell redirects them: exit code, stdout, stderr."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command(*arguments)],
        cwd=ROOT,
        env={**environment(), **(variables or {})},
        capture_output=True,
        timeout=300,
        check=False,
    )
    error = done.stderr.decode()
    assert "Traceback" not in error and "Exception ignored" not in error
    return done.returncode, done.stdout.decode(), error


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">&-", "Bad file descriptor"),
        (">/dev/full", "No space left on device"),
    ],
)
def test_an_output_that_cannot_be_written(
    small_checkpoint: Path, redirection: str, reason: str, buffered: str
) -> None:
    for arguments in (("--version",), ("info", small_checkpoint, "--json", "--device", "cpu")):
        code, _, error = shell(redirection, *arguments, variables={"PYTHONUNBUFFERED": buffered})
        assert (code, error) == (2, f"qvlfast: standard output: {reason}\n")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    "redirection",
    ["2>&-", "<&- >&- 2>&-", "2>/dev/full"],
)
def test_messages_that_cannot_be_written_stop_nothing(
    small_checkpoint: Path, tmp_path: Path, redirection: str, buffered: str
) -> None:
    variables = {"PYTHONUNBUFFERED": buffered}
    for arguments in (("unknown",), ("info", tmp_path / "none")):
        assert shell(redirection, *arguments, variables=variables) == (2, "", "")
    lines = write_lines(tmp_path / "in.jsonl", ["one", 2])
    out = tmp_path / "out.npy"
    arguments = ("embed", small_checkpoint, lines, "-o", out)
    assert shell(redirection, *arguments, variables=variables) == (1, "", "")
    assert np.isfinite(np.load(out)).all(axis=1).tolist() == [True, False]
    assert [entry["index"] for entry in read_lines(tmp_path / "out.npy.errors.jsonl")] == [1]
    assert not (tmp_path / "out.npy.work").exists()


def test_a_closed_input(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    code, _, error = shell("<&-", "embed", small_checkpoint, "-", "-o", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "standard input is closed" in error
    assert not out.exists()


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii", "latin-1"])
def test_names_that_the_output_cannot_encode(
    small_checkpoint: Path, tmp_path: Path, encoding: str
) -> None:
    names = ["\udc80", "кот", "🍕é", "two\nlines\x1b[31m"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "id": name}) + "\n" for name in names))
    variables = {"PYTHONIOENCODING": encoding}
    arguments = ("rerank", small_checkpoint, "query", path)
    done = subprocess.run(
        command(*arguments, "--json"), cwd=ROOT, env={**environment(), **variables},
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["index"]: entry["id"] for entry in got} == dict(enumerate(names))
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env={**environment(), **variables}, capture_output=True,
        timeout=300, check=True,
    )  # fmt: skip
    table = done.stdout.decode(encoding.partition(":")[0])
    assert len(table.splitlines()) == len(names)
    assert "\\udc80" in table and "two\\nlines\\x1b[31m" in table


def test_one_line() -> None:
    assert one_line("a\tb\r\n\x1b\x85\u2028\u2029c") == r"a\tb\r\n\x1b\x85\u2028\u2029c"
    assert one_line("a\u202egnp.exe") == r"a\u202egnp.exe"
    assert one_line("👩‍👩‍👧 日本 é \\n") == "👩‍👩‍👧 日本 é \\n"


def test_warnings_are_one_line(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = write_lines(tmp_path / "documents.jsonl", ["word " * 500])
    arguments = ["rerank", small_checkpoint, "query", documents, "--max-length", "200"]
    assert main([*map(str, arguments)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("qvlfast: warning: 1 of 1 inputs") and error.count("\n") == 1
    PIL.Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    with warnings_as_messages():
        PIL.Image.open(tmp_path / "large.png").close()  # of a size that Pillow warns of
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "qvlfast: warning: two\\nlines\n"


def test_errors_name_a_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, naming(tmp_path / "out.npy"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "out.npy")
    with pytest.raises(OSError) as caught, naming(tmp_path / "out.npy"):
        raise OSError(28, "No space left on device", "other")
    assert caught.value.filename == "other"


def test_options_that_cannot_be_kept(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is refused before any work, in one line."""
    model, out = str(tiny_checkpoint), str(tmp_path / "out")
    sheet = str(tmp_path / "sheet")
    cases = [
        (["quantize", model, out, "--group", "32"], "--group is for --format int4"),
        (["demo", "cat", "--sheet", f"{sheet}.xyz"], "end it in .png"),
        (["demo", "cat", "--sheet", f"{tmp_path / 'none' / 'sheet.png'}"], "is no folder"),
        (["demo", "cat", "--sheet", f"{sheet}.png", "--top", "5000"], "has room for 100"),
        (["demo", "\udcff", "--sheet", f"{sheet}.png"], "is not valid Unicode"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
        assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_verify_uses_its_picture_or_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    assert main(["verify", str(tiny_checkpoint), "--picture", str(picture)]) == 2
    assert f"{picture}: No such file" in capsys.readouterr().err
    picture.write_bytes(b"never read")
    for options in (["--picture", str(picture)], ["--fetch-picture"]):
        assert main(["verify", str(tiny_checkpoint), *options]) == 2
        assert "give --published too" in capsys.readouterr().err


def test_info_plans_for_no_more_than_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--batch-tokens", "--batch-patches", "--max-length"):
        with pytest.raises(SystemExit) as stopped:
            main(["info", "MODEL", option, "99999999999999"])
        assert stopped.value.code == 2
        assert "99999999999999 is above 262144" in capsys.readouterr().err


def test_sizes_of_a_small_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, _ = qvlfast("quantize", tiny_checkpoint, tmp_path / "out")
    assert "KiB became" in out or "MiB became" in out
