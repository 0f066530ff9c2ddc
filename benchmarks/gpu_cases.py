"""Every op with inputs of the model's sizes, for checking and timing on a GPU.

A case is built from a table of ops, so that the same inputs go through the kernels, through the
reference in float32 on the same values, and, where there is one, through what torch has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qvlfast.flash import describe
from qvlfast.ops import Forest, Ops, Rows
from qvlfast.ops.rows import quantise_rows
from qvlfast.quant import Fp8BlockWeight, QuantisedWeight, quantise

Thunk: TypeAlias = Callable[[], Any]
Build: TypeAlias = Callable[[Any, dict[str, Tensor]], Thunk]

# Largest error over the largest value of the truth. float32: sums of some thousand products in
# another order. 16 bits: the result is rounded once, to 8 or 11 significant bits. Quantised rows
# may be tipped into the next step, 1/127 of the largest, by a last bit.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ROWS_TOLERANCE = {"int8": 1.6e-2}


@dataclass(frozen=True)
class Sizes:
    """What the cases are as large as."""

    hidden: int = 2048
    ffn: int = 6144
    heads: int = 16
    kv_heads: int = 8
    dim: int = 128
    vision: int = 1024
    vision_ffn: int = 4096
    vision_dims: tuple[int, ...] = (64, 72)
    vision_heads: int = 16
    vocab: int = 151_936
    rows: tuple[int, ...] = (1, 17, 128, 2048)
    tokens: tuple[int, ...] = (32, 512, 4096)
    patches: int = 4096


DRY = Sizes(
    hidden=128, ffn=192, heads=4, kv_heads=2, dim=32, vision=64, vision_ffn=80,
    vision_dims=(16, 24), vision_heads=2, vocab=500, rows=(1, 17), tokens=(20,), patches=16,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One op on some inputs.

    Attributes:
        inputs: by name; the truth gets the same values in float32.
        build: what runs it with a table of ops; weights are prepared once, outside of the timing.
        peers: name → what runs the same by other means, made from the inputs.
        flops, bytes: of the work itself, read and written once.
    """

    op: str
    name: str
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    build: Build
    peers: dict[str, Callable[[dict[str, Tensor]], Thunk]] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    tolerance: float = 0.0

    def truth(self) -> Any:
        """The reference in float32."""
        wide = {k: v.float() if v.is_floating_point() else v for k, v in self.inputs.items()}
        return self.build(Ops(), wide)()


class Maker:
    """Random inputs, the same for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (values * scale).to(dtype)

    def whole(self, most: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(most, shape, generator=self.generator, device=self.device, dtype=dtype)


def cases(sizes: Sizes, device: torch.device, *, fp8: bool) -> Iterator[Case]:
    """All of them, one at a time, since their inputs take memory."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        make = Maker(device)
        yield from products(sizes, make, dtype)
        yield from attentions(sizes, make, dtype)
        yield from row_wise(sizes, make, dtype)
    forms = ("int8", "int4", "int4_float", *(("fp8", "fp8_blocks") if fp8 else ()))
    for form in forms:
        yield from quantised_products(sizes, Maker(device), form)


def _linear(**options: Any) -> Build:
    def build(ops: Any, t: dict[str, Tensor]) -> Thunk:
        if ops.name == "triton":  # the kernel itself, whoever the backend would choose
            from qvlfast.kernels.gemm import linear

            return lambda: linear(t["x"], t["w"], t.get("bias"), **options)
        layer = ops.prepare([t["w"]], t.get("bias"))
        return lambda: ops.linear(t["x"], layer, **options)

    return build


def _onto(ops: Any, t: dict[str, Tensor]) -> Thunk:
    if ops.name == "triton":
        from qvlfast.kernels.gemm import linear

        return _in_place(t["residual"], lambda y: linear(t["x"], t["w"], residual=y, out=y))
    layer = ops.prepare([t["w"]])
    return _in_place(t["residual"], lambda y: ops.add_linear(y, t["x"], layer))


def _in_place(x: Tensor, change: Callable[[Tensor], None]) -> Thunk:
    """What changes ``x``, done to a copy: the first answer is the one that is checked."""
    changed = x.clone()

    def run() -> Tensor:
        change(changed)
        return changed

    return run


def _gated(ops: Any, t: dict[str, Tensor]) -> Thunk:
    layer = ops.prepare([t["gate"], t["up"]], gated=True)
    return lambda: ops.gated_linear(t["x"], layer)


def products(sizes: Sizes, make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """q, down (onto the residual), gate and up, and the vision tower's fc1."""
    b, tolerance = dtype.itemsize, TOLERANCE[dtype]
    h, ffn = sizes.hidden, sizes.ffn
    for m in sizes.rows if dtype == torch.bfloat16 else sizes.rows[-1:]:
        for label, n, k, onto in (("q", h, h, False), ("down", h, ffn, True)):
            inputs = {"x": make(m, k, dtype=dtype), "w": make(n, k, dtype=dtype, scale=k**-0.5)}
            if onto:
                inputs["residual"] = make(m, n, dtype=dtype)
            yield Case(
                "linear", f"{label} m={m}", dtype, inputs, _onto if onto else _linear(),
                {"cublas": lambda t: lambda: F.linear(t["x"], t["w"])},
                2 * m * n * k, b * (m * k + n * k + m * n * (1 + onto)), tolerance,
            )  # fmt: skip
        inputs = {"x": make(m, h, dtype=dtype)}
        inputs |= {name: make(ffn, h, dtype=dtype, scale=h**-0.5) for name in ("gate", "up")}
        yield Case(
            "gated_linear", f"m={m}", dtype, inputs, _gated, {"torch": _torch_gated},
            4 * m * ffn * h, b * (m * h + 2 * ffn * h + m * ffn), tolerance,
        )  # fmt: skip
    m, n, k = sizes.patches, sizes.vision_ffn, sizes.vision
    inputs = {"x": make(m, k, dtype=dtype), "w": make(n, k, dtype=dtype, scale=k**-0.5)}
    inputs["bias"] = make(n, dtype=dtype)
    yield Case(
        "linear", "fc1 gelu_tanh", dtype, inputs, _linear(activation="gelu_tanh"),
        {"torch": _torch_gelu},
        2 * m * n * k, b * (m * k + n * k + m * n), tolerance,
    )  # fmt: skip


def _torch_gelu(t: dict[str, Tensor]) -> Thunk:
    return lambda: F.gelu(F.linear(t["x"], t["w"], t["bias"]), approximate="tanh")


def _torch_gated(t: dict[str, Tensor]) -> Thunk:
    both = torch.cat([t["gate"], t["up"]])

    def run() -> Tensor:
        gate, up = F.linear(t["x"], both).chunk(2, dim=1)
        return F.silu(gate) * up

    return run


def quantised_products(sizes: Sizes, make: Maker, form: str) -> Iterator[Case]:
    """The decoder's products on rows that are quantised already, or for ``int4_float`` are floats;
    the truth has the same rows."""
    dtype, (n, k) = torch.bfloat16, (sizes.hidden, sizes.ffn)
    by_float = form == "int4_float"
    for m in sizes.rows:
        inputs = {"x": make(m, k, dtype=dtype), "w": make(n, k, dtype=dtype, scale=k**-0.5)}

        def build(ops: Any, t: dict[str, Tensor], form: str = form) -> Thunk:
            if form == "fp8_blocks":
                weight: QuantisedWeight = _blocks(t["w"])
            else:
                weight = quantise(t["w"], form.removesuffix("_float"))
            x: Rows = t["x"]
            if not by_float:
                x = quantise_rows(t["x"], "fp8" if "fp8" in form else "int8")
            if ops.name == "reference":
                wide = x if isinstance(x, Tensor) else x.values.float() * x.scale[:, None]
                return lambda: wide @ weight.dequantise().T
            layer = ops.prepare([weight], weight_only=by_float)
            return lambda: ops.linear(x, layer)

        size = n * k // (2 if "int4" in form else 1)
        yield Case(
            f"linear_{form}", f"down m={m}", dtype, inputs, build,
            {"cublas bf16": lambda t: lambda: F.linear(t["x"], t["w"])},
            2 * m * n * k, m * k * (1 + by_float) + size + 2 * m * n,
            TOLERANCE[dtype],
        )  # fmt: skip


def _blocks(weight: Tensor) -> Fp8BlockWeight:
    n, k = weight.shape
    whole = F.pad(weight.float(), (0, -k % 128, 0, -n % 128))
    blocks = whole.view(whole.shape[0] // 128, 128, -1, 128)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    values = (blocks / scale[:, None, :, None]).view(whole.shape)[:n, :k]
    return Fp8BlockWeight(values.to(torch.float8_e4m3fn).contiguous(), scale)


def attentions(sizes: Sizes, make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """Causal over one prompt and over many, over a forest, the last token's, and the tower's."""
    heads, kv, d = sizes.heads, sizes.kv_heads, sizes.dim
    lengths = sizes.tokens if dtype == torch.bfloat16 else sizes.tokens[:1]
    for length in lengths:
        yield _attention(make, dtype, f"causal {length}", Forest.plain([length]), heads, kv, d)
    short = sizes.tokens[0]
    yield _attention(make, dtype, f"causal 16x{short}", Forest.plain([short] * 16), heads, kv, d)
    plain = Forest.plain([2 * short, short, short, short + 1])
    tree = Forest(plain.cu_q, plain.cu_k, np.array([-1, 0, 0, 2], np.int32))
    yield _attention(make, dtype, "forest", tree, heads, kv, d)
    last = Forest.plain([sizes.tokens[-1]])
    read = np.array([sizes.tokens[-1] - 1])
    yield _attention(make, dtype, "last token", last, heads, kv, d, read=read)
    for dim in sizes.vision_dims:
        v, side = sizes.vision_heads, Forest.plain([sizes.patches])
        yield _attention(make, dtype, f"vision d={dim}", side, v, v, dim, causal=False)


def _attention(
    make: Maker,
    dtype: torch.dtype,
    name: str,
    forest: Forest,
    heads: int,
    kv: int,
    dim: int,
    *,
    causal: bool = True,
    read: Any = None,
) -> Case:
    tokens = int(forest.cu_k[-1])
    asked = tokens if read is None else len(read)
    inputs = {"q": make(asked, heads, dim, dtype=dtype)}
    inputs |= {n: make(tokens, kv, dim, dtype=dtype) for n in ("k", "v")}
    scale = dim**-0.5

    def build(ops: Any, t: dict[str, Tensor]) -> Thunk:
        return lambda: ops.attention(
            t["q"], t["k"], t["v"], forest, causal=causal, scale=scale, read=read
        )

    peers: dict[str, Callable[[dict[str, Tensor]], Thunk]] = {}
    if len(forest.parent) == 1 and read is None:
        peers["sdpa"] = lambda t: _sdpa(t, causal, scale)
    if not describe(inputs["q"], forest, read).edges and read is None and dtype != torch.float32:
        peers["flash-attn"] = lambda t: _flash(t, forest, causal, scale)
    pairs = sum((n * (n + 1) // 2 if causal else n * n) for n in np.diff(forest.cu_q).tolist())
    pairs = tokens if read is not None else pairs
    return Case(
        "attention", name, dtype, inputs, build, peers, 4 * heads * dim * pairs,
        dtype.itemsize * dim * (2 * asked * heads + 2 * tokens * kv), 2 * TOLERANCE[dtype],
    )  # fmt: skip


def _sdpa(t: dict[str, Tensor], causal: bool, scale: float) -> Thunk:
    q, k, v = (t[n].transpose(0, 1)[None] for n in ("q", "k", "v"))
    return lambda: F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True
    )


def _flash(t: dict[str, Tensor], forest: Forest, causal: bool, scale: float) -> Thunk:
    from qvlfast.flash import _run_flash

    return lambda: _run_flash(t["q"], t["k"], t["v"], forest, causal, scale)


def _rms_norm(form: Any) -> Build:
    return lambda ops, i: lambda: ops.rms_norm(i["x"], i["w"], 1e-6, rows=form)


def _pool(size: int | None) -> Build:
    return lambda ops, i: lambda: ops.pool(i["x"], i["w"], 1e-6, read=i["read"], size=size)


def _vision_tables(dim: int) -> Build:
    return lambda ops, i: lambda: torch.cat(ops.vision_rope_tables(i["p"], dim, 1e4))


def row_wise(sizes: Sizes, make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """Norms, ropes, the lookups, the patch embedding, and what ends a pass."""
    t, h, d = sizes.tokens[-1], sizes.hidden, sizes.dim
    b, tolerance = dtype.itemsize, TOLERANCE[dtype]
    weight = make(h, dtype=dtype)

    def case(
        op: str,
        name: str,
        inputs: dict[str, Tensor],
        build: Build,
        size: int,
        peers: dict[str, Callable[[dict[str, Tensor]], Thunk]] | None = None,
        extra: float = 0.0,
    ) -> Case:
        return Case(op, name, dtype, inputs, build, peers or {}, 0, size, tolerance + extra)

    x = make(t, h, dtype=dtype)
    for form in ("float", "int8"):
        plain = form == "float"
        yield case(
            "rms_norm", f"{t} x {h} {form}", {"x": x, "w": weight}, _rms_norm(form),
            t * h * (b + (b if plain else 1)),
            {"torch": lambda i: lambda: F.rms_norm(i["x"], (h,), i["w"], 1e-6)} if plain else {},
            0.0 if plain else ROWS_TOLERANCE["int8"],
        )  # fmt: skip
    c, n = sizes.vision, sizes.patches
    inputs = {"x": make(n, c, dtype=dtype), "w": make(c, dtype=dtype), "b": make(c, dtype=dtype)}
    yield case(
        "layer_norm", f"{n} x {c}", inputs,
        lambda ops, i: lambda: ops.layer_norm(i["x"], i["w"], i["b"], 1e-6), 2 * n * c * b,
        {"torch": lambda i: lambda: F.layer_norm(i["x"], (c,), i["w"], i["b"], 1e-6)},
    )  # fmt: skip
    positions = make.whole(4000, 3, t)
    section = (d // 2 - 2 * (d // 6), d // 6, d // 6)
    yield case(
        "mrope_tables", f"{t}", {"p": positions},
        lambda ops, i: lambda: torch.cat(ops.mrope_tables(i["p"], d, 5e6, section)), 4 * t * d,
        extra=2e-3,  # angles of thousands, whose last bits differ between libraries of sines
    )  # fmt: skip
    cos, sin = Ops.mrope_tables(positions, d, 5e6, section)
    for heads, label in ((sizes.heads, "q"), (sizes.kv_heads, "k")):
        inputs = {"x": make(t, heads, d, dtype=dtype), "w": make(d, dtype=dtype)}
        inputs |= {"cos": cos, "sin": sin}
        yield case(
            "norm_rope", f"{label} {t}", inputs,
            lambda ops, i: _in_place(
                i["x"], lambda x: ops.norm_rope(x, i["w"], i["cos"], i["sin"], 1e-6)
            ),
            2 * t * heads * d * b,
        )  # fmt: skip
    for dim in sizes.vision_dims:
        place = make.whole(60, 2, n)
        yield case(
            "vision_rope_tables", f"{n} d={dim}", {"p": place}, _vision_tables(dim),
            4 * n * dim, extra=1e-4,
        )  # fmt: skip
        tables = Ops.vision_rope_tables(place, dim, 1e4)
        inputs = {"x": make(n, sizes.vision_heads, dim, dtype=dtype)}
        inputs |= dict(zip(("cos", "sin"), tables, strict=True))
        yield case(
            "rope", f"{n} d={dim}", inputs,
            lambda ops, i: _in_place(i["x"], lambda x: ops.rope(x, i["cos"], i["sin"])),
            2 * n * sizes.vision_heads * dim * b,
        )  # fmt: skip
    table = make(sizes.vocab, h, dtype=dtype)
    yield case(
        "embed", f"{t}", {"ids": make.whole(sizes.vocab, t), "table": table},
        lambda ops, i: lambda: ops.embed(i["ids"], i["table"]), 2 * t * h * b,
        {"torch": lambda i: lambda: F.embedding(i["ids"], i["table"])},
    )  # fmt: skip
    index = torch.arange(0, t, 2, device=make.device)

    def add(ops: Any, i: dict[str, Tensor]) -> Thunk:
        def run() -> Tensor:
            onto = i["x"].clone()
            ops.add_rows(onto, i["index"], i["y"])
            return onto

        return run

    inputs = {"x": x, "index": index, "y": make(len(index), h, dtype=dtype)}
    yield case("add_rows", f"{len(index)} of {t}", inputs, add, 2 * t * h * b)
    side = int(n**0.5)
    for width, label in ((768, "still"), (1536, "video")):
        inputs = {"pixels": make.whole(256, side * side, width, dtype=torch.uint8)}
        inputs |= {
            "w": make(c, width, dtype=dtype, scale=0.002),
            "bias": make(c, dtype=torch.float32),
        }
        inputs["grid"] = make(48 * 48, c, dtype=dtype)

        def embed_patches(ops: Any, i: dict[str, Tensor], side: int = side) -> Thunk:
            layer = ops.prepare([i["w"]], i["bias"])
            return lambda: ops.patch_embed(i["pixels"], layer, i["grid"], [(1, side, side)], 2)

        yield case(
            "patch_embed", f"{label} {side * side}", inputs, embed_patches,
            side * side * (width + c * b) + c * width * b,
        )  # fmt: skip
    inputs = {"x": x, "w": weight, "read": index}
    for size in (None, h // 4):
        yield case(
            "pool", f"{len(index)} of {t}" + (f", {size} values" if size else ""), inputs,
            _pool(size), len(index) * (h * b + (size or h) * 4),
        )  # fmt: skip
    inputs = inputs | {"answers": make(2, h, dtype=torch.float32, scale=0.02)}
    yield case(
        "score", f"{len(index)} of {t}", inputs,
        lambda ops, i: lambda: ops.score(i["x"], i["w"], 1e-6, i["answers"], read=i["read"]),
        len(index) * h * b,
    )  # fmt: skip
