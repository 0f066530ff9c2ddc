"""What a checkpoint takes on a device, from its headers alone: weights, activations, the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from ..batch import piece_limits
from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..dispatch import choose_ops
from ..errors import BackendError
from ..memory import largest_batch, peak_activations, weight_bytes
from ..quant import Quantization
from ..quant.stored import find_stored
from ..stand_in import Setup
from ..weights import own_shapes

# Python, torch and the tokenizer were measured at 0.45 GiB on a CPU; pixels that wait for the
# model take up to 0.2 GiB more. A CUDA context and its libraries take about 0.6 GiB of the GPU.
_PROCESS = int(0.65 * 2**30)
_CONTEXT = int(0.6 * 2**30)

# Whether one memory serves a GPU and the CPU.
_SHARED = {
    "sm_80": False,
    "sm_86": False,
    "sm_87": True,  # Orin
    "sm_89": False,
    "sm_90": False,
    "sm_100": False,
    "sm_103": False,
    "sm_110": True,  # Thor
    "sm_120": False,
    "sm_121": True,  # GB10
}
_FP8_FROM = 89
_PARTS = ("vision tower", "mergers", "token embedding", "decoder layers", "head")


@dataclass(frozen=True)
class Device:
    """What is planned for.

    Attributes:
        name: as it was asked for, or what ``auto`` is.
        kind: ``cpu`` or ``cuda``.
        memory: bytes, if they are known.
        fixed: bytes that are taken besides the model.
        fp8: it multiplies FP8.
    """

    name: str
    kind: str
    memory: int | None
    fixed: int
    fp8: bool


@dataclass(frozen=True)
class Part:
    """Some tensors that belong together.

    Attributes:
        name: for a reader.
        parameters: how many numbers.
        loaded: bytes of those that a loaded model keeps.
        formats: bytes of them by format.
    """

    name: str
    parameters: int
    loaded: int
    formats: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Bytes on the device.

    Attributes:
        dtype: of what is not quantised.
        backend: that was planned for.
        parts: the weights.
        activations: the largest moment of a full batch.
        fixed: besides the model.
    """

    dtype: str
    backend: str
    parts: tuple[Part, ...]
    activations: int
    fixed: int

    @property
    def weights(self) -> int:
        return sum(part.loaded for part in self.parts)

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.fixed


@dataclass(frozen=True)
class Wish:
    """What is to be planned: ``dtype`` and ``quantization`` as ``from_pretrained`` takes them.

    Attributes:
        tokens, patches: the most that one forward pass holds.
        longest: tokens of the longest prompt.
    """

    dtype: str
    quantization: Quantization | None
    backend: str
    tokens: int
    patches: int
    longest: int

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


class Planner:
    """Plans for one checkpoint on one device."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, device: Device) -> None:
        self.config = config
        self.device = device
        own = own_shapes(checkpoint, config)
        self.stored = find_stored(checkpoint, own)
        self.shapes = {n: s for n, s in own.items() if n in checkpoint.shapes or n in self.stored}
        self.missing = sorted(set(own) - set(self.shapes) - {"lm_head.weight"})

    def plan(self, wish: Wish) -> Plan:
        """Bytes of what is wished for.

        Raises:
            BackendError: the backend does not run it.
        """
        setup = self.setup(wish)
        return Plan(
            wish.dtype,
            setup.backend,
            self._parts(setup),
            peak_activations(
                self.config,
                setup,
                tokens=wish.tokens,
                patches=wish.patches,
                longest=wish.longest,
                limits=piece_limits(self.device.kind),
            ),
            self.device.fixed,
        )

    def largest(self, wish: Wish, *, pictures: bool) -> int:
        """The largest batch that fits: tokens of text alone, or patches of pictures alone.

        Only with a known memory.
        """
        assert self.device.memory is not None
        setup = self.setup(wish)
        weights = sum(part.loaded for part in self._parts(setup))
        room = self.device.memory - weights - self.device.fixed
        merged = self.config.vision.spatial_merge_size**2

        def peak(count: int) -> int:
            tokens, patches = (count // merged, count) if pictures else (count, 0)
            return peak_activations(
                self.config,
                setup,
                tokens=tokens,
                patches=patches,
                longest=wish.longest,
                limits=piece_limits(self.device.kind),
            )

        return largest_batch(peak, room)

    def setup(self, wish: Wish) -> Setup:
        """Formats and backend of what is wished for.

        Raises:
            BackendError: the backend does not run it.
        """
        dtype, plan = wish.torch_dtype, wish.quantization
        # The table of a device that need not be here.
        name, keeps = "triton", {"int8", "int4", "fp8", "fp8_blocks"}
        if wish.backend != "triton":
            device = torch.device(self.device.kind)
            ops = choose_ops(wish.backend, device, dtype, plan)
            name, keeps = ops.name, keeps & set(ops.keeps)
        elif plan is not None and plan.format == "fp8" and not self.device.fp8:
            raise BackendError(
                f"{self.device.name} has no FP8, which begins with sm_{_FP8_FROM}: use int8"
            )
        if name == "triton" and not self.device.fp8:
            keeps -= {"fp8", "fp8_blocks"}
        return Setup.loaded(dtype, name, keeps, self.stored, plan)

    def _parts(self, setup: Setup) -> tuple[Part, ...]:
        loaded = weight_bytes(self.shapes, setup)
        found: dict[str, Part] = {name: Part(name, 0, 0, {}) for name in _PARTS}
        for full, shape in self.shapes.items():
            name = full.removeprefix("model.")
            part = found[_group(name)]
            form = setup.form(name.removesuffix(".weight")) if len(shape) == 2 else "float"
            formats = dict(part.formats)
            formats[form] = formats.get(form, 0) + loaded[name]
            found[part.name] = replace(
                part,
                parameters=part.parameters + prod(shape),
                loaded=part.loaded + loaded[name],
                formats=formats,
            )
        return tuple(part for part in found.values() if part.parameters)


def advice(planner: Planner, wish: Wish, plan: Plan) -> list[str]:
    """What would fit where ``plan`` does not, the least change first; empty if it fits."""
    memory = planner.device.memory
    if memory is None or plan.total <= memory:
        return []
    found = []
    smaller = wish
    while smaller.tokens > 512:
        smaller = replace(
            smaller,
            tokens=smaller.tokens // 2,
            patches=min(smaller.patches, 2 * smaller.tokens),
            longest=min(smaller.longest, smaller.tokens // 2),
        )
        if planner.plan(smaller).total <= memory:
            found.append(
                f"--batch-tokens {smaller.tokens} --batch-patches {smaller.patches} "
                f"--max-length {smaller.longest}"
            )
            break
    for form in ("int8", "int4"):
        if (
            wish.quantization is None
            and planner.plan(replace(wish, quantization=Quantization(form))).total <= memory
        ):
            found.append(f"--quantization {form}")
            break
    return found or ["no smaller batch and no format of this package: take a smaller model"]


def find_device(name: str, memory: int | None) -> Device:
    """The device that ``--device`` names: here, or any GPU by its architecture.

    Raises:
        BackendError: there is no such device.
    """
    if re.fullmatch(r"sm_\d+", name):
        if name not in _SHARED:
            raise BackendError(f"device {name!r} is unknown: use one of {', '.join(_SHARED)}")
        fixed = _CONTEXT + (_PROCESS if _SHARED[name] else 0)
        return Device(name, "cuda", memory, fixed, int(name[3:]) >= _FP8_FROM)
    here = torch.cuda.is_available()
    kind = name.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if here else "cpu"
    if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", name):
        raise BackendError(f"device {name!r} is not supported: use auto, cpu, cuda:0 or sm_87")
    if kind == "cpu":
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("cpu", kind, memory or own, _PROCESS, True)
    if not here:
        return Device("cuda", kind, memory, _CONTEXT, True)
    chosen = torch.device("cuda:0" if name in ("auto", "cuda") else name)
    properties = torch.cuda.get_device_properties(chosen)
    fp8 = 10 * properties.major + properties.minor >= _FP8_FROM
    return Device(str(chosen), kind, memory or properties.total_memory, _CONTEXT, fp8)


def _group(name: str) -> str:
    if name.startswith("lm_head"):
        return "head"
    if name.startswith("visual."):
        return "mergers" if "merger" in name else "vision tower"
    return "token embedding" if "embed_tokens" in name else "decoder layers"


def formats_of(part: Part, dtype: str) -> Mapping[str, int]:
    """Bytes of a part by the name of their format."""
    return {dtype if form == "float" else form: size for form, size in part.formats.items()}
