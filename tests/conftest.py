"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from benchmarks.checkpoints import write_checkpoint

# Timing decides no test. Under CI the examples are the same each time, so that a failure there
# belongs to the change under test; elsewhere they are fresh.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the ``tiny`` synthetic checkpoint in float32, with the real tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny")


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the ``odd`` checkpoint: sizes off the usual multiples, untied, three shards."""
    folder = tmp_path_factory.mktemp("checkpoint") / "odd"
    return write_checkpoint(folder, "odd", shards=3, spelling="rope_scaling")
