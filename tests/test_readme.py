"""The README's Python, run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.samples import picture

ROOT = Path(__file__).resolve().parents[1]


def test_the_lines_in_the_readme_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = re.findall(r'"(Qwen/[\w.-]+)"', code)
    assert len(names) == 2
    for name in names:  # an offline cache in which both names are the tiny checkpoint
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(revision)
        (repo / "snapshots").mkdir()
        (repo / "snapshots" / revision).symlink_to(tiny_checkpoint)
    picture(120, 80).save(tmp_path / "photo.jpg")
    picture(80, 120, seed=1).save(tmp_path / "scan.png")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[0].startswith("[[")
    scores = [float(line.split()[0]) for line in lines[1:]]
    assert scores == sorted(scores, reverse=True)
