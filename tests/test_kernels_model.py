"""The whole model through Triton's interpreter, against the reference backend."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import LAUNCHES

from qvlfast import Embedder, Reranker
from qvlfast.dispatch import BACKENDS, choose_ops
from qvlfast.errors import BackendError
from qvlfast.ops import Ops
from tests.samples import frames, picture

CPU = torch.device("cpu")
# Two float32 implementations that add in different orders.
TOLERANCE = 1e-5

OPS = {name for name, _ in inspect.getmembers(Ops, inspect.isfunction)}
# The kernels of a model in floating point: preparing weights is none, and the gated linear is two.
KERNELS = OPS - {"prepare", "gated_linear"} | {"swiglu"}

ITEMS: list[Any] = [
    "a text",
    {"image": picture(96, 64), "text": "captioned", "instruction": "Find the picture."},
    {"video": frames(4, 64, 64), "text": "moving"},
]
SMALL: Any = [{"image": picture(64, 40), "text": "a text"}]


@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_embedder_equals_the_reference(shape: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{shape}_checkpoint")
    with Embedder.from_pretrained(folder, device="cpu", backend="reference") as reference:
        expected = reference.encode(ITEMS)
    LAUNCHES.clear()
    with Embedder.from_pretrained(folder, device="cpu", backend="triton") as embedder:
        assert embedder.backend == "triton"
        got = embedder.encode(ITEMS)
    assert np.abs(got - expected).max() < TOLERANCE
    assert set(LAUNCHES) == KERNELS - {"score"}, "an op was computed by something else"


def test_reranker_equals_the_reference(odd_checkpoint: Path) -> None:
    query: Any = {"text": "the query", "image": picture(64, 40)}
    documents: list[Any] = ["a text", {"video": frames(2, 64, 64)}]

    def scores(backend: str) -> list[float]:
        with Reranker.from_pretrained(odd_checkpoint, device="cpu", backend=backend) as reranker:
            ranked = reranker.rank(query, documents)
        return [r["score"] for r in sorted(ranked, key=lambda r: r["index"])]

    LAUNCHES.clear()
    got = scores("triton")
    assert set(LAUNCHES) == KERNELS, "an op was computed by something else"
    np.testing.assert_allclose(got, scores("reference"), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_is_no_further_from_the_truth(tiny_checkpoint: Path, dtype: str) -> None:
    """The truth is float32 arithmetic on the same rounded weights."""

    def vectors(backend: str, wide: bool) -> np.ndarray:
        with Embedder.from_pretrained(
            tiny_checkpoint, device="cpu", dtype=dtype, backend=backend
        ) as embedder:
            model = embedder._runtime.engine.model
            if wide:
                model.weights = widened(model.weights)
            return embedder.encode(SMALL)

    truth = vectors("reference", wide=True)
    error = np.linalg.norm(vectors("triton", wide=False) - truth, axis=1)
    allowed = np.linalg.norm(vectors("reference", wide=False) - truth, axis=1)
    assert 0 < error[0] <= 1.5 * allowed[0]


def widened(weights: Any) -> Any:
    """The same nested dataclasses and tuples with every tensor in float32."""
    if isinstance(weights, torch.Tensor):
        return weights.float()
    if isinstance(weights, tuple):
        return tuple(map(widened, weights))
    if hasattr(weights, "__dataclass_fields__"):
        return type(weights)(**{n: widened(getattr(weights, n)) for n in vars(weights)})
    return weights


def test_every_op_is_replaced() -> None:
    assert {name for name in vars(type(choose_ops("triton", CPU))) if name in OPS} == OPS
    assert type(choose_ops("auto", CPU)) is Ops
    assert "triton" in BACKENDS


def test_refusals_are_backend_errors() -> None:
    ops = choose_ops("triton", CPU)
    with pytest.raises(BackendError, match=r"backend 'triton' refuses linear: x is torch.float64"):
        x = torch.zeros(1, 4, dtype=torch.float64)
        ops.linear(x, ops.prepare([x]))


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def test_no_falling_back_on_a_cpu() -> None:
    printed = run(
        "import torch\n"
        "from qvlfast.dispatch import choose_ops\n"
        "from qvlfast.errors import BackendError\n"
        "try:\n"
        "    choose_ops('triton', torch.device('cpu'))\n"
        "except BackendError as error:\n"
        "    print(error)\n",
        TRITON_INTERPRET="0",
    )
    assert "needs device='cuda', not 'cpu'" in printed
    assert "TRITON_INTERPRET=1" in printed


def test_missing_triton_is_named_with_its_remedy() -> None:
    printed = run(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from qvlfast.dispatch import choose_ops\n"
        "from qvlfast.errors import BackendError\n"
        "try:\n"
        "    choose_ops('triton', torch.device('cpu'))\n"
        "except BackendError as error:\n"
        "    print(error)\n"
    )
    assert "pip install 'qvlfast[gpu]'" in printed
