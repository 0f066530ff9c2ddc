"""How much memory a model takes, known before it is loaded or run.

Weights are counted from shapes and formats. For activations the model's own code runs over tensors
that have a shape and no storage, with a table of ops that allocate what a backend's ops allocate
and compute nothing; the bytes that are alive at once are added up as it goes. So the peak follows
the code, whatever is changed there. Not in it: what torch's allocator keeps for later use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .arena import HEAP, Arena, Memory
from .backends.native import NativeOps
from .batch import Batch, PieceLimits, Window, pack
from .config import ModelConfig
from .kernels.configs import INT4_ROWS
from .model import Model, drain
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
)

META = torch.device("meta")
_PROBE = 512  # rows of a batch that is measured, and of its windows
_SLACK = 1 << 16  # tensors begin at multiples of 256 bytes
_PANEL = 16  # output channels that the CPU kernels store together, see csrc/pack.h

Format = str
"""``float``, or a format of quantised weights: int8, int4, fp8, fp8_blocks."""


@dataclass(frozen=True)
class Setup:
    """What decides how much a model takes, besides its shape.

    Attributes:
        dtype: of activations and of weights in floating point.
        backend: ``reference``, ``native`` or ``triton``.
        form: the format of a linear, by its published name without ``model.`` and ``.weight``.
        group: inputs that share a multiplier, in int4.
        weight_only: int4 weights are multiplied by rows in floating point.
    """

    dtype: torch.dtype
    backend: str = "reference"
    form: Callable[[str], Format] = lambda name: "float"
    group: int = 64
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
        known = {published_name(full): value.form for full, value in stored.items()}

        def form(name: str) -> Format:
            if (found := known.get(name)) in keeps:
                return str(found)
            if plan is None or not plan.covers(name):
                return "float"
            return plan.format if plan.format in keeps else "float"

        if plan is None:
            return cls(dtype, backend, form)
        return cls(dtype, backend, form, plan.group, plan.weight_only)

    def rows(self, name: str) -> RowFormat:
        """The form in which that linear takes its input."""
        forms: dict[str, RowFormat] = {
            "int8": "int8",
            "int4": "float" if self.weight_only else "int8",
            "fp8": "fp8",
            "fp8_blocks": "fp8",
        }
        return forms.get(self.form(name), "float")


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], setup: Setup) -> dict[str, int]:
    """Bytes of each tensor of a loaded model, by its published name without ``model.``.

    Args:
        shapes: of :func:`qvlfast.weights.expected_shapes`.
    """
    found = {}
    for full, shape in shapes.items():
        name = full.removeprefix("model.")
        if name == "lm_head.weight":
            found[name] = 2 * shape[1] * 4  # the rows of yes and no
        elif len(shape) == 2 and not name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            form = setup.form(name.removesuffix(".weight"))
            found[name] = linear_bytes(shape[0], shape[1], form, setup)
        elif name.endswith("patch_embed.proj.weight"):
            # Twice: for the frame of a still, and for those of a video.
            k = int(np.prod(shape[1:]))
            sizes = (k // shape[2], k)
            found[name] = sum(linear_bytes(shape[0], size, "float", setup) for size in sizes)
        elif name.endswith(".bias") and ".norm" not in name:
            # Summed up in float32, except by the reference.
            wide = setup.backend != "reference" or "patch_embed" in name
            twice = 2 if "patch_embed" in name else 1
            found[name] = twice * shape[0] * (4 if wide else setup.dtype.itemsize)
        else:
            found[name] = int(np.prod(shape)) * setup.dtype.itemsize
    return found


def linear_bytes(n: int, k: int, form: Format, setup: Setup) -> int:
    """Bytes of one ``[N, K]`` weight."""
    group, size = setup.group, setup.dtype.itemsize
    if setup.backend == "native":
        # Panels of 16 channels; K in steps that every instruction set can take.
        n = -(-n // _PANEL) * _PANEL
        k = -(-k // (step := {"float": 32, "int4": max(group, 64)}.get(form, 64))) * step
        sums = 4 if form == "int8" else 0
    else:
        sums = 0
        if setup.backend == "triton" and form == "int4":
            k = -(-k // (2 * group)) * 2 * group
    if form == "int8":
        return n * k + n * (4 + sums)
    if form == "int4":
        return n * k // 2 + n * -(-k // group) + n * 4
    if form == "fp8":
        return n * k + n * 4
    if form == "fp8_blocks":
        # Triton's kernels have the scales of a block's rows one by one.
        return n * k + 4 * -(-k // 128) * (n if setup.backend == "triton" else -(-n // 128))
    return n * k * size


def peak_activations(
    config: ModelConfig,
    setup: Setup,
    *,
    tokens: int,
    patches: int,
    longest: int = 8192,
    limits: PieceLimits | None = None,
) -> int:
    """Bytes alive at the largest moment of a forward pass, its inputs included.

    Args:
        tokens: of the batch, those that stand for pictures included.
        patches: of all pictures together; four or so make a token.
        longest: tokens of the longest prompt.
        limits: of what is worked at once; None: the whole batch is.
    """
    prompts = _prompts(config, tokens, patches, longest)
    model = _stand_in(config, setup)
    # A first time to know the size of the block.
    arena = Arena(META)
    _pass(model, prompts, limits, arena)
    size = arena.peak
    with _Counter() as counter:
        arena.reserve(size)
        _pass(model, prompts, limits, arena)
    return counter.peak + _scratch(config, setup, tokens, patches)


def _stand_in(config: ModelConfig, setup: Setup) -> Model:
    small = shortened(config)
    return Model(small, stand_in_weights(small, setup), _OPS[setup.backend]())


def _pass(
    model: Model, prompts: Sequence[Prompt], limits: PieceLimits | None, memory: Memory
) -> None:
    merge = model.config.vision.spatial_merge_size
    batch = pack(prompts, merge, META, limits=limits).batch
    answer = model.forward(batch, memory=memory)
    del answer, batch


@dataclass(frozen=True)
class _Stage:
    """What one of the model's stages takes, in bytes, by its rows.

    Attributes:
        whole: of each row, where all are worked at once.
        lasting: of each row, through all windows.
        window: of each row of a window besides.
    """

    whole: float
    lasting: float
    window: float

    def size(self, rows: int, windows: Sequence[Window], once: int = 0, more: int = 0) -> int:
        """
        Args:
            rows: of the batch.
            once: rows that are worked at once besides the windows.
            more: rows that only last.
        """
        if not windows and not more:
            return int(self.whole * rows) + _SLACK
        most = max([once, *(w.rows.stop - w.rows.start for w in windows)] if windows else [rows])
        return int(self.lasting * (rows + more) + self.window * most) + _SLACK


@dataclass(frozen=True)
class ArenaPlan:
    """What a batch takes of an :class:`qvlfast.arena.Arena`, known before it is run.

    Measured on tensors without storage: what every op takes grows with its rows and with nothing
    else, so a few batches say it of all.
    """

    text: _Stage
    vision: _Stage

    @classmethod
    def measure(cls, config: ModelConfig, setup: Setup) -> ArenaPlan:
        """The plan of a model; takes some milliseconds."""
        model, merge = _stand_in(config, setup), config.vision.spatial_merge_size

        def text(rows: int, limits: PieceLimits | None, arena: Arena) -> None:
            _pass(model, [stand_in_prompt(config, rows)], limits, arena)

        def vision(rows: int, limits: PieceLimits | None, arena: Arena) -> None:
            grid = (rows // _PROBE, merge, _PROBE // merge)
            prompt = stand_in_prompt(config, 0, grid, is_video=True)
            batch = pack([prompt], merge, META, limits=limits).batch.vision
            assert batch is not None
            drain(model.vision(batch, memory=arena))

        return cls(_measured(text), _measured(vision))

    def size(self, batch: Batch, resident: int = 0) -> int:
        """Bytes for one batch.

        Args:
            resident: tokens whose keys and values are from earlier batches.
        """
        size = self.text.size(len(batch.ids), batch.windows, len(batch.read), resident)
        vision = batch.vision
        if vision is None:
            return size
        return max(size, self.vision.size(vision.positions.shape[1], vision.windows))


def _measured(stage: Callable[[int, PieceLimits | None, Arena], None]) -> _Stage:
    def taken(rows: int, limits: PieceLimits | None) -> int:
        arena = Arena(META)
        stage(rows, limits, arena)
        return arena.peak

    limits = PieceLimits(_PROBE, 1 << 62, _PROBE)
    some = taken(2 * _PROBE, limits)
    whole = (taken(2 * _PROBE, None) - taken(_PROBE, None)) / _PROBE
    lasting = (taken(4 * _PROBE, limits) - some) / (2 * _PROBE)
    return _Stage(whole, lasting, max(whole, some / _PROBE - 2 * lasting))


def keys_values_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers, as a cache holds them."""
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * dtype.itemsize


def visual_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one visual token and its levels of deepstack, as a cache holds them."""
    levels = 1 + len(config.vision.deepstack_layers)
    return levels * config.vision.out_hidden_size * dtype.itemsize


def largest_batch(peak: Callable[[int], int], room: int, most: int = 1 << 18) -> int:
    """The largest n up to ``most`` with ``peak(n) <= room``; 0 if there is none.

    Args:
        peak: grows evenly, as :func:`peak_activations` does with tokens or patches alone.
    """
    low, high = peak(1024), peak(2048)
    slope = (high - low) / 1024
    return min(max(int(1024 + (room - low) / slope), 0), most)


def _scratch(config: ModelConfig, setup: Setup, tokens: int, patches: int) -> int:
    """What the CPU kernels keep: keys and values of a layer in float32, head by head."""
    if setup.backend != "native":
        return 0
    text, vision = config.text, config.vision
    own = 2 * 4 * text.num_kv_heads * text.head_dim * tokens
    width = -(-vision.head_dim // _PANEL) * _PANEL
    return max(own, 2 * 4 * vision.num_heads * width * patches)


def shortened(config: ModelConfig) -> ModelConfig:
    """The same peak from fewer layers: all of one kind need the same."""
    levels = len(config.vision.deepstack_layers)
    vision = replace(config.vision, depth=levels + 1, deepstack_layers=tuple(range(levels)))
    layers = min(levels + 2, config.text.num_layers)
    return replace(config, vision=vision, text=replace(config.text, num_layers=layers))


def _prompts(config: ModelConfig, tokens: int, patches: int, longest: int) -> list[Prompt]:
    """Made-up prompts that together have so many tokens and patches."""
    merge = config.vision.spatial_merge_size
    visual = patches // merge**2
    if visual:
        # As a video of one row of blocks: those have the larger pixels.
        grid = (1, merge, visual * merge)
        return [stand_in_prompt(config, tokens, grid, is_video=True)]
    lengths = [max(tokens, 1)]
    while lengths[-1] > longest:
        lengths[-1:] = [longest, lengths[-1] - longest]
    return [stand_in_prompt(config, length) for length in lengths]


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
) -> ModelWeights:
    """Weights without storage.

    Args:
        prepare: makes a linear of parts and a bias, told ``gated`` and the ``rows`` it wants.
    """
    text, vision = config.text, config.vision

    def new(*shape: int, dtype: torch.dtype = setup.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def linear(name: str, k: int, *sizes: int, bias: bool = False, gated: bool = False) -> Linear:
        parts = [_weight(n, k, setup.form(name), setup) for n in sizes]
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


def _weight(n: int, k: int, form: Format, setup: Setup) -> Weight:
    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    scale = new(n, dtype=torch.float32)
    if form == "int8":
        return Int8Weight(new(n, k, dtype=torch.int8), scale)
    if form == "int4":
        multiplier = new(n, -(-k // setup.group), dtype=torch.uint8)
        return Int4Weight(new(n, k // 2, dtype=torch.uint8), multiplier, scale, setup.group)
    if form in ("fp8", "fp8_blocks"):
        return Fp8Weight(new(n, k, dtype=torch.float8_e4m3fn), scale)
    return new(n, k, dtype=setup.dtype)


def _width(layer: Linear) -> int:
    return sum(part.shape[0] for part in layer.weight)


def _rows(x: Tensor, form: RowFormat, memory: Memory) -> Rows:
    if form == "float":
        return x
    values = memory.empty(x.shape, dtype=torch.int8, device=META)
    return QuantisedRows(values, memory.empty((len(x),), dtype=torch.float32, device=META), x.dtype)


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
        return memory.empty((len(x), _width(layer)), dtype=x.dtype, device=META)

    @staticmethod
    def add_linear(y: Tensor, x: Rows, layer: Linear) -> None:
        pass

    @staticmethod
    def gated_linear(
        x: Rows, layer: Linear, *, rows: RowFormat = "float", memory: Memory = HEAP
    ) -> Rows:
        out = memory.empty((len(x), _width(layer) // 2), dtype=x.dtype, device=META)
        return _rows(out, rows, memory)

    @staticmethod
    def embed(ids: Tensor, table: Tensor, *, memory: Memory = HEAP) -> Tensor:
        return memory.empty((len(ids), table.shape[1]), dtype=table.dtype, device=META)

    @staticmethod
    def rms_norm(
        x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float", memory: Memory = HEAP
    ) -> Rows:
        if rows == "float":
            return memory.empty(x.shape, dtype=x.dtype, device=META)
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
        return _rows(memory.empty(x.shape, dtype=x.dtype, device=META), rows, memory)

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
        return memory.empty(q.shape, dtype=q.dtype, device=META)

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
        return memory.empty((len(pixels), _width(layer)), dtype=dtype, device=META)


class _Native(_Fused):
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
        out = _Fused.patch_embed(pixels, layer, table, grids, merge, memory=memory)
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
        return [torch.empty(four.shape, dtype=torch.int8, device=META) for four in fours]


_OPS: dict[str, type[Ops]] = {"reference": _Reference, "native": _Native, "triton": _Triton}


class _Counter(TorchDispatchMode):
    """Adds up the bytes of the tensors without storage that are alive.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
