"""The C++ ops against plain float64 arithmetic, on every instruction set of the processor.

Only NumPy and torch are imported, and ``qvlfast._C``: scripts/sanitize.sh runs this file with an
extension of its own, in which AVX-512 and AMX are emulated.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qvlfast import _C

ALL = ("scalar", "avx2", "avx512", "amx")
ISAS = ALL[: ALL.index(_C.best_isa()) + 1]
DTYPES = (torch.float32, torch.bfloat16)
FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16"}

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

# bfloat16 has 8 significant bits: rounding moves a value by 2⁻⁸ of itself at most.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def draw(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def strided(x: Tensor, gap: int = 3) -> Tensor:
    """The same values, rows apart, beginning at an odd place."""
    wide = poisoned(x.shape[0], x.shape[1] + gap, dtype=x.dtype)
    wide[:, 1 : 1 + x.shape[1]] = x
    return wide[:, 1 : 1 + x.shape[1]]


def activated(y: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=1)
        return gate * torch.sigmoid(gate) * up
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if activation == "gelu_erf":
        return torch.nn.functional.gelu(y)
    return torch.nn.functional.silu(y) if activation == "silu" else y


def gemm(
    x: Tensor | None,
    scale: Tensor | None,
    packed: Any,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    isa: str,
) -> Tensor:
    assert x is not None
    out = poisoned(len(x), packed.n // 2 if packed.gated else packed.n, dtype=dtype)
    _C.gemm(x, scale, packed, bias, activation, residual, out, isa)
    return out


def close(
    y: Tensor,
    exact: Tensor,
    size: Tensor | float,
    dtype: torch.dtype,
    rounded: Tensor | float = 0.0,
) -> None:
    """Within the rounding of the result, and of float32 sums of terms that add up to ``size``.

    Args:
        rounded: what terms that are rounded to ``dtype`` themselves add up to.
    """
    error = (y.double() - exact).abs()
    bound = ROUNDING[dtype] * (exact.abs() + rounded) + 4e-6 * size + 1e-37
    assert bool((error <= bound).all()), float((error - bound).max())


@each_isa
@each_dtype
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *((1, 16, 64), (1, 70, 33), (2, 257, 100), (3, 40, 7), (5, 33, 1), (7, 300, 640)),
        *((17, 129, 520), (50, 48, 1100), (101, 15, 96), (0, 16, 32), (13, 60, 6400)),
    ],
)
def test_float_products(
    isa: str, dtype: torch.dtype, m: int, n: int, k: int, rng: np.random.Generator
) -> None:
    x, w = strided(draw(rng, m, k, dtype=dtype)), strided(draw(rng, n, k, dtype=dtype))
    bias, residual = draw(rng, n), strided(draw(rng, m, n, dtype=dtype))
    packed = _C.pack_floats([w[: n // 2], w[n // 2 :]] if n > 20 else [w], FORMATS[dtype])
    y = gemm(x, None, packed, bias=bias, residual=residual, dtype=dtype, isa=isa)
    exact = x.double() @ w.double().T + bias + residual
    size = x.double().abs() @ w.double().abs().T + bias.abs() + residual.abs()
    close(y, exact, size, dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu", "swiglu"])
def test_activations(
    isa: str, dtype: torch.dtype, activation: str, rng: np.random.Generator
) -> None:
    m, n, k = 9, 88, 64
    x, w = draw(rng, m, k, dtype=dtype), draw(rng, n, k, dtype=dtype)
    x[0] = 0
    x[1] *= 30  # far into both tails
    gated = activation == "swiglu"
    parts = [w[: n // 2].contiguous(), w[n // 2 :].contiguous()] if gated else [w]
    packed = _C.pack_floats(parts, FORMATS[dtype], gated)
    y = gemm(x, None, packed, activation=activation, dtype=dtype, isa=isa)
    exact = activated(x.double() @ w.double().T, activation)
    size = x.double().abs() @ w.double().abs().T
    size = size[:, : n // 2] * size[:, n // 2 :] if gated else size
    close(y, exact, size, dtype)


def int8_weight(rng: np.random.Generator, n: int, k: int) -> tuple[Tensor, Tensor]:
    values = torch.from_numpy(rng.integers(-127, 128, (n, k)).astype(np.int8))
    return values, draw(rng, n).abs() + 0.1


def int4_weight(
    rng: np.random.Generator, n: int, k: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.from_numpy(rng.integers(-8, 8, (n, k)).astype(np.int8))
    shape = (n, -(-k // group))
    factors = torch.from_numpy(rng.integers(1, 16, shape).astype(np.uint8))
    return values, factors, draw(rng, n).abs() + 0.1


def pairs_of(values: Tensor) -> Tensor:
    """Two values of 4 bits a byte, the first in the low half."""
    halves = (values + 8).to(torch.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def pack_int4(parts: Sequence[tuple[Tensor, ...]], group: int, gated: bool = False) -> Any:
    return _C.pack_int4([(pairs_of(v), *rest) for v, *rest in parts], group, gated)


def widened(values: Tensor, factors: Tensor, group: int) -> Tensor:
    spread = factors.long().repeat_interleave(group, dim=1)[:, : values.shape[1]]
    return values.long() * spread


@each_isa
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *((1, 16, 64), (1, 70, 36), (2, 257, 100), (3, 40, 8), (7, 300, 640), (50, 48, 1100)),
        *((101, 15, 96), (13, 60, 12500)),
    ],
)
def test_int8_sums_are_exact(isa: str, m: int, n: int, k: int, rng: np.random.Generator) -> None:
    """With scales of one, the result is the integer, rounded once to float32."""
    values, _ = int8_weight(rng, n, k)
    x = torch.from_numpy(rng.integers(-127, 128, (m, k)).astype(np.int8))
    x[0], values[0] = 127, -127
    packed = _C.pack_int8([(values, torch.ones(n))])
    y = gemm(x, torch.ones(m), packed, isa=isa)
    assert torch.equal(y, (x.long() @ values.long().T).float())


@each_isa
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 128), (2, 70, 40), (7, 300, 640), (13, 33, 1100), (50, 15, 96)]
)
def test_int4_sums_are_exact(
    isa: str, group: int, m: int, n: int, k: int, rng: np.random.Generator
) -> None:
    values, factors, _ = int4_weight(rng, n, k, group)
    x = torch.from_numpy(rng.integers(-127, 128, (m, k)).astype(np.int8))
    x[0], values[0], factors[0] = 127, -8, 15
    packed = pack_int4([(values, factors, torch.ones(n))], group)
    y = gemm(x, torch.ones(m), packed, isa=isa)
    assert torch.equal(y, (x.long() @ widened(values, factors, group).T).float())


@each_isa
@each_dtype
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_products_with_everything(
    isa: str, dtype: torch.dtype, form: str, rng: np.random.Generator
) -> None:
    m, n, k = 21, 96, 192
    x = strided(draw(rng, m, k, dtype=dtype))
    x[4] = 0
    if form == "int8":
        parts = [int8_weight(rng, n // 2, k), int8_weight(rng, n // 2, k)]
        wide = torch.cat([v.double() * s.double()[:, None] for v, s in parts])
        packed = _C.pack_int8(parts, True)
    else:
        fours = [int4_weight(rng, n // 2, k, 64) for _ in range(2)]
        wide = torch.cat([widened(v, f, 64).double() * s.double()[:, None] for v, f, s in fours])
        packed = pack_int4(fours, 64, True)
    bias, residual = draw(rng, n), draw(rng, m, n // 2, dtype=dtype)
    y = gemm(
        x, None, packed, bias=bias, activation="swiglu", residual=residual, dtype=dtype, isa=isa
    )
    most = x.float().abs().amax(1).clamp(min=1e-30)
    rows = (x.float() * (torch.full_like(most, 127) / most)[:, None]).round().double() * (
        most / 127
    )[:, None].double()
    exact = activated(rows @ wide.T + bias, "swiglu") + residual
    size = rows.abs() @ wide.abs().T + bias.abs()
    close(y, exact, size[:, : n // 2] * size[:, n // 2 :] + residual.abs(), dtype)


@each_isa
@pytest.mark.parametrize("form", ["f32", "bf16", "int8", "int4"])
def test_rows_do_not_depend_on_each_other(isa: str, form: str, rng: np.random.Generator) -> None:
    """The same bits alone and among others, and with any number of threads."""
    n, k = 160, 1600
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    x = draw(rng, 61, k, dtype=dtype)
    if form in ("f32", "bf16"):
        packed = _C.pack_floats([draw(rng, n, k, dtype=dtype)], form)
    elif form == "int8":
        packed = _C.pack_int8([int8_weight(rng, n, k)])
    else:
        packed = pack_int4([int4_weight(rng, n, k, 64)], 64)
    together = gemm(x, None, packed, isa=isa)
    threads = _C.num_threads()
    try:
        for count in (1, 2, 3, 4, 5, 7, 8, 9, 13, 24, 48):
            _C.set_num_threads(1 + count % 3)
            part = gemm(x[:count], None, packed, isa=isa)
            assert torch.equal(part, together[:count]), count
    finally:
        _C.set_num_threads(threads)


@each_isa
@pytest.mark.parametrize("form", ["f32", "bf16", "int8", "int4"])
def test_a_weight_comes_back(isa: str, form: str, rng: np.random.Generator) -> None:
    n, k = 35, 72
    out = poisoned(n, k)
    if form in ("f32", "bf16"):
        w = draw(rng, n, k).to(torch.bfloat16 if form == "bf16" else torch.float32)
        packed, exact = _C.pack_floats([w], form), w.float()
    elif form == "int8":
        values, scale = int8_weight(rng, n, k)
        packed, exact = _C.pack_int8([(values, scale)]), values.float() * scale[:, None]
    else:
        values, factors, scale = int4_weight(rng, n, k, 32)
        packed = pack_int4([(values, factors, scale)], 32)
        exact = widened(values, factors, 32).float() * scale[:, None]
    _C.unpack(packed, out)
    assert torch.equal(out, exact)
    assert (packed.n, packed.k, packed.format, packed.gated) == (n, k, form, False)


def test_halves_are_packed_exactly(rng: np.random.Generator) -> None:
    """Every float16 there is, denormals and infinities included."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    w = w.view(256, 256)
    out = poisoned(256, 256)
    _C.unpack(_C.pack_floats([w], "f32"), out)
    assert torch.equal(out.nan_to_num(nan=12345), w.float().nan_to_num(nan=12345))


@each_isa
@each_dtype
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e-38])
def test_rows_are_rounded_to_int8(
    isa: str, dtype: torch.dtype, scale: float, rng: np.random.Generator
) -> None:
    x = strided((draw(rng, 12, 203) * scale).to(dtype))
    x[3] = 0
    x[5, 7], x[6, 202], x[7, 0] = torch.nan, torch.inf, -torch.inf
    values = torch.full(x.shape, 99, dtype=torch.int8)
    scales = poisoned(12)
    _C.quantise_rows(x, values, scales, isa)
    wide = x.float()
    most = wide.abs().amax(1).clamp(min=1e-30)
    good = [0, 1, 2, 3, 4, 8, 9, 10, 11]
    exact = (wide * (torch.full_like(most, 127) / most)[:, None]).round().clamp(-127, 127)
    assert torch.equal(values[good], exact[good].to(torch.int8))
    assert torch.equal(scales[good], (most / 127)[good])
    assert scales[[5, 6, 7]].isnan().all() and not values[[3, 5, 6, 7]].any()


@each_isa
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("group", "k"), [(32, 32), (64, 100), (128, 1000), (64, 2)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_weights_are_rounded_to_two_levels(
    isa: str, dtype: torch.dtype, group: int, k: int, size: float, rng: np.random.Generator
) -> None:
    x = strided((draw(rng, 9, k) * size).to(dtype), 4)
    x[2], x[4] = 0, x[4] * torch.linspace(0.01, 1, k)
    x[7, k - 1] = torch.nan
    groups = -(-k // group)
    pairs = torch.full((9, k // 2), 0xEE, dtype=torch.uint8)
    factors, scale = torch.full((9, groups), 99, dtype=torch.uint8), poisoned(9)
    _C.quantise_int4(x, group, pairs, factors, scale, isa)
    assert scale.isnan().tolist() == [i == 7 for i in range(9)]
    good = [0, 1, 2, 3, 4, 5, 6, 8]
    x, pairs, factors, scale = x[good].float(), pairs[good], factors[good], scale[good]
    unit = x.abs().amax(1).clamp(min=1e-30) / 126
    assert bool(((scale >= unit) & (scale <= unit * (1 + 2.0**-15))).all())
    assert not (scale.view(torch.int32) & 255).any()
    values = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1).to(torch.int8) - 8
    assert int(values.min()) >= -7 and int(factors.min()) >= 1 and int(factors.max()) <= 18

    def error(factor: Tensor, rounded: Tensor) -> Tensor:
        return (rounded * factor[:, :, None] - scaled).square().sum(2)

    padding = (0, groups * group - k)
    scaled = torch.nn.functional.pad((x / scale[:, None]).double(), padding)
    scaled = scaled.view(len(x), groups, group)
    most = (scaled.abs().amax(2) / 7).ceil().clamp(1, 18)
    best = torch.full_like(most, torch.inf)
    for below in range(4):
        factor = (most - below).clamp(min=1)
        best = best.minimum(error(factor, (scaled / factor[:, :, None]).round().clamp(-7, 7)))
    got = torch.nn.functional.pad(values, padding).view(len(x), groups, group)
    # Errors are summed in float32 there, so that the second best of two alike may be taken.
    assert bool((error(factors.double(), got.double()) <= best * 1.0001 + 1e-9).all())


@each_isa
@each_dtype
def test_pixels_are_multiplied_as_they_are(
    isa: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    pixels = torch.from_numpy(rng.integers(0, 256, (13, 96)).astype(np.uint8))
    w, positions = draw(rng, 40, 96, dtype=dtype), draw(rng, 13, 40)
    packed = _C.pack_floats([w], FORMATS[dtype])
    y = gemm(pixels, None, packed, residual=positions, dtype=dtype, isa=isa)
    wide = pixels.double()
    size = wide @ w.double().abs().T + positions.abs()
    close(y, wide @ w.double().T + positions, size, dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("columns", [7, 64, 200])
def test_pooling_and_scores(
    isa: str, dtype: torch.dtype, columns: int, rng: np.random.Generator
) -> None:
    x, weight = strided(draw(rng, 40, columns, dtype=dtype)), draw(rng, columns, dtype=dtype)
    read = torch.tensor([3, 3, 39, 0])
    wide = x.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for rows in (None, read):
        exact = normed if rows is None else normed[rows]
        out = poisoned(len(exact), columns)
        _C.pool(x, rows, weight, 1e-6, False, out, isa)
        close(out, exact, exact.abs(), torch.float32)
        cut = poisoned(len(exact), 5)
        _C.pool(x, rows, weight, 1e-6, True, cut, isa)
        unit = torch.nn.functional.normalize(exact[:, :5], dim=1)
        close(cut, unit, 1.0, torch.float32)
        answers, scores = draw(rng, 2, columns), poisoned(len(exact))
        _C.score(x, rows, weight, 1e-6, answers, scores, isa)
        margin = exact @ (answers[0] - answers[1]).double()
        close(scores, torch.sigmoid(margin), columns**0.5, torch.float32)
    with pytest.raises(ValueError, match="read has row 40, x has 40"):
        _C.pool(x, torch.tensor([40]), weight, 1e-6, False, poisoned(1, columns), isa)


@each_isa
@each_dtype
@pytest.mark.parametrize("columns", [1, 7, 64, 200, 2048])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norms(
    isa: str, dtype: torch.dtype, columns: int, scale: float, rng: np.random.Generator
) -> None:
    x = strided((draw(rng, 33, columns) * scale + 0.3 * scale).to(dtype))
    x[2] = 0
    weight, bias = draw(rng, columns, dtype=dtype), draw(rng, columns, dtype=dtype)
    out = poisoned(33, columns, dtype=dtype)
    _C.rms_norm(x, weight, 1e-6, out, isa)
    wide = x.double()
    exact = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(out, exact, exact.abs(), dtype)
    values, scales = torch.full(x.shape, 99, dtype=torch.int8), poisoned(33)
    _C.rms_norm_rows(x, weight, 1e-6, values, scales, isa)
    again, again_scale = torch.empty_like(values), poisoned(33)
    _C.quantise_rows(out, again, again_scale, isa)
    assert torch.equal(values, again) and torch.equal(scales, again_scale)

    out = poisoned(33, columns, dtype=dtype)
    _C.layer_norm(x, weight, bias, 1e-6, out, isa)
    centred = wide - wide.mean(1, keepdim=True)
    factor = 1 / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    exact = centred * factor * weight.double() + bias.double()
    # The mean is taken off in float32, of values `scale` large.
    size = wide.abs().amax(1, keepdim=True) * factor * weight.double().abs() + bias.double().abs()
    close(out, exact, size, dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("dim", [2, 8, 64, 72, 128])
def test_ropes(isa: str, dtype: torch.dtype, dim: int, rng: np.random.Generator) -> None:
    tokens, heads = 13, 3
    fused = draw(rng, tokens, heads + 2, dim, dtype=dtype)
    x = fused[:, 1 : heads + 1]
    angle = draw(rng, tokens, dim // 2) * 10
    cos, sin, weight = angle.cos(), angle.sin(), draw(rng, dim, dtype=dtype)

    def rotate(wide: Tensor) -> Tensor:
        first, second = wide.chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    out = poisoned(tokens, heads, dim, dtype=dtype)
    _C.rope(x, cos, sin, out, isa)
    wide = x.double()
    close(out, rotate(wide), wide.abs().amax(-1, keepdim=True), dtype)
    out = poisoned(tokens, heads, dim, dtype=dtype)
    _C.norm_rope(x, weight, cos, sin, 1e-6, out, isa)
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(out, rotate(wide), wide.abs().amax(-1, keepdim=True), dtype)
    # In place, and nothing beside it.
    beside = fused.clone()
    _C.norm_rope(x, weight, cos, sin, 1e-6, x, isa)
    assert torch.equal(x, out)
    beside[:, 1 : heads + 1] = out
    assert torch.equal(fused, beside)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[tuple[int, int, int]],
    causal: bool,
    scale: float,
) -> Tensor:
    """float64; ``lengths`` are (keys, queries, parent) of each segment."""
    starts = np.cumsum([0, *[keys for keys, _, _ in lengths]])
    chains: list[list[int]] = []
    out, row = [], 0
    shared = q.shape[1] // k.shape[1]
    for segment, (keys, queries, parent) in enumerate(lengths):
        before = chains[parent] if parent >= 0 else []
        chains.append([*before, *range(starts[segment], starts[segment] + keys)])
        chain = chains[-1]
        own = q[row : row + queries].double().transpose(0, 1)  # [H, queries, D]
        seen_k, seen_v = (
            x[chain].double().transpose(0, 1).repeat_interleave(shared, 0) for x in (k, v)
        )
        scores = scale * own @ seen_k.transpose(1, 2)
        if causal:
            last = torch.arange(len(chain) - queries, len(chain))
            scores[:, torch.arange(len(chain)) > last[:, None]] = -torch.inf
        out.append((torch.softmax(scores, -1) @ seen_v).transpose(0, 1))
        row += queries
    return torch.cat(out)


def edges(lengths: Sequence[tuple[int, int, int]]) -> tuple[Any, Any, Any]:
    cu_q = np.cumsum([0, *[queries for _, queries, _ in lengths]]).astype(np.int32)
    cu_k = np.cumsum([0, *[keys for keys, _, _ in lengths]]).astype(np.int32)
    return cu_q, cu_k, np.array([parent for _, _, parent in lengths], np.int32)


FORESTS = {
    "plain": [(5, 5, -1), (1, 1, -1), (33, 33, -1)],
    "long": [(530, 530, -1)],
    "depth 3": [(19, 19, -1), (30, 30, 0), (7, 7, 0), (40, 40, 1), (1, 1, 3), (3, 3, 2)],
    "resident": [(21, 0, -1), (9, 9, 0), (16, 4, 0), (5, 5, -1)],
    "empty": [(0, 0, -1), (17, 17, 0), (3, 3, -1)],
    "across blocks": [(250, 0, -1), (10, 10, 0), (300, 12, 1)],
}


@each_isa
@each_dtype
@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(2, 2, 64), (4, 1, 72), (6, 2, 128)])
def test_attention(
    isa: str,
    dtype: torch.dtype,
    name: str,
    causal: bool,
    heads: int,
    key_heads: int,
    dim: int,
    rng: np.random.Generator,
) -> None:
    lengths = FORESTS[name]
    if name == "long" and (dim != 64 or isa == "scalar"):
        lengths = [(270, 270, -1)]
    cu_q, cu_k, parent = edges(lengths)
    queries, keys = int(cu_q[-1]), int(cu_k[-1])
    q = draw(rng, queries, heads, dim, dtype=dtype)
    fused = draw(rng, keys, 2 * key_heads, dim, dtype=dtype)
    k, v = fused[:, :key_heads], fused[:, key_heads:]
    scale = dim**-0.5
    out = poisoned(queries, heads, dim, dtype=dtype)
    _C.attention(q, k, v, cu_q, cu_k, parent, causal, scale, None, out, isa)
    exact = exact_attention(q, k, v, lengths, causal, scale)
    # A weight errs by 2⁻²² of itself, and a score of 3 by as much again; products of bfloat16 take
    # it rounded to bfloat16.
    weighed = exact_attention(q, k, v.abs(), lengths, causal, scale)
    close(out, exact, v.double().abs().max(), dtype, rounded=weighed)

    read = np.sort(rng.choice(queries, max(1, queries // 3), replace=False)).astype(np.int64)
    some = poisoned(len(read), heads, dim, dtype=dtype)
    _C.attention(q[read], k, v, cu_q, cu_k, parent, causal, scale, read, some, isa)
    assert torch.equal(some, out[read])


@each_isa
@each_dtype
def test_attention_does_not_depend_on_how_a_sequence_is_cut(
    isa: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Whole, in pieces, and beside others: the same bits."""
    length, heads, dim = 600, 2, 64
    q, k, v = (draw(rng, length, heads, dim, dtype=dtype) for _ in range(3))
    whole = poisoned(length, heads, dim, dtype=dtype)
    _C.attention(q, k, v, *edges([(length, length, -1)]), True, 0.125, None, whole, isa)
    cut = poisoned(length, heads, dim, dtype=dtype)
    for lengths in ((37, 200, 363), (256, 1, 343), (255, 258, 87), (511, 89), (1, 600 - 1)):
        parts = [(n, n, i - 1) for i, n in enumerate(lengths)]
        _C.attention(q, k, v, *edges(parts), True, 0.125, None, cut, isa)
        assert torch.equal(cut, whole), lengths
    more = [torch.cat((draw(rng, 11, heads, dim, dtype=dtype), x)) for x in (q, k, v)]
    beside = poisoned(length + 11, heads, dim, dtype=dtype)
    _C.attention(
        *more, *edges([(11, 11, -1), (length, length, -1)]), True, 0.125, None, beside, isa
    )
    assert torch.equal(beside[11:], whole)


@each_isa
def test_many_segments_in_one_call(isa: str, rng: np.random.Generator) -> None:
    """More than are worked on together, some of which nobody asks: the same bits as alone."""
    prefix = (250, 0, -1)  # its last block is packed anew for each that follows
    follows = [(300 if i % 3 else 4, 2 if i % 5 else 0, 0) for i in range(45)]
    lengths = [prefix, *follows, (9, 9, 3), (600, 3, -1)]
    keys = sum(n for n, _, _ in lengths)
    queries = sum(n for _, n, _ in lengths)
    q = draw(rng, queries, 2, 64, dtype=torch.bfloat16)
    k, v = (draw(rng, keys, 1, 64, dtype=torch.bfloat16) for _ in range(2))
    out = poisoned(queries, 2, 64, dtype=torch.bfloat16)
    _C.attention(q, k, v, *edges(lengths), True, 0.125, None, out, isa)
    cu_q, cu_k, parents = edges(lengths)
    for segment, (own, asked, parent) in enumerate(lengths):
        if asked:
            chain = [segment]
            while parents[chain[0]] >= 0:
                chain.insert(0, parents[chain[0]])
            places = np.concatenate([np.arange(cu_k[s], cu_k[s + 1]) for s in chain])
            before = len(places) - own
            alone = [(before, 0, -1), (own, asked, 0)] if parent >= 0 else [(own, asked, -1)]
            rows = slice(cu_q[segment], cu_q[segment + 1])
            single = poisoned(asked, 2, 64, dtype=torch.bfloat16)
            _C.attention(
                q[rows], k[places], v[places], *edges(alone), True, 0.125, None, single, isa
            )
            assert torch.equal(single, out[rows]), segment


@each_isa
@pytest.mark.parametrize("size", [1e-4, 30.0, 1e4])
def test_attention_at_extreme_scores(isa: str, size: float, rng: np.random.Generator) -> None:
    length, heads, dim = 40, 1, 8
    q, k, v = (draw(rng, length, heads, dim) for _ in range(3))
    q *= size
    out = poisoned(length, heads, dim)
    _C.attention(q, k, v, *edges([(length, length, -1)]), True, 1.0, None, out, isa)
    exact = exact_attention(q, k, v, [(length, length, -1)], True, 1.0)
    # Scores err by 2⁻²² of the terms they are sums of.
    close(out, exact, v.double().abs().max() * max(1.0, 4 * size), torch.float32)


@each_isa
@each_dtype
def test_nan_stays_with_its_own(isa: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    q, k, v = (draw(rng, 30, 2, 64, dtype=dtype) for _ in range(3))
    k[4], v[5] = torch.nan, torch.inf
    out = poisoned(30, 2, 64, dtype=dtype)
    _C.attention(q, k, v, *edges([(10, 10, -1), (20, 20, -1)]), True, 0.125, None, out, isa)
    assert out[5:10].isnan().any() and out[10:].isfinite().all()
    x = draw(rng, 9, 64)
    x[3, 5] = torch.nan
    y = gemm(x, None, _C.pack_int8([int8_weight(rng, 20, 64)]), isa=isa)
    assert y.isnan().all(1).tolist() == [i == 3 for i in range(9)]


def test_operands_that_do_not_fit_are_named(rng: np.random.Generator) -> None:
    packed = _C.pack_floats([draw(rng, 16, 32)], "f32")
    x, out = draw(rng, 4, 32), poisoned(4, 16)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x[:, :31], None, packed, None, "none", None, out), r"x is float32 \[4, 31\], expected"),
        ((x.bfloat16(), None, packed, None, "none", None, out), r"x is bfloat16 \[4, 32\]"),
        ((x, None, packed, draw(rng, 15), "none", None, out), r"bias is float32 \[15\]"),
        ((x, None, packed, None, "relu", None, out), "activation 'relu' is unknown"),
        ((x, None, packed, None, "swiglu", None, out), "swiglu takes a gated weight"),
        ((x, torch.ones(4), packed, None, "none", None, out), "x_scale belongs to int8 rows"),
        ((x, None, packed, None, "none", out[:3], out), r"residual is float32 \[3, 16\]"),
        ((x, None, packed, None, "none", None, out[:, :15]), r"out is float32 \[4, 15\]"),
        ((x.T.contiguous().T, None, packed, None, "none", None, out), "gaps of 4"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            _C.gemm(*arguments)
    with pytest.raises(ValueError, match="isa 'sse9' is unknown"):
        _C.gemm(x, None, packed, None, "none", None, out, "sse9")
    with pytest.raises(ValueError, match="two parts of equal shape"):
        _C.pack_floats([draw(rng, 16, 32)], "f32", True)
    with pytest.raises(ValueError, match="group is 48"):
        pack_int4([int4_weight(rng, 16, 96, 32)], 48)
    with pytest.raises(ValueError, match="expected int8"):
        _C.pack_int8([(draw(rng, 16, 32), torch.ones(16))])
    with pytest.raises(TypeError, match="dtype that no kernel takes"):
        _C.pack_floats([draw(rng, 16, 32).double()], "f32")
    q = draw(rng, 4, 3, 8)
    edge = edges([(4, 4, -1)])
    with pytest.raises(ValueError, match="multiple of key heads"):
        _C.attention(q, q[:, :2], q[:, :2], *edge, True, 1.0, None, poisoned(4, 3, 8))
    with pytest.raises(ValueError, match="read must rise"):
        read = np.array([2, 1], np.int64)
        _C.attention(q[:2], q, q, *edge, True, 1.0, read, poisoned(2, 3, 8))
    with pytest.raises(ValueError, match="earlier segment"):
        bad = (np.array([0, 4], np.int32), np.array([0, 4], np.int32), np.array([0], np.int32))
        _C.attention(q, q, q, *bad, True, 1.0, None, poisoned(4, 3, 8))


def test_more_than_the_processor_has_is_refused(rng: np.random.Generator) -> None:
    packed = _C.pack_floats([draw(rng, 16, 32)], "f32")
    if ISAS == ALL:
        assert gemm(draw(rng, 4, 32), None, packed, isa="amx").isfinite().all()
        return
    with pytest.raises(ValueError, match=f"no amx; the best here is {ISAS[-1]}"):
        _C.gemm(draw(rng, 4, 32), None, packed, None, "none", None, poisoned(4, 16), "amx")


def test_exponentials_through_silu() -> None:
    """Every magnitude that exp has in float32."""
    x = torch.from_numpy(np.linspace(-87, 87, 20001).astype(np.float32))[:, None]
    packed = _C.pack_floats([torch.ones(1, 1)], "f32")
    for isa in ISAS:
        y = gemm(x, None, packed, activation="silu", isa=isa)
        exact = x.double() * torch.sigmoid(x.double())
        # exp(x) errs by 2⁻²⁴ of x · log2(e) beside its own few bits.
        assert float(((y - exact).abs() / exact.abs().clamp(min=1e-36)).max()) < 1e-5
