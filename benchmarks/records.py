"""What every committed figure says of itself: machine, versions, commit."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from qvlfast import _C

RESULTS = Path(__file__).parent / "results"
# Seconds before one engine is timed after another: threads that OpenMP keeps spinning after its
# last work would take a core from it.
SETTLE = 0.05


def commit() -> str:
    """The commit that ran, ``-dirty`` if files had changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """The processor's name, as far as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def here() -> dict[str, Any]:
    """The columns of a figure of the CPU that say where it was measured."""
    return {
        "threads": _C.num_threads(),
        "isa": _C.isa(),
        "machine": machine(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def append(rows: Sequence[Any], path: Path) -> None:
    """Add dataclass instances of one kind to a CSV file, which is made if it is not there."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
