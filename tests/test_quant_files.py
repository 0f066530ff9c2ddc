"""Quantised files of other makers: bitsandbytes, and FP8 with a scale a block."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.checkpoints import write_checkpoint
from qvlfast import CheckpointError, Embedder, Quantization
from qvlfast.batch import Batch, pack_vision
from qvlfast.checkpoint import Checkpoint
from qvlfast.config import load_config, load_pixel_config
from qvlfast.dispatch import choose_ops
from qvlfast.model import Model
from qvlfast.ops import Forest, Linear, Ops, Weight
from qvlfast.pixels import Patches
from qvlfast.quant import Fp8BlockWeight, Int8Weight
from qvlfast.quant.stored import QuantizationWarning, find_stored, is_linear, load_stored
from qvlfast.weights import load_weights

NAME = "model.language_model.layers.0.self_attn.q_proj.weight"
Store = Callable[[str, Tensor], dict[str, Tensor]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Channels of very different sizes, some of them zero."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal(shape) * np.logspace(-3, 2, shape[0])[:, None]
    wide[shape[0] // 2] = 0
    return torch.from_numpy(wide).float()


def four_bits(
    name: str, weight: Tensor, kind: str = "nf4", nested: bool = True, storage: str = "uint8"
) -> dict[str, Tensor]:
    """The tensors that bitsandbytes saves for ``weight``."""
    made = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=getattr(torch, storage),
    ).to("cpu")
    state = made.quant_state.as_dict(packed=True)
    return {name: made.data} | {f"{name}.{key}": value for key, value in state.items()}


def eight_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The same for the int8 of LLM.int8()."""
    layer = bitsandbytes.nn.Linear8bitLt(*reversed(weight.shape), False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    stem = name.removesuffix("weight")
    return {stem + key: value for key, value in layer.to("cpu").state_dict().items()}


def fp8_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Each block of 128 x 128 in e4m3, as Qwen's FP8 files have it."""
    n, k = (-(-size // 128) * 128 for size in weight.shape)
    padded = torch.zeros(n, k)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    values = (blocks / scale[:, None, :, None]).view(n, k)[: weight.shape[0], : weight.shape[1]]
    stem = name.removesuffix("weight")
    return {name: values.to(torch.float8_e4m3fn).contiguous(), f"{stem}weight_scale_inv": scale}


def read(tmp_path: Path, tensors: dict[str, Tensor], weight: Tensor, dtype: torch.dtype) -> Weight:
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    found = find_stored(checkpoint, {NAME: tuple(weight.shape)})
    assert sorted(found[NAME].parts) == sorted(tensors), "something would be left over"
    return load_stored(checkpoint, NAME, found[NAME], dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_those_of_bitsandbytes(
    kind: str, nested: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    # Neither a multiple of its blocks of 64 values nor of 256 blocks.
    weight = draw(90, 330).to(dtype)
    tensors = four_bits(NAME, weight, kind, nested)
    state = bitsandbytes.functional.QuantState.from_dict(
        {k.removeprefix(f"{NAME}."): v for k, v in tensors.items() if k != NAME},
        torch.device("cpu"),
    )
    expected = bitsandbytes.functional.dequantize_4bit(tensors[NAME], state)
    got = read(tmp_path, tensors, weight, dtype)
    assert isinstance(got, Tensor) and got.dtype == dtype
    assert torch.equal(got, expected)


def test_four_bits_may_be_stored_as_another_type(tmp_path: Path) -> None:
    weight = draw(8, 128)
    plain = read(tmp_path, four_bits(NAME, weight), weight, torch.float32)
    odd = read(tmp_path, four_bits(NAME, weight, storage="bfloat16"), weight, torch.float32)
    assert isinstance(plain, Tensor) and isinstance(odd, Tensor) and torch.equal(plain, odd)


def test_large_weights_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(90, 330)
    tensors = four_bits(NAME, weight)
    whole = read(tmp_path, tensors, weight, torch.float32)
    monkeypatch.setattr("qvlfast.quant.bnb._CHUNK", 1000)
    pieces = read(tmp_path, tensors, weight, torch.float32)
    assert isinstance(whole, Tensor) and isinstance(pieces, Tensor) and torch.equal(whole, pieces)


def test_eight_bits_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    weight = draw(90, 330)
    tensors = eight_bits(NAME, weight)
    stem = NAME.removesuffix("weight")
    got = read(tmp_path, tensors, weight, torch.bfloat16)
    assert isinstance(got, Int8Weight)
    assert torch.equal(got.values, tensors[NAME])
    expected = bitsandbytes.functional.int8_vectorwise_dequant(tensors[NAME], tensors[f"{stem}SCB"])
    # It multiplies by the rounded 1/127 where we divide: two roundings of float32.
    torch.testing.assert_close(got.dequantise(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", [(256, 384), (130, 300), (5, 7)])
def test_blocks_of_fp8(shape: tuple[int, int], tmp_path: Path) -> None:
    weight = draw(*shape)
    tensors = fp8_blocks(NAME, weight)
    got = read(tmp_path, tensors, weight, torch.bfloat16)
    assert isinstance(got, Fp8BlockWeight) and got.shape == shape
    scale = torch.kron(got.scale_inv, torch.ones(128, 128))[: shape[0], : shape[1]]
    assert torch.equal(got.dequantise(), got.values.float() * scale)
    # e4m3 has four significant bits down to 2^-6, and steps of 2^-9 below.
    bound = weight.abs() / 16 + scale * 2**-10
    assert ((got.dequantise() - weight).abs() <= bound * 1.0001).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` with few tokens, which no tokenizer fits."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    write_checkpoint(folder, "tiny")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.language_model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:1000].clone()}, path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 1000
    for i, name in enumerate(("image", "video", "vision_start", "vision_end")):
        config[f"{name}_token_id"] = i
    (folder / "config.json").write_text(json.dumps(config))
    return folder


METHODS: dict[str, Store] = {
    "nf4": four_bits,
    "int8": eight_bits,
    "fp8": fp8_blocks,
}


def write(source: Path, target: Path, form: str, only: str = "") -> tuple[Path, Path]:
    """Two copies of a checkpoint: quantised, and with the same weights in float32."""
    store = METHODS[form]
    method = {"quant_method": "fp8" if form == "fp8" else "bitsandbytes"}
    folders = []
    for name in ("quantised", "plain"):
        shutil.copytree(source, target / name, ignore=lambda *_: ["model.safetensors"])
        folders.append(target / name)
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if is_linear(name, tuple(tensor.shape)) and only in name:
            made = store(name, tensor)
            quantised |= made
            plain[name] = _again(made, name, tensor)
        else:
            quantised[name] = plain[name] = tensor
    save_file(quantised, folders[0] / "model.safetensors")
    save_file(plain, folders[1] / "model.safetensors")
    path = folders[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    return folders[0], folders[1]


def _again(made: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
    stem = name.removesuffix("weight")
    if f"{stem}SCB" in made:
        return made[name].float() * (made[f"{stem}SCB"] / 127)[:, None]
    if f"{stem}weight_scale_inv" in made:
        return Fp8BlockWeight(made[name], made[f"{stem}weight_scale_inv"]).dequantise()
    state = {k.removeprefix(f"{name}."): v for k, v in made.items() if k != name}
    device = torch.device("cpu")
    quant_state = bitsandbytes.functional.QuantState.from_dict(state, device)
    return bitsandbytes.functional.dequantize_4bit(made[name], quant_state)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Of the same weights. torch's sums differ in their last bits with where a weight lies."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def load(folder: Path, ops: Ops, quantization: Quantization | None = None) -> Model:
    config = load_config(folder)
    weights = load_weights(
        Checkpoint(folder),
        config,
        load_pixel_config(folder),
        ops,
        dtype=torch.float32,
        device=torch.device("cpu"),
        answer_ids=None,
        quantization=quantization,
    )
    return Model(config, weights, ops)


def encode(folder: Path, backend: str, quantization: Quantization | None = None) -> Tensor:
    """Unit vectors of two texts of made-up tokens and one picture."""
    merge, device = 2, torch.device("cpu")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 768), dtype=np.uint8)
    lengths = (9, 14)
    index = np.arange(2, 8)
    batch = Batch(
        ids=torch.from_numpy(rng.integers(0, 1000, sum(lengths))),
        positions=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1).contiguous(),
        forest=Forest.plain(lengths),
        read=np.cumsum(lengths) - 1,
        vision=pack_vision([Patches(pixels, (1, 4, 6), 6)], merge, device),
        visual_index=torch.from_numpy(index),
        visual_rows=torch.arange(6),
    )
    ops = choose_ops(backend, device)
    return F.normalize(load(folder, ops, quantization).forward(batch))


@pytest.mark.parametrize("form", ["nf4", "fp8"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_models_without_a_product_of_their_own_are_widened_with_a_notice(
    form: str, backend: str, small: Path, tmp_path: Path
) -> None:
    quantised, plain = write(small, tmp_path, form)
    what = {"nf4": "4 bits by bitsandbytes", "fp8": "FP8 with a scale a block"}[form]
    times = {"nf4": 8, "fp8": 4}[form]
    with pytest.warns(QuantizationWarning, match=f"{what} .* float32, in {times} times") as record:
        got = encode(quantised, backend)
    assert len(record) == 1 and "quantization='int8'" in str(record[0].message)
    assert_same(got, encode(plain, backend))
    every = Quantization("int8", vision=True)
    with pytest.warns(QuantizationWarning, match="8 linears are stored in") as record:
        got = encode(quantised, backend, every)
    # Those of the mergers stay: nothing more to advise.
    assert "quantization" not in str(record[0].message)
    assert_same(got, encode(plain, backend, every))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_int8_of_bitsandbytes_is_computed_with_as_it_is(
    backend: str, small: Path, tmp_path: Path
) -> None:
    quantised, plain = write(small, tmp_path, "int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = encode(quantised, backend)
    # The same weights; only activations are rounded besides.
    cosine = (got * encode(plain, backend)).sum(dim=1)
    assert (cosine > 0.995).all() and (cosine < 1 - 1e-7).all()


def test_a_model_of_four_bits_embeds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantised, _ = write(tiny_checkpoint, tmp_path, "nf4")
    with pytest.warns(QuantizationWarning, match="52 linears are stored in 4 bits"):
        embedder = Embedder.from_pretrained(quantised, device="cpu")
    with embedder:
        assert np.isfinite(embedder.encode(["a text"])).all()


def test_linears_of_one_product_may_differ(small: Path, tmp_path: Path) -> None:
    quantised, plain = write(small, tmp_path, "int8", only="k_proj")
    got = encode(quantised, "reference")
    assert_same(got, encode(plain, "reference"))


def test_a_backend_that_multiplies_blocks_gets_them(small: Path, tmp_path: Path) -> None:
    quantised, _ = write(small, tmp_path, "fp8")
    got: list[Weight] = []

    class Recorder(Ops):
        keeps = frozenset({"fp8_blocks"})

        @staticmethod
        def prepare(parts: list[Weight], *rest: object, **options: object) -> Linear:
            got.extend(parts)
            return Linear(None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(quantised, Recorder())
    # All but the two forms of the patch embedding.
    assert sum(not isinstance(weight, Fp8BlockWeight) for weight in got) == 2 < len(got)


@pytest.mark.parametrize(
    ("form", "part", "change", "message"),
    [
        ("nf4", f"{NAME}.absmax", None, r"absmax is missing beside .*: .* download it again"),
        ("nf4", f"{NAME}.absmax", lambda t: t[:-1], r"absmax is \[63\], expected \[64\]"),
        ("nf4", f"{NAME}.nested_quant_map", None, "nested_quant_map is missing"),
        ("nf4", NAME, lambda t: t[:-1], r"q_proj.weight holds 2,047 bytes, expected 2,048"),
        ("nf4", NAME, None, r"q_proj.weight is missing beside"),
        (
            "nf4",
            f"{NAME}.quant_state.bitsandbytes__nf4",
            lambda t: t[:-1],
            r"bitsandbytes__nf4 cannot be read \(JSONDecodeError",
        ),
        ("int8", NAME.replace("weight", "SCB"), None, "is I8 without a weight_scale, .* or SCB"),
        ("int8", NAME.replace("weight", "weight_format"), lambda t: t + 2, "weight_format is 2"),
        ("fp8", f"{NAME}_scale_inv", None, "is F8_E4M3 without a weight_scale"),
        ("fp8", f"{NAME}_scale_inv", lambda t: t.view(-1), r"which for \[64, 64\] are \[1, 1\]"),
    ],
)
def test_damaged_files_are_named(
    form: str,
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    message: str,
    tmp_path: Path,
) -> None:
    weight = draw(64, 64)
    tensors = METHODS[form](NAME, weight)
    old = tensors.pop(part)
    if change is not None:
        tensors[part] = change(old).contiguous()
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, tensors, weight, torch.float32)


def test_a_shape_that_is_not_the_models_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"says \[32, 64\], config.json \[64, 32\]"):
        read(tmp_path, four_bits(NAME, draw(32, 64)), draw(64, 32), torch.float32)


def test_other_blocks_are_refused_by_the_configuration(small: Path, tmp_path: Path) -> None:
    quantised, _ = write(small, tmp_path, "fp8")
    path = quantised / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["weight_block_size"] = [64, 128]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"`weight_block_size` is \[64, 128\]: only blocks"):
        Embedder.from_pretrained(quantised, device="cpu")
