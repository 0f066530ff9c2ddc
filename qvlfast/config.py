"""``config.json`` and ``preprocessor_config.json`` as frozen dataclasses.

Every size that the model uses comes from these files. Two spellings of the rope settings are
in use: ``rope_parameters`` (transformers 5) and ``rope_scaling`` + ``rope_theta`` (4.57).
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError

MODEL_TYPES = ("qwen3_vl",)

# Makers of quantised checkpoints that are read, as `quantization_config` names them.
QUANT_METHODS = ("compressed-tensors", "bitsandbytes", "fp8")

# Far above any model of this kind. What is above is damage, and would be allocated for.
_MOST_LAYERS = 1024
_LARGEST_SIZE = 1 << 24
_LARGEST_FLOAT = sys.float_info.max

_Three = tuple[float, float, float]


@dataclass(frozen=True)
class TextConfig:
    """The decoder. ``rope_theta`` and ``mrope_section`` define the interleaved mrope."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. ``num_positions`` is the size of the learned square position grid."""

    hidden_size: int
    depth: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_positions: int
    deepstack_layers: tuple[int, ...]
    rope_theta: float
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merged_size(self) -> int:
        """Width of ``spatial_merge_size``² neighbouring patches side by side."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclass(frozen=True)
class ModelConfig:
    """Everything in ``config.json`` that the forward pass and the prompt need."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool
    dtype: str


@dataclass(frozen=True)
class PixelConfig:
    """The per-channel normalisation of ``preprocessor_config.json``: (x / 255 − mean) / std."""

    mean: _Three
    std: _Three


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: the checkpoint folder is incomplete, download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, expected a JSON object: download it again"
        )
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Reader:
    """Typed look-ups in one JSON object, with errors that name the file, the key and the value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, value: Any, expected: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: `{key}` is {reprlib.repr(value)}, expected {expected}: "
            "download the file again"
        )

    def child(self, key: str) -> _Reader:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.where}: `{key}` is missing or not an object: download the file again"
            )
        return _Reader(value, f"{self.where}: {key}")

    def integer(
        self, key: str, default: int | None = None, least: int = 1, most: int = _LARGEST_SIZE
    ) -> int:
        value = self.values.get(key, default)
        if not _is_integer(value) or not least <= value <= most:
            self.fail(key, value, f"an integer from {least} to {most}")
        return int(value)

    def number(
        self, key: str, default: float | None = None, least: float = 0.0, most: float = math.inf
    ) -> float:
        value = self.values.get(key, default)
        if not self._fits(value, least, most):
            self.fail(key, value, self._bounds("a finite number", least, most))
        return float(value)

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers, none of them negative."""
        value = self.values.get(key, list(default))
        if not isinstance(value, list) or not all(_is_integer(v) and v >= 0 for v in value):
            self.fail(key, value, "a list of integers >= 0")
        return tuple(value)

    def three(self, key: str, default: float, least: float, most: float) -> _Three:
        """One number for each colour."""
        value = self.values.get(key, [default] * 3)
        if not isinstance(value, list) or len(value) != 3:
            self.fail(key, value, "three numbers")
        if not all(self._fits(v, least, most) for v in value):
            self.fail(key, value, self._bounds("three finite numbers", least, most))
        red, green, blue = (float(v) for v in value)
        return red, green, blue

    def expect(self, key: str, *allowed: Any) -> None:
        """The code supports these values only; an absent key means the first."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{self.where}: `{key}` is {reprlib.repr(value)}, this package runs "
                f"{allowed[0]!r} only"
            )

    @staticmethod
    def _fits(value: Any, least: float, most: float) -> bool:
        # Integers may be too large for a float; NaN is in no range.
        number = isinstance(value, float) or _is_integer(value)
        return number and least <= value <= min(most, _LARGEST_FLOAT)

    @staticmethod
    def _bounds(what: str, least: float, most: float) -> str:
        return f"{what} >= {least:g}" if most == math.inf else f"{what} from {least:g} to {most:g}"


def _text_config(reader: _Reader) -> TextConfig:
    reader.expect("hidden_act", "silu")
    reader.expect("attention_bias", False)
    rope = next(
        (
            reader.child(key)
            for key in ("rope_parameters", "rope_scaling")
            if isinstance(reader.values.get(key), dict)
        ),
        None,
    )
    if rope is None:
        raise CheckpointError(f"{reader.where}: neither `rope_parameters` nor `rope_scaling`")
    rope.expect("rope_type", "default", "mrope")
    theta_owner = rope if "rope_theta" in rope.values else reader
    rope.expect("mrope_interleaved", True)
    section = rope.integers("mrope_section", (24, 20, 20))
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    head_dim = reader.integer("head_dim", hidden // heads)
    if len(section) != 3 or 2 * sum(section) != head_dim:
        rope.fail(
            "mrope_section",
            list(section),
            f"three numbers that add up to head_dim / 2 = {head_dim // 2}",
        )
    config = TextConfig(
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers", most=_MOST_LAYERS),
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads"),
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size"),
        norm_eps=reader.number("rms_norm_eps", 1e-6, most=1),
        rope_theta=theta_owner.number("rope_theta", least=1),
        mrope_section=(section[0], section[1], section[2]),
    )
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{reader.where}: {config.num_heads} query heads are not a multiple of "
            f"{config.num_kv_heads} key heads"
        )
    return config


def _vision_config(reader: _Reader) -> VisionConfig:
    reader.expect("hidden_act", "gelu_pytorch_tanh")
    reader.expect("in_channels", 3)
    theta = 1e4
    if isinstance(reader.values.get("rope_parameters"), dict):
        theta = reader.child("rope_parameters").number("rope_theta", theta, least=1)
    config = VisionConfig(
        hidden_size=reader.integer("hidden_size"),
        depth=reader.integer("depth", most=_MOST_LAYERS),
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=reader.integer("num_heads"),
        in_channels=reader.integer("in_channels", 3),
        patch_size=reader.integer("patch_size"),
        temporal_patch_size=reader.integer("temporal_patch_size"),
        spatial_merge_size=reader.integer("spatial_merge_size"),
        out_hidden_size=reader.integer("out_hidden_size"),
        num_positions=reader.integer("num_position_embeddings"),
        deepstack_layers=reader.integers("deepstack_visual_indexes", ()),
        rope_theta=theta,
        norm_eps=1e-6,
    )
    if config.hidden_size % (4 * config.num_heads):
        raise CheckpointError(
            f"{reader.where}: hidden_size {config.hidden_size} over {config.num_heads} heads gives "
            "no head dim that is a multiple of 4, which the two-dimensional rope needs"
        )
    if math.isqrt(config.num_positions) ** 2 != config.num_positions:
        raise CheckpointError(
            f"{reader.where}: num_position_embeddings {config.num_positions} is not a square"
        )
    levels = config.deepstack_layers
    bad = [i for i in levels if i >= config.depth]
    if bad:
        raise CheckpointError(
            f"{reader.where}: deepstack_visual_indexes {reprlib.repr(bad)} are not among "
            f"{config.depth} blocks"
        )
    if any(a >= b for a, b in itertools.pairwise(levels)):
        reader.fail("deepstack_visual_indexes", list(levels), "ascending indices, each once")
    return config


def _check_quantization(values: Any, path: Path) -> None:
    method = values.get("quant_method") if isinstance(values, dict) else None
    if values is not None and method not in QUANT_METHODS:
        raise CheckpointError(
            f"{path}: the weights are quantised by {method!r}; this package reads "
            f"{', '.join(QUANT_METHODS)}, or take the original checkpoint with quantization='int8'"
        )
    if method == "fp8" and values.get("weight_block_size", [128, 128]) != [128, 128]:
        raise CheckpointError(
            f"{path}: `weight_block_size` is {values['weight_block_size']!r}: only blocks of "
            "[128, 128] are read; take the original checkpoint with quantization='int8'"
        )


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: the file is missing, damaged, or describes another kind of model.
    """
    path = folder / "config.json"
    values = _read_json(path)
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}; this package runs {', '.join(MODEL_TYPES)} "
            "(Qwen3-VL-Embedding and Qwen3-VL-Reranker)"
        )
    _check_quantization(values.get("quantization_config"), path)
    reader = _Reader(values, str(path))
    text_reader = reader.child("text_config")
    text = _text_config(text_reader)
    vision = _vision_config(reader.child("vision_config"))
    if vision.out_hidden_size != text.hidden_size:
        raise CheckpointError(
            f"{path}: the vision tower ends in {vision.out_hidden_size} values a token, "
            f"the decoder takes {text.hidden_size}"
        )
    if len(vision.deepstack_layers) > text.num_layers:
        raise CheckpointError(
            f"{path}: {len(vision.deepstack_layers)} deepstack levels for {text.num_layers} layers"
        )
    tied = values.get("tie_word_embeddings", text_reader.values.get("tie_word_embeddings", False))
    if not isinstance(tied, bool | None):
        reader.fail("tie_word_embeddings", tied, "true or false")
    tokens = {
        key: reader.integer(key, least=0, most=text.vocab_size - 1)
        for key in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    if len(set(tokens.values())) < len(tokens):
        raise CheckpointError(
            f"{path}: {', '.join(f'{key} is {number}' for key, number in tokens.items())}: "
            "expected four different ids, download the file again"
        )
    names = ("dtype", "torch_dtype")
    dtypes = [
        v[k] for v in (values, text_reader.values) for k in names if isinstance(v.get(k), str)
    ]
    return ModelConfig(
        text=text,
        vision=vision,
        **tokens,
        tie_word_embeddings=bool(tied),
        dtype=dtypes[0] if dtypes else "float32",
    )


def load_pixel_config(folder: Path) -> PixelConfig:
    """Read mean and std from ``preprocessor_config.json``; absent means 0.5 and 0.5.

    Raises:
        CheckpointError: the file is damaged, asks for another scaling than 1/255, or for a mean
            outside 0 to 1 or a std outside 0.001 to 1000.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return PixelConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    values = _read_json(path)
    reader = _Reader(values, str(path))
    if abs(reader.number("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        reader.fail("rescale_factor", values["rescale_factor"], "1/255")
    return PixelConfig(
        mean=reader.three("image_mean", 0.5, least=0, most=1),
        std=reader.three("image_std", 0.5, least=1e-3, most=1e3),
    )
