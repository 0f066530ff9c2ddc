"""The whole model through Triton's interpreter, against the reference backend."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qvlfast.kernels.common import LAUNCHES

from qvlfast import Embedder, Quantization, Reranker
from qvlfast.backends.triton import TritonOps
from qvlfast.dispatch import BACKENDS, choose_ops
from qvlfast.errors import BackendError
from qvlfast.ops import Linear, Ops, QuantisedRows
from qvlfast.ops.rows import quantise_rows
from qvlfast.quant import Fp8BlockWeight
from qvlfast.quant.convert import convert
from qvlfast.quant.stored import QuantizationWarning
from tests.samples import frames, picture
from tests.test_quant_files import write

CPU = torch.device("cpu")
# Two float32 implementations that add in different orders.
TOLERANCE = 1e-5

OPS = {name for name, entry in vars(Ops).items() if isinstance(entry, staticmethod)}
# The kernels of a model in floating point: preparing weights is none, and a product that goes onto
# hidden states is launched as any other.
KERNELS = OPS - {"prepare", "add_linear"}
# Those that change their first argument.
IN_PLACE = {"add_linear", "add_rows", "rope", "norm_rope"}

ITEMS: list[Any] = [
    "a text",
    {"image": picture(96, 64), "text": "captioned", "instruction": "Find the picture."},
    {"video": frames(4, 64, 64), "text": "moving"},
]
SMALL: Any = [{"image": picture(64, 40), "text": "a text"}]


@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_embedder_equals_the_reference(shape: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{shape}_checkpoint")
    items = ITEMS if shape == "odd" else SMALL
    expected = vectors(folder, "reference", items)
    LAUNCHES.clear()
    with Embedder.from_pretrained(folder, device="cpu", backend="triton") as embedder:
        assert embedder.backend == "triton"
        got = embedder.encode(items)
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
    assert set(LAUNCHES) == KERNELS - {"pool"}, "an op was computed by something else"
    np.testing.assert_allclose(got, scores("reference"), atol=TOLERANCE)


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_quantised_embedder(odd_checkpoint: Path, form: str) -> None:
    """Vision too, so that every epilogue follows a quantised product.

    Two float32 computations differ in a last bit, which tips a value over the edge between two
    steps of the quantised rows, whose effect the next rows enlarge. So the whole is as far from
    the model in floating point as the reference's is; the test below compares op by op.
    """
    plan = Quantization(form, vision=True)
    LAUNCHES.clear()
    got = vectors(odd_checkpoint, "triton", ITEMS[1:2], quantization=plan)
    expected = (KERNELS - {"score"}) | {f"linear_{form}", f"gated_linear_{form}", "quantise_rows"}
    assert set(LAUNCHES) == expected - {"gated_linear"}, "an op was computed by something else"
    layers, blocks, mergers = 3, 3, 3
    assert LAUNCHES["linear"] == 2 * mergers
    assert LAUNCHES[f"linear_{form}"] == 4 * layers + 4 * blocks
    assert LAUNCHES[f"gated_linear_{form}"] == layers
    # Norms quantise in their own pass; what goes into o_proj, down_proj, proj and fc2 does not.
    assert LAUNCHES["quantise_rows"] == 2 * layers + 2 * blocks
    # The first projections share theirs, but in the last layer, where the queries are fewer.
    assert LAUNCHES["rms_norm"] == 2 * layers + 1
    truth = vectors(odd_checkpoint, "reference", ITEMS[1:2])
    allowed = vectors(odd_checkpoint, "reference", ITEMS[1:2], quantization=plan) - truth
    assert 0 < np.linalg.norm(got - truth) <= 1.5 * np.linalg.norm(allowed)


def test_int4_weights_alone_equal_the_reference(odd_checkpoint: Path) -> None:
    """Nothing is rounded but the weights, so both are two float32 computations of the same."""
    plan = Quantization("int4", vision=True, group=32, weight_only=True)
    expected = vectors(odd_checkpoint, "reference", ITEMS, quantization=plan)
    LAUNCHES.clear()
    got = vectors(odd_checkpoint, "triton", ITEMS, quantization=plan)
    assert np.abs(got - expected).max() < TOLERANCE
    kernels = KERNELS - {"score", "gated_linear"}
    kernels |= {"linear_int4_float", "gated_linear_int4_float"}
    assert set(LAUNCHES) == kernels, "an op was computed by something else"
    layers, blocks, mergers = 3, 3, 3
    passes = LAUNCHES["gated_linear_int4_float"] // layers
    assert LAUNCHES["linear_int4_float"] >= 4 * layers * passes
    pictured, rest = divmod(LAUNCHES["linear_int4_float"] - 4 * layers * passes, 4 * blocks)
    assert rest == 0 and LAUNCHES["linear"] == 2 * mergers * pictured > 0


def test_a_reranker_with_int4_weights_alone(odd_checkpoint: Path) -> None:
    plan = Quantization("int4", weight_only=True)

    def scores(backend: str) -> list[float]:
        with Reranker.from_pretrained(
            odd_checkpoint, device="cpu", backend=backend, quantization=plan
        ) as reranker:
            return list(reranker.predict([("the query", "a text"), ("the query", SMALL[0])]))

    LAUNCHES.clear()
    got = scores("triton")
    assert LAUNCHES["linear_int4_float"] and LAUNCHES["gated_linear_int4_float"]
    assert LAUNCHES["score"] and not LAUNCHES["quantise_rows"] and not LAUNCHES["gated_linear"]
    np.testing.assert_allclose(got, scores("reference"), atol=TOLERANCE)


def test_a_file_of_int4_can_be_computed_with_float_rows(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "int4"
    convert(tiny_checkpoint, folder, Quantization("int4"))
    plan = Quantization("int4", weight_only=True)
    LAUNCHES.clear()
    got = vectors(folder, "triton", SMALL, quantization=plan)
    assert LAUNCHES["linear_int4_float"] and not LAUNCHES["linear_int4"]
    expected = vectors(folder, "reference", SMALL, quantization=plan)
    assert np.abs(got - expected).max() < TOLERANCE


class Lockstep(Ops):
    """Both backends on the reference's values, op by op; an op that differs fails at once."""

    name = "lockstep"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name not in OPS:
            return super().__getattribute__(name)
        one, other = getattr(Ops, name), getattr(TritonOps, name)

        def both(*args: Any, **options: Any) -> Any:
            if name == "prepare":
                pair = one(*args, **options), other(*args, **options)
                assert pair[0].rows == pair[1].rows
                return Linear(pair, None, pair[0].rows)
            self.calls[name] += 1
            ones = [a.weight[0] if isinstance(a, Linear) else a for a in args]
            others = [a.weight[1] if isinstance(a, Linear) else a for a in args]
            # In the model's own tensor, whose rows may be apart.
            before = args[0].clone() if name in IN_PLACE else None
            got = other(*others, **options)
            if before is not None:
                got = args[0].clone()
                args[0].copy_(before)
            expected = one(*ones, **options)
            if before is not None:
                expected = args[0]
            exact = name == "linear" and args[1].rows == "int8" and not options.get("activation")
            compare(name, got, expected, exact)
            return None if before is not None else expected

        return both


def compare(name: str, got: Any, expected: Any, exact: bool) -> None:
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            compare(name, one, other, exact)
    elif isinstance(expected, QuantisedRows):
        # The float before may differ by a few last bits: then a value at the edge between two
        # steps goes to the other, and the scale with the largest.
        torch.testing.assert_close(got.scale, expected.scale, rtol=2e-5, atol=0)
        values, truth = got.values.float(), expected.values.float()
        step = 1.0 if expected.values.dtype == torch.int8 else truth.abs() / 8 + 2**-9
        assert ((values - truth).abs() <= step).all(), name
        assert (values != truth).float().mean() < 0.01, name
    elif exact:
        assert torch.equal(got, expected), name
    else:
        most = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * max(most, 1e-3))


def test_quantised_reranker_equals_the_reference_in_lockstep(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Lockstep()
    monkeypatch.setattr("qvlfast.runtime.choose_ops", lambda *args: ops)
    with Reranker.from_pretrained(tiny_checkpoint, quantization="int8") as reranker:
        reranker.rank("the query", ["a text", "another"])
    assert ops.calls["score"] and ops.calls["gated_linear"]


@pytest.mark.parametrize("form", ["int8", "int4", "int4, weights only", "fp8"])
def test_quantised_ops_equal_the_reference_in_lockstep(
    odd_checkpoint: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 products to the bit, and the rest as two float32 computations; every kind of input in
    int8, whose vision tower is quantised too."""
    ops = Lockstep()
    monkeypatch.setattr("qvlfast.runtime.choose_ops", lambda *args: ops)
    form, _, alone = form.partition(", ")
    plan = Quantization(form, vision=form == "int8", group=32, weight_only=bool(alone))
    vectors(odd_checkpoint, "triton", ITEMS if form == "int8" else SMALL, quantization=plan)
    assert set(ops.calls) == OPS - {"prepare", "score"}


def vectors(folder: Path, backend: str, items: list[Any], **options: Any) -> np.ndarray:
    with Embedder.from_pretrained(folder, device="cpu", backend=backend, **options) as embedder:
        return embedder.encode(items)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", [None, Quantization("int4", weight_only=True)])
def test_half_precision_is_no_further_from_the_truth(
    tiny_checkpoint: Path, dtype: str, plan: Quantization | None
) -> None:
    """The truth is float32 arithmetic on the same rounded weights."""

    def rounded(backend: str, wide: bool) -> np.ndarray:
        with Embedder.from_pretrained(
            tiny_checkpoint, device="cpu", dtype=dtype, backend=backend, quantization=plan
        ) as embedder:
            model = embedder._runtime.model
            if wide:
                model.weights = widened(model.weights)
            return embedder.encode(SMALL)

    truth = rounded("reference", wide=True)
    error = np.linalg.norm(rounded("triton", wide=False) - truth, axis=1)
    allowed = np.linalg.norm(rounded("reference", wide=False) - truth, axis=1)
    assert 0 < error[0] <= 1.5 * allowed[0]


def widened(weights: Any) -> Any:
    """The same nested dataclasses and tuples with every float tensor in float32."""
    if isinstance(weights, torch.Tensor):
        return weights.float() if weights.is_floating_point() else weights
    if isinstance(weights, tuple):
        return tuple(map(widened, weights))
    if hasattr(weights, "__dataclass_fields__"):
        return type(weights)(**{n: widened(getattr(weights, n)) for n in vars(weights)})
    return weights


def test_every_op_is_replaced() -> None:
    ops = choose_ops("triton", CPU)
    assert {name for name in vars(type(ops)) if name in OPS} == OPS
    assert ops.keeps == {"int8", "int4", "fp8", "fp8_blocks"}
    assert choose_ops("auto", CPU).name != "triton"
    assert "triton" in BACKENDS


def test_fp8_blocks_are_multiplied_as_they_are() -> None:
    """Two parts whose outputs are no whole blocks, by the dequantised weight."""
    ops, draw = choose_ops("triton", CPU), np.random.default_rng(0).standard_normal
    parts = []
    for n in (130, 40):
        values = torch.from_numpy(draw((n, 200))).float().to(torch.float8_e4m3fn)
        scale = torch.from_numpy(draw((-(-n // 128), 2))).float().exp()
        parts.append(Fp8BlockWeight(values, scale))
    layer = ops.prepare(parts)
    assert layer.rows == "fp8"
    x = quantise_rows(torch.from_numpy(draw((7, 200))).float(), "fp8")
    LAUNCHES.clear()
    got = ops.linear(x, layer)
    assert dict(LAUNCHES) == {"linear_fp8": 1}
    wide = torch.cat([part.dequantise() for part in parts]).double()
    expected = x.values.double() * x.scale.double()[:, None] @ wide.T
    # Products are exact in float32, sums of 200 of them are not.
    bound = 1e-5 * float(expected.abs().max())
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=bound)


def test_a_file_of_fp8_blocks_is_computed_with_as_it_is(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    quantised, plain = write(tiny_checkpoint, tmp_path, "fp8")
    LAUNCHES.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        got = vectors(quantised, "triton", ["a text"])
    assert LAUNCHES["linear_fp8"] and LAUNCHES["gated_linear_fp8"] and not LAUNCHES["linear"]
    # The same weights; activations are rounded besides, as with FP8 by channels.
    truth = vectors(plain, "reference", ["a text"])
    allowed = vectors(plain, "reference", ["a text"], quantization="fp8") - truth
    assert 0 < np.linalg.norm(got - truth) <= 1.5 * np.linalg.norm(allowed)


def test_e4m3_is_refused_before_sm_89(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlfast.kernels.quantise.target_of", lambda device: "sm_87")
    ops = choose_ops("triton", CPU)
    assert ops.keeps == {"int8", "int4"}
    with pytest.raises(BackendError, match=r"refuses prepare: sm_87 has no e4m3.*use int8"):
        ops.prepare([torch.zeros(4, 4)], form="fp8")


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


def test_gpus_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendError, match=r"begins with sm_80, and 'cuda:0' is sm_75: use"):
        choose_ops("triton", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert choose_ops("triton", torch.device("cuda:0")).name == "triton"


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
