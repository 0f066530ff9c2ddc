"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Both are read once, on import. Triton kernels run in its interpreter, unless the caller says
# TRITON_INTERPRET=0 to run those that have a GPU to run on. The interpreter multiplies small
# matrices in NumPy, where threads cost more than they bring.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from benchmarks.checkpoints import write_checkpoint
from tests.guards import guarded_empty

# Timing decides no test. Under CI the examples are the same each time, so that a failure there
# belongs to the change under test; elsewhere they are fresh.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# A shell starts what it puts in the background with SIGINT ignored, and children inherit that; the
# tests of Ctrl-C send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the ``tiny`` synthetic checkpoint in float32, with the real tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny")


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the ``odd`` checkpoint: sizes off the usual multiples, untied, three shards."""
    folder = tmp_path_factory.mktemp("checkpoint") / "odd"
    return write_checkpoint(folder, "odd", shards=3, spelling="rope_scaling")


@pytest.fixture
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated in the test starts as NaN, between guards that must be untouched after."""
    with guarded_empty(monkeypatch):
        yield
