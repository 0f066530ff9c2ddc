"""A model that has shapes and computes nothing: prompts, weights and tables of ops. The model's own
code runs over it, to learn what it would allocate or launch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .arena import HEAP, Memory
from .backends.native import NativeOps
from .config import ModelConfig
from .kernels.configs import INT4_ROWS
from .ops import Linear, Ops, QuantisedRows, RowFormat, Rows, Weight
from .ops.patch_embed import resample_positions
from .pixels import Patches
from .prompt import Prompt
from .quant import Fp8Weight, Int4Weight, Int8Weight, Quantization
from .quant.stored import Stored, published_name
from .weights import (
    LayerNorm,
    Merger,
    ModelWeights,
    TextLayer,
    TextWeights,
    VisionBlock,
    VisionWeights,
    merged_with,
)

META = torch.device("meta")
"""Its tensors have no storage at all. The first operations on them make torch import its compiler,
which takes a second."""

Format = str
"""``float``, or a format of quantised weights: int8, int4, fp8, fp8_blocks."""


@dataclass(frozen=True)
class Setup:
    """What decides how much a model takes, besides its shape.

    Attributes:
        dtype: of activations and of weights in floating point.
        backend: ``reference``, ``native`` or ``triton``.
        form: the format of a linear, by its published name without ``model.`` and ``.weight``.
        group: inputs that share a multiplier, of a linear in int4, by its name.
        weight_only: int4 weights are multiplied by rows in floating point.
    """

    dtype: torch.dtype
    backend: str = "reference"
    form: Callable[[str], Format] = lambda name: "float"
    group: Callable[[str], int] = lambda name: 64
    weight_only: bool = False

    @classmethod
    def loaded(
        cls,
        dtype: torch.dtype,
        backend: str,
        keeps: Collection[str],
        stored: Mapping[str, Stored],
        plan: Quantization | None,
    ) -> Setup:
        """That of a checkpoint which is loaded.

        Args:
            keeps: formats of stored weights that the backend takes as they are.
            stored: of :func:`qvlfast.quant.stored.find_stored`.
            plan: for weights in floating point.
        """
        known = {
            published_name(full): (value.form, value.group)
            for full, value in stored.items()
            if value.form in keeps
        }

        def alone(name: str) -> tuple[Format, int]:
            if name in known:
                return known[name]
            if plan is None or plan.format not in keeps or not plan.covers(name):
                return "float", 64
            return plan.format, plan.group

        def form(name: str) -> Format:
            parts = {alone(part) for part in merged_with(name)}
            forms = {form for form, _ in parts}
            if "float" in forms:
                return "float"
            # Only the reference keeps weights of several formats side by side.
            if backend != "reference" and len(parts) > 1 and forms <= {"int8", "int4"}:
                return "int8"
            return alone(name)[0]

        def group(name: str) -> int:
            return alone(name)[1]

        return cls(dtype, backend, form, group, plan is not None and plan.weight_only)

    def rows(self, name: str) -> RowFormat:
        """The form in which that linear takes its input."""
        forms: dict[str, RowFormat] = {
            "int8": "int8",
            "int4": "float" if self.weight_only else "int8",
            "fp8": "fp8",
            "fp8_blocks": "fp8",
        }
        return forms.get(self.form(name), "float")


def shortened(config: ModelConfig) -> ModelConfig:
    """The same peak from fewer layers: all of one kind need the same."""
    levels = len(config.vision.deepstack_layers)
    vision = replace(config.vision, depth=levels + 1, deepstack_layers=tuple(range(levels)))
    layers = min(levels + 2, config.text.num_layers)
    return replace(config, vision=vision, text=replace(config.text, num_layers=layers))


def stand_in_prompt(
    config: ModelConfig,
    tokens: int,
    grid: tuple[int, int, int] = (0, 0, 0),
    *,
    is_video: bool = False,
) -> Prompt:
    """A made-up prompt of so many tokens, or as many as a picture or video of ``grid`` needs."""
    vision = config.vision
    patches = grid[0] * grid[1] * grid[2]
    visual = patches // vision.spatial_merge_size**2
    width = vision.in_channels * vision.patch_size**2
    width *= vision.temporal_patch_size if is_video else 1
    pixels = np.empty((patches, width), np.uint8)
    length = max(tokens, visual)
    return Prompt(
        ids=np.zeros(length, np.int32),
        positions=np.zeros((3, length), np.int32),
        media=(Patches(pixels, grid, visual, is_video),) if visual else (),
        visual_index=np.arange(visual, dtype=np.int32),
    )


def _as_they_are(
    parts: Sequence[Weight], bias: Tensor | None, *, rows: RowFormat, gated: bool
) -> Linear:
    return Linear(tuple(parts), bias, rows)


def stand_in_weights(
    config: ModelConfig,
    setup: Setup,
    prepare: Callable[..., Linear] = _as_they_are,
    *,
    reranker: bool = False,
    device: torch.device = META,
) -> ModelWeights:
    """Weights without storage on ``META``; elsewhere one number stands for all of a tensor.

    Args:
        prepare: makes a linear of parts and a bias, told ``gated`` and the ``rows`` it wants.
    """
    text, vision = config.text, config.vision

    def new(*shape: int, dtype: torch.dtype = setup.dtype) -> Tensor:
        return _new(shape, dtype, device)

    def linear(name: str, k: int, *sizes: int, bias: bool = False, gated: bool = False) -> Linear:
        form, group = setup.form(name), setup.group(name)
        parts = [_weight(n, k, form, group, setup.dtype, device) for n in sizes]
        whole = new(sum(sizes)) if bias else None
        return prepare(parts, whole, rows=setup.rows(name), gated=gated)

    def patches(k: int) -> Linear:
        return prepare([new(c, k)], new(c, dtype=torch.float32), rows="float", gated=False)

    def merger(name: str, merged: bool) -> Merger:
        size = vision.merged_size
        width = size if merged else vision.hidden_size
        return Merger(
            LayerNorm(new(width), new(width)),
            linear(f"{name}.linear_fc1", size, size, bias=True),
            linear(f"{name}.linear_fc2", size, vision.out_hidden_size, bias=True),
            merged,
        )

    c, ffn = vision.hidden_size, vision.intermediate_size
    h, d = text.hidden_size, text.head_dim
    block = VisionBlock(
        LayerNorm(new(c), new(c)),
        linear("visual.blocks.0.attn.qkv", c, 3 * c, bias=True),
        linear("visual.blocks.0.attn.proj", c, c, bias=True),
        LayerNorm(new(c), new(c)),
        linear("visual.blocks.0.mlp.linear_fc1", c, ffn, bias=True),
        linear("visual.blocks.0.mlp.linear_fc2", ffn, c, bias=True),
    )
    name = "language_model.layers.0"
    kv, q = text.num_kv_heads * d, text.num_heads * d
    layer = TextLayer(
        input_norm=new(h),
        q_proj=linear(f"{name}.self_attn.q_proj", h, q),
        kv_proj=linear(f"{name}.self_attn.k_proj", h, kv, kv),
        q_norm=new(d),
        k_norm=new(d),
        o_proj=linear(f"{name}.self_attn.o_proj", q, h),
        post_norm=new(h),
        gate_up_proj=linear(
            f"{name}.mlp.gate_proj",
            h,
            text.intermediate_size,
            text.intermediate_size,
            gated=True,
        ),
        down_proj=linear(f"{name}.mlp.down_proj", text.intermediate_size, h),
    )
    pixels = vision.in_channels * vision.patch_size**2
    return ModelWeights(
        vision=VisionWeights(
            patch_still=patches(pixels),
            patch_video=patches(pixels * vision.temporal_patch_size),
            positions=new(vision.num_positions, c),
            blocks=(block,) * vision.depth,
            merger=merger("visual.merger", False),
            deepstack=tuple(
                merger(f"visual.deepstack_merger_list.{i}", True)
                for i in range(len(vision.deepstack_layers))
            ),
        ),
        text=TextWeights(new(text.vocab_size, h), (layer,) * text.num_layers, new(h)),
        answer_rows=new(2, h, dtype=torch.float32) if reranker else None,
    )


def _new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device == META:
        return torch.empty(shape, dtype=dtype, device=META)
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _weight(
    n: int, k: int, form: Format, group: int, dtype: torch.dtype, device: torch.device
) -> Weight:
    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return _new(shape, dtype, device)

    scale = new(n, dtype=torch.float32)
    if form == "int8":
        return Int8Weight(new(n, k, dtype=torch.int8), scale)
    if form == "int4":
        multiplier = new(n, -(-k // group), dtype=torch.uint8)
        return Int4Weight(new(n, k // 2, dtype=torch.uint8), multiplier, scale, group)
    if form in ("fp8", "fp8_blocks"):
        return Fp8Weight(new(n, k, dtype=torch.float8_e4m3fn), scale)
    return new(n, k, dtype=dtype)


def _width(layer: Linear) -> int:
    return sum(part.shape[0] for part in layer.weight)


def _device(x: Rows) -> torch.device:
    return x.device if isinstance(x, Tensor) else x.values.device


def _rows(x: Tensor, form: RowFormat, memory: Memory) -> Rows:
    if form == "float":
        return x
    values = memory.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = memory.empty((len(x),), dtype=torch.float32, device=x.device)
    return QuantisedRows(values, scale, x.dtype)


class _Reference(Ops):
    """The reference itself, but for attention, which torch has no tensors without storage for."""

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, forest: Any, **rest: Any) -> Tensor:
        out = torch.empty_like(q)
        longest = int(np.diff(forest.cu_k).max())
        keys = [torch.cat([x[:longest]]).float() for x in (k, v)]
        some = q[:longest]
        attended = torch.empty_like(some.float())
        del keys
        out[: len(some)] = attended.to(q.dtype)
        return out


class _Fused(Ops):
    """One output an op, and quantised rows where a linear wants them."""

    allocating: ClassVar[Collection[str]] = NativeOps.allocating

    @staticmethod
    def linear(
        x: Rows, layer: Linear, *, activation: str | None = None, memory: Memory = HEAP
    ) -> Tensor:
        return memory.empty((len(x), _width(layer)), dtype=x.dtype, device=_device(x))

    @staticmethod
    def add_linear(y: Tensor, x: Rows, layer: Linear) -> None:
        pass

    @staticmethod
    def gated_linear(
        x: Rows, layer: Linear, *, rows: RowFormat = "float", memory: Memory = HEAP
    ) -> Rows:
        out = memory.empty((len(x), _width(layer) // 2), dtype=x.dtype, device=_device(x))
        return _rows(out, rows, memory)

    @staticmethod
    def embed(ids: Tensor, table: Tensor, *, memory: Memory = HEAP) -> Tensor:
        return memory.empty((len(ids), table.shape[1]), dtype=table.dtype, device=ids.device)

    @staticmethod
    def rms_norm(
        x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float", memory: Memory = HEAP
    ) -> Rows:
        if rows == "float":
            return memory.empty(x.shape, dtype=x.dtype, device=x.device)
        return _rows(x, rows, memory)

    @staticmethod
    def layer_norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        *,
        rows: RowFormat = "float",
        memory: Memory = HEAP,
    ) -> Rows:
        return _rows(memory.empty(x.shape, dtype=x.dtype, device=x.device), rows, memory)

    @staticmethod
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
        pass

    @staticmethod
    def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
        pass

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, forest: Any, *, memory: Memory = HEAP, **rest: Any
    ) -> Tensor:
        return memory.empty(q.shape, dtype=q.dtype, device=q.device)

    @staticmethod
    def patch_embed(
        pixels: Tensor,
        layer: Linear,
        table: Tensor,
        grids: Any,
        merge: int,
        *,
        memory: Memory = HEAP,
    ) -> Tensor:
        dtype = layer.weight[0].dtype
        return memory.empty((len(pixels), _width(layer)), dtype=dtype, device=pixels.device)


class _Native(_Fused):
    @staticmethod
    def patch_embed(
        pixels: Tensor, layer: Linear, table: Tensor, grids: Any, merge: int, **place: Any
    ) -> Tensor:
        out = _Fused.patch_embed(pixels, layer, table, grids, merge, **place)
        positions = resample_positions(table, grids, merge)
        del positions
        return out


class _Triton(_Fused):
    allocating: ClassVar[Collection[str]] = (*_Fused.allocating, "add_linear")

    @staticmethod
    def linear(
        x: Rows, layer: Linear, *, activation: str | None = None, memory: Memory = HEAP
    ) -> Tensor:
        rows = _Triton._taken(x, layer, memory)
        wide = _Triton._widened(rows, layer)
        out = _Fused.linear(rows, layer, memory=memory)
        del wide
        return out

    @staticmethod
    def add_linear(y: Tensor, x: Rows, layer: Linear, *, memory: Memory = HEAP) -> None:
        rows = _Triton._taken(x, layer, memory)
        wide = _Triton._widened(rows, layer)
        del rows, wide

    @staticmethod
    def gated_linear(
        x: Rows, layer: Linear, *, rows: RowFormat = "float", memory: Memory = HEAP
    ) -> Rows:
        wide = _Triton._widened(x, layer)
        out = _Fused.gated_linear(x, layer, rows=rows, memory=memory)
        del wide
        return out

    @staticmethod
    def _taken(x: Rows, layer: Linear, memory: Memory) -> Rows:
        """Rows that no norm has quantised are in a launch of their own."""
        return _rows(x, layer.rows, memory) if isinstance(x, Tensor) else x

    @staticmethod
    def _widened(x: Rows, layer: Linear) -> list[Tensor]:
        """int4 as int8, which many int8 rows are multiplied by."""
        many = isinstance(x, QuantisedRows) and len(x.values) > INT4_ROWS
        parts = layer.weight if many and layer.rows == "int8" else ()
        fours = [part for part in parts if isinstance(part, Int4Weight)]
        return [torch.empty(four.shape, dtype=torch.int8, device=_device(x)) for four in fours]


STAND_IN_OPS: dict[str, type[Ops]] = {"reference": _Reference, "native": _Native, "triton": _Triton}
"""By the name of the backend, whose results they have the shapes of."""
