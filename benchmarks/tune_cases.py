"""What benchmarks.tune tries: the classes of shapes, the blocks for each, and products to time.

A class is one key of a table in kernels/measured.py. Its trials are the shapes of the 2B and 8B
models that fall into it; every candidate runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from qvlfast.kernels.attention import AttentionConfig, attention_config
from qvlfast.kernels.common import RowConfig, row_config
from qvlfast.kernels.configs import GemmConfig, fitted, reasoned
from qvlfast.kernels.gemm import linear, linear_quantised
from qvlfast.kernels.gemm_int4 import linear_int4, pack_int4
from qvlfast.kernels.gemm_int4_float import linear_int4_float
from qvlfast.kernels.measured import PRODUCTS
from qvlfast.kernels.norm import rms_norm
from qvlfast.kernels.quantise import quantise_rows
from qvlfast.kernels.vendor import vendor_linear
from torch import Tensor

from benchmarks.aot import SHARED_KB
from qvlfast.kernels import attention as kernels_attention
from qvlfast.ops import Forest, Ops

Config: TypeAlias = GemmConfig | AttentionConfig | RowConfig
Key: TypeAlias = tuple[Any, ...]

# Largest error over the largest value: one rounding to 8 bits. The kernels' tests are stricter.
TOLERANCE = 1.6e-2
# Accumulators a thread. mma.sync wants as many registers again for its operands, wgmma reads them
# from shared memory, and tcgen05 keeps even the accumulators elsewhere.
_ACCUMULATORS = {"sm_90": 128, "sm_100": 128, "sm_110": 128}
_BYTES = {"float16": 2, "int8": 1, "fp8": 1, "fp8_blocks": 1, "int4": 1, "int4_float": 1}
_MANY = 1 << 31


@dataclass(frozen=True)
class Sizes:
    """What the trials are as large as.

    Attributes:
        models: hidden size, that of the MLP, query heads, key heads.
        rows: class of rows → rows that are timed.
        tokens: of attention: one prompt, and many that together are as long.
        vision: hidden sizes of the towers, and their heads.
    """

    models: tuple[tuple[int, int, int, int], ...] = (
        (2048, 6144, 16, 8),
        (4096, 12288, 32, 8),
    )
    dim: int = 128
    rows: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: {16: (1, 16), 64: (24, 64), _MANY: (512, 4096)}
    )
    tokens: int = 2048
    vision: tuple[tuple[int, int], ...] = ((1024, 64), (1152, 72))
    vision_heads: int = 16


DRY = Sizes(
    models=((64, 80, 4, 2),), dim=32, rows={16: (3,), 64: (40,), _MANY: (70,)}, tokens=64,
    vision=((48, 16), (48, 24)), vision_heads=2,
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One shape.

    Attributes:
        run: the op with these blocks; quantised rows are values and scales.
        truth: the same in float32.
        vendor: the same by the vendor's library, where the code may choose between the two.
    """

    name: str
    run: Callable[[Config], Tensor | tuple[Tensor, Tensor]]
    truth: Callable[[], Tensor]
    vendor: Callable[[], Tensor] | None = None

    def error(self, config: Config, truth: Tensor) -> float:
        """The largest over the largest value of the truth; NaN where there is one."""
        made = self.run(config)
        wide = made.float() if isinstance(made, Tensor) else made[0].float() * made[1][:, None]
        return float((wide - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


@dataclass(frozen=True)
class Entry:
    """One key of a table.

    Attributes:
        table: its name in kernels/measured.py.
        now: the blocks in use.
        candidates: others.
        trials: makes them; their inputs take memory.
    """

    table: str
    key: Key
    now: Config
    candidates: tuple[Config, ...]
    trials: Callable[[], list[Trial]]

    @property
    def name(self) -> str:
        parts = ("many" if part == _MANY else str(part) for part in self.key if part is not False)
        return f"{self.table.lower()} {' '.join(parts)}".replace(" True", " gated")


def blocks(config: Config) -> tuple[int, ...]:
    """As the tables hold them."""
    names = ("rows", "columns") if isinstance(config, RowConfig) else ("m", "n", "k")
    values = asdict(config)
    return tuple(values[n] for n in (*names, "warps", "stages") if n in values)


def entries(target: str, sizes: Sizes, device: torch.device) -> Iterator[Entry]:
    """All classes of a target, those first that most of the time goes to.

    Args:
        target: ``sm_90`` and the like.
        device: of the inputs; on ``meta`` they have no storage, to be compiled only.
    """
    make = Maker(device)
    kinds = ["float16", "int8", "fp8", "fp8_blocks", "int4", "int4_float"]
    if target in ("sm_80", "sm_87"):
        kinds = ["float16", "int8", "int4", "int4_float"]
    for rows, kind, gated in product((16, _MANY, 64), kinds, (False, True)):
        if kind != "int4" or rows != _MANY:
            yield product_entry(kind, target, rows, gated, sizes, make)
    yield from attention_entries(target, sizes, make)
    yield from row_entries(target, sizes, make)


class Maker:
    """Random inputs, the same for the same seed; without storage on ``meta``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        meta = device.type == "meta"
        self._generator = None if meta else torch.Generator(device).manual_seed(0)

    def floats(self, *shape: int, scale: float = 1.0) -> Tensor:
        """bfloat16."""
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return (made * scale).to(torch.bfloat16)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """int8 from ``low`` up to below ``high``."""
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.device, dtype=torch.int8
        )

    def scales(self, *shape: int) -> Tensor:
        """float32 around 1/100."""
        made = torch.rand(shape, generator=self._generator, device=self.device)
        return (made + 0.5) * 0.01

    def eights(self, kind: str, *shape: int) -> Tensor:
        """int8 or e4m3."""
        if kind == "int8":
            return self.whole(-127, 128, *shape)
        return self.floats(*shape).to(torch.float8_e4m3fn)


# Products.


def product_entry(
    kind: str, target: str, rows: int, gated: bool, sizes: Sizes, make: Maker
) -> Entry:
    key = (kind, target, rows, gated)
    now = reasoned(kind, target, rows, gated=gated)
    if key in PRODUCTS:
        now = GemmConfig.of(PRODUCTS[key].blocks)
    return Entry(
        "PRODUCTS",
        key,
        now,
        tuple(c for c in gemm_candidates(kind, target, rows, gated) if c != now),
        lambda: product_trials(kind, target, rows, gated, sizes, make),
    )


def gemm_candidates(kind: str, target: str, rows: int, gated: bool) -> list[GemmConfig]:
    """Blocks that fit: shared memory for every stage, and accumulators into registers."""
    two = 2 if kind == "float16" else 1
    ks = {16: (128, 256, 512), 64: (128, 256), _MANY: (64, 128)}[rows]
    options: list[tuple[int, ...]] = {
        16: [(16,), (32, 64, 128), ks, (4, 8), (3, 5)],
        64: [(32, 64), (32, 64, 128), ks, (4, 8), (3, 4)],
        _MANY: [(64, 128, 256), (32, 64, 128, 256), ks, (4, 8), (3, 4)],
    }[rows]
    fixed = {"int4": (64,), "int4_float": (32, 64), "fp8_blocks": (128,)}
    options[2] = fixed.get(kind, tuple(k // two for k in ks))
    # Rows of x as they count beside those of the weight: both halves, of 16 bits each, and there
    # are two sums and a widened block as well.
    halves = {"int4": 2, "int4_float": 4}.get(kind, 1)
    sums_of = 2 if kind == "int4_float" else 1
    found = []
    for m, n, k, warps, stages in product(*options):
        columns = 2 * n if gated else n
        staged = (m * halves + columns) * k * _BYTES[kind] * stages
        widened = 4 * columns * k if kind == "int4_float" else 0
        sums = sums_of * m * columns / (32 * warps)
        most = _ACCUMULATORS.get(target, 64)
        # Of many rows small blocks read everything too often, of few too little is under way.
        small = sums < most / 2 if rows == _MANY else staged < 24 << 10
        if staged + widened <= SHARED_KB[target] << 10 and sums <= most and not small:
            found.append(GemmConfig(m, n, k, warps=warps, stages=stages))
    return found


def product_trials(
    kind: str, target: str, rows: int, gated: bool, sizes: Sizes, make: Maker
) -> list[Trial]:
    """gate and up; or q, k and v together, and down onto the residual. Of both models."""
    shapes = set()
    for hidden, ffn, heads, kv_heads in sizes.models:
        if gated:
            shapes.add((ffn, hidden, False))
        else:
            shapes |= {(heads * sizes.dim, hidden, False), (hidden, ffn, True)}
            shapes.add((2 * kv_heads * sizes.dim, hidden, False))
    return [
        product_trial(kind, target, m, n, k, onto, gated, make)
        for (n, k, onto), m in product(sorted(shapes), sizes.rows[rows])
    ]


def product_trial(
    kind: str, target: str, m: int, n: int, k: int, onto: bool, gated: bool, make: Maker
) -> Trial:
    residual = make.floats(m, n) if onto else None
    rows = 2 * n if gated else n
    call: Callable[..., Tensor]
    if "int4" in kind:
        multiplier = make.whole(1, 19, rows, -(-k // 64)).to(torch.uint8)
        fours, w_scale = make.whole(-7, 8, rows, k), make.scales(rows) / k**0.5
        packed = pack_int4([(fours, multiplier, w_scale)], 64)
        w = fours * multiplier.repeat_interleave(64, 1)[:, :k].to(torch.int8)
    if kind == "float16":
        x, w = make.floats(m, k), make.floats(rows, k, scale=k**-0.5)
        call, wide = partial(linear, x, w), lambda: (x.float(), w.float())
    elif kind == "int4_float":
        x = make.floats(m, k)
        call, wide = (
            partial(linear_int4_float, x, packed),
            lambda: (x.float(), w.float() * w_scale[:, None]),
        )
    else:
        values = "int8" if kind in ("int8", "int4") else "fp8"
        x, x_scale = make.eights(values, m, k), make.scales(m)
        if kind == "int4":
            call = partial(linear_int4, x, x_scale, packed)
        else:
            w, groups = make.eights(values, rows, k), -(-k // 128)
            grouped = kind == "fp8_blocks"
            w_scale = make.scales(groups, rows) if grouped else make.scales(rows) / k**0.5
            call = partial(linear_quantised, x, x_scale, w, w_scale)
        call = partial(call, dtype=torch.bfloat16)

        def wide() -> tuple[Tensor, Tensor]:
            each = w_scale[:, None]
            if w_scale.dim() == 2:
                each = w_scale.T.repeat_interleave(128, 1)[:, :k]
            return x.float() * x_scale[:, None], w.float() * each

    def run(config: Config) -> Tensor:
        assert isinstance(config, GemmConfig)
        own = fitted(config, kind, target, m, n, k, gated=gated, residual=onto)
        return call(residual=residual, gated=gated, config=own)

    def truth() -> Tensor:
        left, right = wide()
        y = left @ right.T
        if gated:
            y = F.silu(y[:, :n]) * y[:, n:]
        return y if residual is None else y + residual.float()

    vendor = None
    if kind == "float16" and not gated:
        vendor = partial(vendor_linear, x, w, residual=residual)
    return Trial(f"{m} x {n} x {k}", run, truth, vendor)


# Attention.


def attention_entries(target: str, sizes: Sizes, make: Maker) -> Iterator[Entry]:
    """By the size of heads and the queries of a segment; 16 bits."""
    whole = [sizes.tokens]
    text = [(heads, kv, sizes.dim) for _, _, heads, kv in sizes.models]
    vision = [(sizes.vision_heads, sizes.vision_heads, dim) for _, dim in sizes.vision]
    found: dict[Key, list[Callable[[], Trial]]] = {}

    def add(heads: int, kv: int, dim: int, lengths: list[int], causal: bool, last: bool) -> None:
        padded = 1 << (dim - 1).bit_length()
        queries = (1 if last else max(lengths)) * heads // kv
        rows = min(128, max(16, 1 << (queries - 1).bit_length()))
        forest = Forest.plain(lengths)
        read = np.cumsum(lengths) - 1 if last else None
        found.setdefault((target, padded, rows), []).append(
            partial(attention_trial, heads, kv, dim, forest, causal, read, make)
        )

    for heads, kv, dim in text:
        group = heads // kv
        add(heads, kv, dim, whole, True, False)
        add(heads, kv, dim, whole, True, True)
        for queries in (32, 64, 128):
            length = max(1, queries // group)
            add(heads, kv, dim, [length] * max(1, sizes.tokens // length), True, False)
    for heads, kv, dim in vision:
        add(heads, kv, dim, whole, False, False)
    for key, makers in found.items():
        now = attention_config(target, torch.bfloat16, key[1], key[2])
        candidates = attention_candidates(target, key[1], key[2])
        yield Entry(
            "ATTENTION", key, now, tuple(c for c in candidates if c != now),
            partial(_call_all, makers),
        )  # fmt: skip


def _call_all(makers: list[Callable[[], Trial]]) -> list[Trial]:
    return [maker() for maker in makers]


def attention_candidates(target: str, padded: int, rows: int) -> list[AttentionConfig]:
    """As for products: queries, and keys and values of every stage, in shared memory; the running
    sum and one block of scores in registers."""
    found = []
    for m, n, warps, stages in product({rows, min(rows, 64)}, (32, 64, 128), (4, 8), (2, 3)):
        shared = (m + 2 * n * stages) * padded * 2
        sums = m * (padded + n) / (32 * warps)
        if shared <= SHARED_KB[target] << 10 and sums <= 128:
            found.append(AttentionConfig(m, n, warps, stages))
    return found


def attention_trial(
    heads: int, kv: int, dim: int, forest: Forest, causal: bool, read: Any, make: Maker
) -> Trial:
    tokens = int(forest.cu_k[-1])
    q = make.floats(tokens if read is None else len(read), heads, dim)
    k, v = make.floats(tokens, kv, dim), make.floats(tokens, kv, dim)
    options = {"causal": causal, "scale": dim**-0.5, "read": read}

    def run(config: Config) -> Tensor:
        assert isinstance(config, AttentionConfig)
        return kernels_attention.attention(q, k, v, forest, config=config, **options)

    name = f"{len(forest.parent)} x {tokens // len(forest.parent)}, {heads}/{kv} heads of {dim}"
    return Trial(
        name + ("" if read is None else ", last token"),
        run,
        lambda: Ops.attention(q.float(), k.float(), v.float(), forest, **options),
    )


# Whole rows.


def row_entries(target: str, sizes: Sizes, make: Maker) -> Iterator[Entry]:
    """By the length of rows: norms, in float and int8, and the rows that no norm quantises."""
    hidden = {m[0] for m in sizes.models} | {v[0] for v in sizes.vision}
    found: dict[int, list[Callable[[], Trial]]] = {}
    for form, columns in (
        *(("norm", c) for c in sorted(hidden)),
        *(("norm int8", m[0]) for m in sizes.models),
        *(("int8", m[1]) for m in sizes.models),
    ):
        block = row_config(target, columns).columns
        for t in (sizes.rows[16][0], sizes.tokens):
            found.setdefault(block, []).append(partial(row_trial, form, t, columns, make))
    for block, makers in sorted(found.items()):
        now = row_config(target, block)
        yield Entry(
            "ROWS", (target, block), now,
            tuple(c for c in row_candidates(block) if c != now),
            partial(_call_all, makers),
        )  # fmt: skip


def row_candidates(block: int) -> list[RowConfig]:
    """Up to 64 values a thread, in registers, and no fewer than 4."""
    return [
        RowConfig(rows, block, warps)
        for rows, warps in product((1, 2, 4, 8), (1, 2, 4, 8, 16))
        if 4 <= rows * block / (32 * warps) <= 64
    ]


def row_trial(form: str, tokens: int, columns: int, make: Maker) -> Trial:
    x, weight = make.floats(tokens, columns), make.floats(columns)

    def run(config: Config) -> Tensor | tuple[Tensor, Tensor]:
        assert isinstance(config, RowConfig)
        if form == "int8":
            return quantise_rows(x, "int8", config=config)
        return rms_norm(x, weight, 1e-6, "int8" if "int8" in form else "float", config=config)

    def truth() -> Tensor:
        wide = x.float()
        if form == "int8":
            return wide
        return F.rms_norm(wide, (columns,), weight.float(), 1e-6)

    return Trial(f"{form} {tokens} x {columns}", run, truth)
