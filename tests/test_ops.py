"""Every op but attention against a float64 computation written from its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qvlfast.config import PixelConfig
from qvlfast.ops import Ops
from qvlfast.ops.activation import gelu_erf, gelu_tanh, swiglu
from qvlfast.ops.patch_embed import resample_positions
from qvlfast.weights import fold_normalisation

# Rounding of the result to the dtype, relative to values of size one.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(ROUNDING)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def check(got, expected, dtype=torch.float32):
    assert got.dtype == dtype
    tolerance = ROUNDING[dtype]
    np.testing.assert_allclose(got.double().numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 64, 130), (33, 4304, 17), (2, 72, 9000)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, shape, bias) -> None:
    m, k, n = shape
    x, w = draw(m, k, dtype=dtype), draw(n, k, seed=1, dtype=dtype) / math.sqrt(k)
    b = draw(n, seed=2, dtype=dtype) if bias else None
    expected = x.double().numpy() @ w.double().numpy().T
    if b is not None:
        expected = expected + b.double().numpy()
    check(Ops.linear(x, Ops.prepare([w], b)), expected, dtype)


def test_embed() -> None:
    table = draw(10, 4)
    assert torch.equal(Ops.embed(torch.tensor([3, 3, 9]), table), table[[3, 3, 9]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_norms(dtype, scale) -> None:
    x = (draw(5, 3, 80) * scale).to(dtype)
    weight, bias = draw(80, seed=1, dtype=dtype), draw(80, seed=2, dtype=dtype)
    wide, w, b = (t.double().numpy() for t in (x, weight, bias))
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * w
    check(Ops.rms_norm(x, weight, 1e-6), rms, dtype)
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w + b
    # The mean of float32 rows is itself rounded.
    got = Ops.layer_norm(x, weight, bias, 1e-6)
    np.testing.assert_allclose(
        got.double().numpy(), layer, atol=4 * ROUNDING[dtype], rtol=ROUNDING[dtype]
    )


def test_activations() -> None:
    x, y = draw(6, 50) * 3, draw(6, 50, seed=1)
    wide = x.double().numpy()
    erf = np.vectorize(math.erf)
    check(gelu_erf(x), wide / 2 * (1 + erf(wide / math.sqrt(2))))
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    check(gelu_tanh(x), wide / 2 * (1 + np.tanh(inner)))
    check(swiglu(x, y), wide / (1 + np.exp(-wide)) * y.double().numpy())


def rotate(x, angle):
    """Complex rotation of value pairs (i, i + D/2)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate((turned.real, turned.imag), axis=-1)


@pytest.mark.parametrize("section", [(24, 20, 20), (26, 19, 19), (10, 3, 3)])
def test_mrope(section) -> None:
    dim = 2 * sum(section)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 500, (3, 11))
    angle = np.zeros((11, dim // 2))
    for i in range(dim // 2):
        axis = 0
        if i % 3 == 1 and i < 3 * section[1]:
            axis = 1
        elif i % 3 == 2 and i < 3 * section[2]:
            axis = 2
        angle[:, i] = positions[axis] * 5e6 ** (-2 * i / dim)
    cos, sin = Ops.mrope_tables(torch.from_numpy(positions), dim, 5e6, section)
    # float32 angles of up to 500 radians are off by up to 500 · 2⁻²⁴.
    np.testing.assert_allclose(cos.numpy(), np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(sin.numpy(), np.sin(angle), atol=1e-4)
    x, weight = draw(11, 3, dim), draw(dim, seed=1)
    wide = x.double().numpy()
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight.double().numpy()
    Ops.norm_rope(x, weight, cos, sin, 1e-6)
    np.testing.assert_allclose(x.numpy(), rotate(normed, angle), atol=5e-4)


@pytest.mark.parametrize("dim", [64, 72])
def test_vision_rope(dim) -> None:
    positions = np.random.default_rng(0).integers(0, 60, (2, 9))
    frequency = 1e4 ** (-2 * np.arange(dim // 4) / (dim / 2))
    angle = np.concatenate([p[:, None] * frequency for p in positions], axis=1)
    cos, sin = Ops.vision_rope_tables(torch.from_numpy(positions), dim, 1e4)
    x = draw(9, 2, dim)
    expected = rotate(x.double().numpy(), angle)
    Ops.rope(x, cos, sin)
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("still", [True, False])
def test_patch_embed_equals_normalise_then_project(still) -> None:
    rng = np.random.default_rng(0)
    weight, bias = draw(24, 3, 2, 4, 4) / 10, draw(24, seed=1)
    pixels = PixelConfig(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    frames = 1 if still else 2
    patches = rng.integers(0, 256, (12, 3, frames, 4, 4), dtype=np.uint8)
    mean, std = (np.array(v).reshape(1, 3, 1, 1, 1) for v in (pixels.mean, pixels.std))
    normalised = np.broadcast_to((patches / 255 - mean) / std, (12, 3, 2, 4, 4)).reshape(12, -1)
    table, grids = draw(9, 24, seed=2), [(1, 2, 4), (1, 2, 2)]
    positions = resample_positions(table, grids, 2)
    expected = normalised @ weight.double().numpy().reshape(24, -1).T
    expected += bias.double().numpy() + positions.double().numpy()
    folded, shift = fold_normalisation(weight, bias, pixels, torch.float32, still=still)
    assert folded.shape == (24, 3 * frames * 16)
    layer = Ops.prepare([folded], shift)
    got = Ops.patch_embed(torch.from_numpy(patches.reshape(12, -1)), layer, table, grids, 2)
    # Raw pixels reach 255, so the sum cancels from a few hundred down to one.
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)


def test_folding_in_bfloat16_rounds_as_little_as_the_reference() -> None:
    rng = np.random.default_rng(0)
    weight = (draw(64, 3, 2, 16, 16) / 40).bfloat16()
    bias = draw(64, seed=1)
    pixels = PixelConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    patches = rng.integers(0, 256, (200, 768), dtype=np.uint8)
    normalised = patches.reshape(200, 3, 1, 256).repeat(2, axis=2).reshape(200, -1) / 127.5 - 1
    flat = weight.double().numpy().reshape(64, -1).T

    def error(got):
        truth = normalised @ flat + bias.double().numpy()
        return np.sqrt(np.mean((got - truth) ** 2))

    folded, shift = fold_normalisation(weight, bias, pixels, torch.bfloat16, still=True)
    product = patches.astype(np.float64) @ folded.double().numpy().T
    ours = error(product + shift.double().numpy())
    exact_bias = bias.double().numpy() - flat.sum(axis=0)
    careless = error(product + exact_bias)
    reference_pixels = torch.from_numpy(normalised).bfloat16().double().numpy()
    reference = error(reference_pixels @ flat + bias.double().numpy())
    # One rounds the summed weights, the other the pixels: errors of one size, on any data.
    assert ours < 1.4 * reference
    assert careless > 1.5 * ours


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 4, 6), (1, 10, 2), (2, 48, 48), (1, 70, 90)])
def test_positions_are_resampled_with_aligned_corners(grid) -> None:
    frames, height, width = grid
    side = 10
    table = draw(side * side, 3)
    got = resample_positions(table, [grid], 2).numpy()
    learned = table.double().numpy().reshape(side, side, 3)
    rows, columns = np.linspace(0, side - 1, height), np.linspace(0, side - 1, width)
    n = 0
    for _ in range(frames):
        for by in range(height // 2):
            for bx in range(width // 2):
                for y in (2 * by, 2 * by + 1):
                    for x in (2 * bx, 2 * bx + 1):
                        top, left = min(int(rows[y]), side - 2), min(int(columns[x]), side - 2)
                        dy, dx = rows[y] - top, columns[x] - left
                        square = learned[top : top + 2, left : left + 2]
                        value = np.einsum("yxc,y,x->c", square, [1 - dy, dy], [1 - dx, dx])
                        np.testing.assert_allclose(got[n], value, atol=2e-5)
                        n += 1
    assert n == len(got)


def test_no_pictures_no_positions() -> None:
    assert resample_positions(draw(4, 3), [], 2).shape == (0, 3)


def test_pool_and_score() -> None:
    x, weight, rows = draw(4, 32, dtype=torch.bfloat16), draw(32, seed=1), draw(2, 32, seed=2)
    wide = x.double().numpy()
    pooled = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight.double().numpy()
    got = Ops.pool(x, weight, 1e-6)
    check(got, pooled)
    logit = pooled @ (rows[0] - rows[1]).double().numpy()
    check(Ops.score(x, weight, 1e-6, rows), 1 / (1 + np.exp(-logit)))
    read = torch.tensor([3, 0, 3])
    check(Ops.pool(x, weight, 1e-6, read=read), pooled[read])
    check(Ops.score(x, weight, 1e-6, rows, read=read), 1 / (1 + np.exp(-logit[read])))
    short = pooled[:, :7]
    unit = short / np.linalg.norm(short, axis=1, keepdims=True)
    check(Ops.pool(x, weight, 1e-6, size=7), unit)


def test_add_rows() -> None:
    x, rows = draw(5, 4), draw(2, 4, seed=1)
    expected = x.clone()
    expected[3] += rows[0]
    expected[1] += rows[1]
    Ops.add_rows(x, torch.tensor([3, 1]), rows)
    assert torch.equal(x, expected)
