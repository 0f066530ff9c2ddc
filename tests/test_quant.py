"""Weight formats: rounding, the plan, files in the format of others, and whole models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qvlfast import CheckpointError, Embedder, Quantization, Reranker
from qvlfast.backends.native import NativeOps
from qvlfast.batch import PieceLimits
from qvlfast.checkpoint import Checkpoint
from qvlfast.cli import main
from qvlfast.errors import BackendError
from qvlfast.model import Model
from qvlfast.ops import Ops, QuantisedRows
from qvlfast.ops.rows import quantise_rows
from qvlfast.quant import FORMATS, Int4Weight, Int8Weight, quantise
from qvlfast.quant.stored import QuantizationWarning, from_group_scales, store_tensors
from qvlfast.quant.weights import quantise_int4, unpack_nibbles
from tests.samples import picture


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_int8_rounds_to_the_nearest_of_255_levels(dtype: torch.dtype, scale: float) -> None:
    weight = (draw(33, 96) * scale).to(dtype)
    made = quantise(weight, "int8")
    assert isinstance(made, Int8Weight)
    error = (made.dequantise() - weight.float()).abs()
    # Half a level, and the rounding of the float32 quotient.
    assert (error <= made.scale[:, None] * 0.5001).all()
    assert (made.values.abs().amax(dim=1) == 127).all()


def test_the_last_group_may_be_smaller() -> None:
    weight = draw(5, 160)
    made = quantise(weight, "int4", 64)
    assert isinstance(made, Int4Weight) and made.multiplier.shape == (5, 3)
    alone = quantise(weight[:, 128:].contiguous(), "int4", 32)
    error = (made.dequantise() - weight)[:, 128:].norm()
    assert error < 1.3 * (alone.dequantise() - weight[:, 128:]).norm()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_an_exact_int8_in_two_levels(group: int) -> None:
    weight = draw(40, 256) * torch.logspace(-2, 2, 40)[:, None]
    weight[:, 7] *= 20  # an outlier makes one group of each channel much larger than the others
    made = quantise(weight, "int4", group)
    assert isinstance(made, Int4Weight)
    assert made.group == group and made.shape == (40, 256)
    assert int(made.multiplier.min()) >= 1 and int(made.multiplier.max()) <= 18
    assert int(made.values().abs().max()) <= 7
    wide = made.widen()
    assert int(wide.values.abs().max()) <= 126
    assert torch.equal(wide.dequantise(), made.dequantise())
    # A group is rounded to 15 levels of its own, up to the rounding of its multiplier.
    by_group = weight.view(40, -1, group)
    error = (made.dequantise() - weight).view(40, -1, group).square().sum(2)
    plain = by_group.abs().amax(2, keepdim=True) / 7
    best = ((by_group / plain).round() * plain - by_group).square().sum(2)
    assert error.sum() < 1.3 * best.sum()


def test_channels_of_zeros_stay_zero() -> None:
    for form in FORMATS:
        assert (quantise(torch.zeros(3, 128), form).dequantise() == 0).all()


def test_unknown_formats_and_odd_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"quantization 'int3' is unknown: use one of int8"):
        Quantization("int3")
    with pytest.raises(ValueError, match="group is 48: use 32, 64 or 128"):
        Quantization("int4", group=48)
    for form in ("int8", "fp8"):
        with pytest.raises(ValueError, match=f"weight_only is for 'int4', not for '{form}'"):
            Quantization(form, weight_only=True)
    with pytest.raises(ValueError, match="expected an even number of inputs"):
        quantise(torch.zeros(2, 95), "int4")


def test_the_plan_covers_linears_of_the_decoder_only() -> None:
    plan = Quantization("int8")
    assert plan.covers("language_model.layers.3.self_attn.q_proj")
    assert plan.covers("language_model.layers.3.mlp.down_proj")
    assert not plan.covers("visual.blocks.0.attn.qkv")
    assert not plan.covers("language_model.embed_tokens")
    assert not plan.covers("visual.merger.linear_fc1")
    assert Quantization("int8", vision=True).covers("visual.blocks.0.attn.qkv")
    assert not Quantization("int8", vision=True).covers("visual.merger.linear_fc1")
    kept = Quantization("int8", down_proj=False)
    assert not kept.covers("language_model.layers.3.mlp.down_proj")


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rows(form: str, scale: float) -> None:
    x = draw(9, 70) * scale
    x[3] = 0
    rows = quantise_rows(x, form)  # type: ignore[arg-type]
    again = rows.values.float() * rows.scale[:, None]
    # Half of 1/127 of the largest value; e4m3 has four significant bits.
    bound = x.abs().amax(1, keepdim=True) / 253 if form == "int8" else x.abs() / 15.9 + scale / 1e3
    assert ((again - x).abs() <= bound).all()
    assert (again[3] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_itself_only(bad: float) -> None:
    x = draw(4, 64)
    clean = quantise_rows(x, "int8")
    x[2, 5] = bad
    rows = quantise_rows(x, "int8")
    assert rows.scale.isnan().tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert torch.equal(rows.values[others], clean.values[others])
    y = Ops.linear(x, Ops.prepare([draw(8, 64, seed=1)], form="int8"))
    assert y.isnan().all(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_reference_product_is_integer_arithmetic(form: str) -> None:
    """K is beyond what float32 sums exactly."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.choice([-127, 127], (3, 6144)).astype(np.int8))
    weight = torch.from_numpy(rng.choice([-1.0, 1.0], (16, 6144)).astype(np.float32))
    layer = Ops.prepare([weight], form=form)
    (stored,) = layer.weight
    wide = stored.widen() if isinstance(stored, Int4Weight) else stored
    exact = x.long() @ wide.values.long().T
    y = Ops.linear(QuantisedRows(x, torch.ones(3), torch.float32), layer)
    assert torch.equal(y, exact.double().float() * wide.scale)


def test_parts_bias_activation_and_residual_come_in_order() -> None:
    x, y = draw(5, 64), draw(5, 40, seed=3)
    a, b, bias = draw(24, 64, seed=1) / 8, draw(16, 64, seed=2) / 8, draw(40, seed=4)
    layer = Ops.prepare([a, b], bias)
    got = Ops.linear(x, layer, activation="gelu_erf")
    plain = x @ torch.cat([a, b]).T + bias
    torch.testing.assert_close(got, torch.nn.functional.gelu(plain))
    expected = y + plain
    Ops.add_linear(y, x, layer)
    torch.testing.assert_close(y, expected)
    gated = Ops.gated_linear(x, Ops.prepare([a, a * 2], gated=True))
    torch.testing.assert_close(gated, torch.nn.functional.silu(x @ a.T) * (x @ a.T * 2))


def test_int4_weights_alone_leave_the_rows_as_they_are() -> None:
    x, a, b, bias = draw(5, 96), draw(24, 96, seed=1), draw(16, 96, seed=2), draw(40, seed=3)
    layer = Ops.prepare([a, b], bias, form="int4", group=32, weight_only=True)
    assert layer.rows == "float"
    wide = torch.cat([quantise(part, "int4", 32).dequantise() for part in (a, b)])
    torch.testing.assert_close(Ops.linear(x, layer), x @ wide.T + bias)
    half = x.bfloat16()
    exact = half.float() @ wide.T + bias
    # Summed in float32 and rounded once.
    torch.testing.assert_close(Ops.linear(half, layer).float(), exact, rtol=2**-8, atol=1e-4)
    # One that a file holds as int8 brings all of them to int8 rows.
    mixed = Ops.prepare([quantise(a, "int8"), b], form="int4", weight_only=True)
    assert mixed.rows == "int8"


def test_the_cpu_kernels_have_int8_rows_only(tiny_checkpoint: Path) -> None:
    plan = Quantization("int4", weight_only=True)
    load = partial(Embedder.from_pretrained, tiny_checkpoint, device="cpu", quantization=plan)
    with pytest.raises(BackendError, match=r"int8 rows only.*use backend='reference'"):
        load(backend="native")
    with load(backend="auto") as embedder:
        assert embedder.backend == "reference"
    with pytest.raises(TypeError, match="this is a bug"):
        NativeOps.prepare([draw(8, 64)], form="int4", weight_only=True)


def test_parts_of_which_some_are_quantised() -> None:
    x = draw(5, 64)
    a, b = draw(24, 64, seed=1) / 8, quantise(draw(16, 64, seed=2) / 8, "int8")
    exact = x @ torch.cat([a, b.dequantise()]).T
    # Rows of x are rounded for the quantised part in the reference.
    for ops, tolerance in ((Ops, 0.05), (NativeOps, 1e-4)):
        got = ops.linear(x, ops.prepare([a, b]))
        torch.testing.assert_close(got, exact, atol=tolerance, rtol=0)


def test_words_hold_eight_values_the_first_in_the_lowest_bits() -> None:
    weight = quantise_int4(draw(5, 64), 64)
    words = store_tensors("a.weight", weight)["a.weight_packed"]
    assert words.shape == (5, 8) and words.dtype == torch.int32
    for i in range(8):
        nibbles = (words.long() >> (4 * i)) & 15
        assert torch.equal(nibbles.to(torch.int8) - 8, weight.values()[:, i::8])
    again = from_group_scales(weight.packed, weight.multiplier * weight.scale[:, None])
    assert isinstance(again, Int4Weight)
    assert torch.equal(again.dequantise(), weight.dequantise())


def test_scales_of_other_makers_become_int8_with_a_warning() -> None:
    packed = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
    values = unpack_nibbles(packed)
    scales = torch.rand(6, 2) + 0.1
    with pytest.warns(QuantizationWarning, match="kept as int8"):
        weight = from_group_scales(packed, scales)
    assert isinstance(weight, Int8Weight)
    truth = values.float() * scales.repeat_interleave(64, dim=1)
    assert ((weight.dequantise() - truth).abs() <= weight.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("form", ["int8", "int4", "int4, weights only"])
def test_a_written_checkpoint_is_the_one_quantised_at_load(
    form: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights alone are a matter of loading: the files say nothing of it."""
    target = tmp_path / "out"
    form, _, alone = form.partition(", ")
    plan = Quantization(form, weight_only=bool(alone))
    assert main(["quantize", str(tiny_checkpoint), str(target), "--format", form]) == 0
    assert "linears in " + form in capsys.readouterr().out
    items = ["a text", {"image": picture(64, 64), "text": "and a picture"}]
    with Embedder.from_pretrained(
        tiny_checkpoint, device="cpu", backend="reference", quantization=plan
    ) as at_load:
        expected = at_load.encode(items)
    again = plan if alone else None
    with Embedder.from_pretrained(
        target, device="cpu", backend="reference", quantization=again
    ) as stored:
        got = stored.encode(items)
    with Embedder.from_pretrained(target, device="cpu", backend="reference") as rounded:
        assert bool(alone) == (np.abs(rounded.encode(items) - got).max() > 1e-5)
    # Batches form by timing, and torch's sums depend on what is computed beside them. A file of
    # int4 besides holds the products of both levels of scales: reading splits them anew.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    described = json.loads((target / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "compressed-tensors"
    assert "lm_head" in described["ignore"]
    assert not [name for name in described["ignore"] if "language_model.layers" in name]


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_quantised_vectors_are_near_those_of_the_full_model(
    form: str, odd_checkpoint: Path
) -> None:
    items = ["a text", {"image": picture(96, 64), "text": "and a picture"}]

    def vectors(quantization: str | Quantization | None) -> np.ndarray:
        with Embedder.from_pretrained(
            odd_checkpoint, device="cpu", backend="reference", quantization=quantization
        ) as embedder:
            return embedder.encode(items)

    plain = vectors(None)
    cosine = (vectors(form) * plain).sum(axis=1)
    # Random weights pass rounding on undamped; docs/accuracy.md has what a trained model loses.
    assert (cosine > {"int8": 0.99, "int4": 0.7, "fp8": 0.9}[form]).all()
    assert (cosine < 1 - 1e-7).all(), "nothing was quantised"
    if form == "int8":
        all_of_it = vectors(Quantization("int8", vision=True))
        assert np.abs(all_of_it[1] - vectors("int8")[1]).max() > 0
        # torch's sums depend on what is computed beside them, in the last bits.
        np.testing.assert_allclose(all_of_it[0], vectors("int8")[0], rtol=0, atol=1e-6)


def test_a_reranker_can_be_quantised(odd_checkpoint: Path) -> None:
    def score(quantization: str | None) -> float:
        with Reranker.from_pretrained(
            odd_checkpoint, device="cpu", backend="reference", quantization=quantization
        ) as reranker:
            return float(reranker.rank("query", ["a document"])[0]["score"])

    assert 0 < abs(score("int8") - score(None)) < 0.05


def test_a_layer_of_which_only_keys_and_values_are_quantised(odd_checkpoint: Path) -> None:
    """As in files whose makers left out some linears: each gets its rows in its own form."""
    items = ["a text of some words", "another"]
    found = []
    for pieces in (PieceLimits(1 << 30, 1 << 60, 1 << 30), PieceLimits(5, 100, 4)):
        with (
            Embedder.from_pretrained(odd_checkpoint, dtype="float32") as whole,
            Embedder.from_pretrained(
                odd_checkpoint, dtype="float32", quantization="int8"
            ) as rounded,
        ):
            runner = rounded._runtime.served.runner
            model, exact = rounded._runtime.model, whole._runtime.model
            layers = [
                replace(layer, q_proj=other.q_proj)
                for layer, other in zip(
                    model.weights.text.layers, exact.weights.text.layers, strict=True
                )
            ]
            text = replace(model.weights.text, layers=layers)
            runner.model = Model(model.config, replace(model.weights, text=text), model.ops)
            runner._limits = pieces
            found.append(rounded.encode(items))
            distance = np.linalg.norm(found[-1] - whole.encode(items), axis=1)
            assert 0 < distance.max() < 0.2
    assert np.array_equal(*found)


def test_shards_stay_shards(odd_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["quantize", str(odd_checkpoint), str(target), "--vision"]) == 0
    before = sorted(p.name for p in odd_checkpoint.glob("*.safetensors"))
    assert sorted(p.name for p in target.glob("*.safetensors")) == before and len(before) > 1
    assert any("visual.blocks" in n and "weight_scale" in n for n in Checkpoint(target).shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        ({"quant_method": "awq"}, "quantization='int8'"),
    ],
)
def test_other_makers_are_refused_by_name(
    change: dict[str, str], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": change}))
    with pytest.raises(CheckpointError, match=message):
        Embedder.from_pretrained(folder, device="cpu")


def test_damaged_quantised_files_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    main(["quantize", str(tiny_checkpoint), str(target), "--format", "int4"])
    path = target / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("q_proj.weight_scale"))
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale is missing"):
        Embedder.from_pretrained(target, device="cpu")
    packed = name.replace("scale", "packed")
    save_file(tensors | {packed: tensors[packed][:, :-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match="only 4-bit weights are read"):
        Embedder.from_pretrained(target, device="cpu")


def test_quantize_refuses_what_it_cannot_do(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["quantize", str(tiny_checkpoint), str(tmp_path / "taken")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["quantize", str(tiny_checkpoint), str(tmp_path / "once")]) == 0
    assert main(["quantize", str(tmp_path / "once"), str(tmp_path / "twice")]) == 2
    assert "only complete checkpoints in float32" in capsys.readouterr().err
