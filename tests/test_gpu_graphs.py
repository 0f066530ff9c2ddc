"""CUDA graphs on a GPU: pytest -m gpu, with TRITON_INTERPRET=0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qvlfast.graphs import graphs_for
from tests.test_graphs import load, texts

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_replays_equal_running(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, CUDA, "triton", torch.bfloat16)
    graphs = graphs_for(model.forward, CUDA, model.ops.name, 1024)
    assert graphs is not None
    for lengths in ((5,), (7,), (16, 3), (200,), (6,), (300,), (2, 15)):
        batch = texts(model, *lengths, device=CUDA)
        expected = model.forward(batch)
        got = graphs(batch)
        # Blocks of another number of rows round sums in another order.
        cosine = torch.nn.functional.cosine_similarity(got, expected)
        assert (cosine > 0.9995).all()


def test_a_replay_is_repeatable(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, CUDA, "triton", torch.bfloat16)
    graphs = graphs_for(model.forward, CUDA, model.ops.name, 1024)
    assert graphs is not None
    batch, other = texts(model, 9, device=CUDA), texts(model, 12, device=CUDA)
    first = graphs(batch).clone()
    graphs(other)
    assert torch.equal(graphs(batch), first)
