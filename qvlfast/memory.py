"""How much memory a model takes, known before it is loaded or run.

Weights are counted from shapes and formats. For activations the model's own code runs over weights
that have a shape and no storage, with a table of ops that allocate what a backend's ops allocate
and compute nothing; the bytes that are alive at once are added up as it goes. So the peak follows
the code, whatever is changed there. Not in it: what torch's allocator keeps for later use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .arena import Arena, Memory
from .batch import Batch, PieceLimits, Window, pack
from .config import ModelConfig
from .model import Model, drain
from .prompt import Prompt
from .stand_in import (
    META,
    STAND_IN_OPS,
    Format,
    Setup,
    shortened,
    stand_in_prompt,
    stand_in_weights,
)

CPU = torch.device("cpu")

_PROBE = 512  # rows of a batch that is measured, and of its windows
_SLACK = 1 << 16  # tensors begin at multiples of 256 bytes
_PANEL = 16  # output channels that the CPU kernels store together, see csrc/pack.h
_TRIES = 6  # at the largest batch: it is found to half a percent in two or three
_PACKED = 8192  # keys that their attention packs at once, see csrc/attention.cpp


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
            linear = name.removesuffix(".weight")
            form, group = setup.form(linear), setup.group(linear)
            found[name] = linear_bytes(shape[0], shape[1], form, setup, group)
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


def linear_bytes(n: int, k: int, form: Format, setup: Setup, group: int = 64) -> int:
    """Bytes of one ``[N, K]`` weight.

    Args:
        group: inputs that share a multiplier, in int4.
    """
    size = setup.dtype.itemsize
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
    model = _stand_in(config, setup, META)
    # A first time to know the size of the block.
    arena = Arena(META)
    _pass(model, prompts, limits, arena, META)
    size = arena.peak
    with _Counter() as counter:
        arena.reserve(size)
        _pass(model, prompts, limits, arena, META)
    return counter.peak + _scratch(config, setup, tokens, patches, longest)


def _stand_in(config: ModelConfig, setup: Setup, device: torch.device) -> Model:
    small = shortened(config)
    weights = stand_in_weights(small, setup, device=device)
    return Model(small, weights, STAND_IN_OPS[setup.backend]())


def _pass(
    model: Model,
    prompts: Sequence[Prompt],
    limits: PieceLimits | None,
    memory: Memory,
    device: torch.device,
) -> None:
    merge = model.config.vision.spatial_merge_size
    batch = pack(prompts, merge, device, limits=limits).batch
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

    Measured with weights that are one number each: what every op takes grows with its rows and with
    nothing else, so a few batches say it of all.
    """

    text: _Stage
    vision: _Stage

    @classmethod
    def measure(cls, config: ModelConfig, setup: Setup) -> ArenaPlan:
        """The plan of a model; takes some milliseconds."""
        model, merge = _stand_in(config, setup, CPU), config.vision.spatial_merge_size

        def text(rows: int, limits: PieceLimits | None, arena: Arena) -> None:
            _pass(model, [stand_in_prompt(config, rows)], limits, arena, CPU)

        def vision(rows: int, limits: PieceLimits | None, arena: Arena) -> None:
            grid = (rows // _PROBE, merge, _PROBE // merge)
            prompt = stand_in_prompt(config, 0, grid, is_video=True)
            batch = pack([prompt], merge, CPU, limits=limits).batch.vision
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
        arena = Arena(CPU)
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
    """About the largest n up to ``most`` with ``peak(n) <= room``; 0 if there is none.

    Args:
        peak: grows with n, as :func:`peak_activations` does with tokens or patches alone: evenly,
            and more slowly once the CPU kernels' attention works in groups.
    """
    before, n = 1024, 2048
    least, size = peak(before), peak(n)
    for _ in range(_TRIES):  # by the line through the last two
        slope = (size - least) / (n - before)
        found = min(max(int(n + (room - size) / slope), 0), most)
        if found in (0, most) or abs(found - n) <= n // 200:
            break
        before, least, n, size = n, size, found, peak(found)
    return found


def _scratch(config: ModelConfig, setup: Setup, tokens: int, patches: int, longest: int) -> int:
    """What the CPU kernels keep: keys and values that are packed at once, in float32 at most."""
    if setup.backend != "native":
        return 0
    text, vision = config.text, config.vision
    keys = min(tokens, max(longest, _PACKED))
    own = 2 * 4 * text.num_kv_heads * text.head_dim * keys
    width = -(-vision.head_dim // _PANEL) * _PANEL
    return max(own, 2 * 4 * vision.num_heads * width * patches)


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
