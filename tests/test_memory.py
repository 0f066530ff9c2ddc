"""Predicted memory against that of a real run on the CPU, and the arithmetic of weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.checkpoints import write_checkpoint
from qvlfast import Quantization
from qvlfast.arena import Arena
from qvlfast.batch import pack
from qvlfast.checkpoint import Checkpoint
from qvlfast.config import ModelConfig, load_config, load_pixel_config
from qvlfast.dispatch import choose_ops
from qvlfast.memory import (
    ArenaPlan,
    _prompts,
    _scratch,
    keys_values_bytes,
    largest_batch,
    linear_bytes,
    peak_activations,
    visual_bytes,
    weight_bytes,
)
from qvlfast.model import Model
from qvlfast.quant import quantise
from qvlfast.quant.convert import convert
from qvlfast.quant.stored import find_stored
from qvlfast.stand_in import Setup
from qvlfast.weights import expected_shapes, load_weights

CPU = torch.device("cpu")
SHAPE = {"hidden": 256, "ffn": 768, "layers": 6, "vision_hidden": 128, "vision_ffn": 512}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that what grows with tokens is what counts."""
    folder = tmp_path_factory.mktemp("checkpoint") / "wide"
    return write_checkpoint(folder, SHAPE | {"vision_depth": 5})


def load(
    folder: Path, backend: str, dtype: torch.dtype, plan: Quantization | None
) -> tuple[ModelConfig, Model]:
    config, ops = load_config(folder), choose_ops(backend, CPU, dtype)
    weights = load_weights(
        Checkpoint(folder), config, load_pixel_config(folder), ops, dtype=dtype, device=CPU,
        answer_ids=None, quantization=plan,
    )  # fmt: skip
    return config, Model(config, weights, ops)


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [t for f in fields(value) for t in tensors(getattr(value, f.name))]
    return []


def measured(model: Model, prompts: list, plan: ArenaPlan) -> int:
    """Bytes of the inputs, and the most that torch allocated beside them in one forward pass and
    that the pass took of an arena, which must have been enough."""
    batch = pack(prompts, model.config.vision.spatial_merge_size, CPU).batch
    arena = Arena(CPU)
    arena.reserve(plan.size(batch))
    gc.collect()  # what is freed meanwhile would be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.forward(batch, memory=arena)
    assert arena.spilled == 0
    # A finished event carries the sum of its children; allocations alone are leaves.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    heap = int(np.cumsum(changes).max())
    return heap + arena.peak + sum(t.nbytes for t in tensors(batch))


def plan_of(form: str | None) -> Quantization | None:
    """``int4 alone``: with rows in floating point."""
    return form and Quantization(form.removesuffix(" alone"), weight_only=form.endswith(" alone"))


def form_of(plan: Quantization | None) -> Setup:
    return Setup(
        torch.float32,
        form=lambda n: plan.format if plan and plan.covers(n) else "float",
        weight_only=plan is not None and plan.weight_only,
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "form"),
    [
        ("reference", torch.float32, None),
        ("native", torch.float32, None),
        ("native", torch.bfloat16, None),
        ("native", torch.bfloat16, "int8"),
        ("reference", torch.float32, "int4 alone"),
    ],
)
@pytest.mark.parametrize(("tokens", "patches"), [(600, 0), (400, 1024), (64, 1024)])
def test_the_peak_is_that_of_a_run(
    checkpoint: Path, backend: str, dtype: torch.dtype, form: str | None, tokens: int, patches: int
) -> None:
    compare(checkpoint, backend, dtype, form, tokens, patches)


@pytest.mark.parametrize("form", [None, "int8", "int4", "int4 alone"])
@pytest.mark.parametrize(("tokens", "patches"), [(200, 0), (16, 128)])
def test_the_peak_is_that_of_a_run_in_the_interpreter(
    checkpoint: Path, form: str | None, tokens: int, patches: int
) -> None:
    compare(checkpoint, "triton", torch.float32, form, tokens, patches)


def compare(
    checkpoint: Path, backend: str, dtype: torch.dtype, form: str | None, tokens: int, patches: int
) -> None:
    plan = plan_of(form)
    config, model = load(checkpoint, backend, dtype, plan)
    setup = replace(form_of(plan), dtype=dtype, backend=backend)
    predicted = peak_activations(config, setup, tokens=tokens, patches=patches)
    predicted -= _scratch(config, setup, tokens, patches, 8192)
    prompts = _prompts(config, tokens, patches, 8192)
    found = measured(model, prompts, ArenaPlan.measure(config, setup))
    # Below: torch makes fewer copies on a CPU than it does for tensors without storage, in the
    # reference's norms, ropes and attention. Above: tables of positions; and Triton's interpreter
    # holds on to the operands of the kernel before, such as a widened weight.
    above = 1.08 if backend == "triton" else 1.05
    held = SHAPE["hidden"] * SHAPE["ffn"] if backend == "triton" and form == "int4" else 0
    assert 0.9 * predicted <= found <= above * predicted + held


def test_nothing_is_left_of_a_prediction(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    setup = Setup(torch.bfloat16, "native")
    first = peak_activations(config, setup, tokens=300, patches=256)
    assert first == peak_activations(config, setup, tokens=300, patches=256)
    double = peak_activations(config, setup, tokens=600, patches=512)
    assert double == pytest.approx(2 * first, rel=0.02)  # one read token does not double


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (50, 100), (33, 200)])
def test_packed_weights_take_what_is_said(form: str, n: int, k: int) -> None:
    weight = torch.randn(n, k).bfloat16()
    setup = Setup(torch.bfloat16, "native")
    packed = choose_ops("native", CPU).prepare([weight], form=None if form == "float" else form)
    assert packed.weight.nbytes == linear_bytes(n, k, form, setup)
    # As the other backends keep it.
    if form != "float":
        made = quantise(weight, form)
        parts = sum(t.nbytes for t in tensors(made))
        assert parts == linear_bytes(n, k, form, Setup(torch.bfloat16))


@pytest.mark.parametrize(("backend", "form"), [("reference", None), ("native", "int8")])
def test_a_loaded_model_takes_what_is_said(
    checkpoint: Path, backend: str, form: str | None
) -> None:
    plan = None if form is None else Quantization(form)
    config, model = load(checkpoint, backend, torch.float32, plan)
    setup = Setup(torch.float32, backend, form_of(plan).form)
    said = weight_bytes(expected_shapes(config), setup)
    assert sum(said.values()) - said["lm_head.weight"] == loaded_bytes(model.weights)


def other_scales(tensors: dict[str, Tensor], floats: dict[str, Tensor]) -> None:
    """As another maker has them: free, and not the multiples of one number."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensors[name] = tensor * (1 + 0.2 * torch.rand(tensor.shape, generator=generator))


def some_as_they_were(tensors: dict[str, Tensor], floats: dict[str, Tensor]) -> None:
    """One of each two linears that are loaded as one is left in floating point."""
    for name, tensor in floats.items():
        if name.endswith(("v_proj.weight", "gate_proj.weight")):
            del tensors[f"{name}_scale"]
            tensors[name] = tensor


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("at_load", [None, Quantization("int4", group=32)])
@pytest.mark.parametrize(
    ("form", "group", "change"),
    [
        ("int4", 32, None),
        ("int4", 128, None),
        ("int4", 64, other_scales),
        ("int8", 64, some_as_they_were),
    ],
)
@pytest.mark.filterwarnings("ignore:4-bit weights whose scales")
def test_a_quantised_checkpoint_takes_what_is_said(
    backend: str, at_load: Quantization | None, form: str, group: int,
    change: Callable[[dict[str, Tensor], dict[str, Tensor]], None] | None,
    checkpoint: Path, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "quantised"
    convert(checkpoint, folder, Quantization(form, group=group))
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors, load_file(checkpoint / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors")
    config, model = load(folder, backend, torch.float32, at_load)
    shapes = expected_shapes(config)
    stored = find_stored(Checkpoint(folder), shapes)
    setup = Setup.loaded(torch.float32, backend, model.ops.keeps, stored, at_load)
    said = weight_bytes(shapes, setup)
    assert sum(said.values()) - said["lm_head.weight"] == loaded_bytes(model.weights)


def loaded_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(loaded_bytes(v) for v in value)
    if is_dataclass(value):
        return sum(loaded_bytes(getattr(value, f.name)) for f in fields(value))
    return int(getattr(value, "nbytes", 0))


def test_caches_are_counted_by_token(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    assert keys_values_bytes(config, torch.bfloat16) == 6 * 2 * 2 * 128 * 2
    assert visual_bytes(config, torch.float32) == 4 * 256 * 4


def test_the_largest_batch_fills_the_room(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    for backend in ("reference", "native", "triton"):
        setup = Setup(torch.bfloat16, backend)

        def peak(tokens: int, setup: Setup = setup) -> int:
            return peak_activations(config, setup, tokens=tokens, patches=0)

        for room in (5_000_000, 60_000_000):
            assert peak(largest_batch(peak, room)) == pytest.approx(room, rel=0.01)
    assert largest_batch(lambda n: 10 * n + 50_000, 1000) == 0
    assert largest_batch(lambda n: n, 1 << 30, most=4096) == 4096
