"""Matryoshka cuts, vector types and similarity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qvlfast.runtime import Encoded
from qvlfast.vectors import convert, cut, similarity

vectors = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)

bit_vectors = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 5).map(lambda n: 8 * n)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@given(vectors, st.integers(1, 40))
def test_cut(x, dimensions) -> None:
    got = cut(x, dimensions, normalize=True)
    assert got.shape == (len(x), min(dimensions, x.shape[1]))
    length = np.linalg.norm(got.astype(np.float64), axis=1)
    zero = np.linalg.norm(x[:, :dimensions].astype(np.float64), axis=1) < 1e-12
    np.testing.assert_allclose(length[~zero], 1, atol=1e-5)
    raw = cut(x, dimensions, normalize=False)
    assert (raw == x[:, :dimensions]).all() and raw.flags.c_contiguous


@given(vectors)
def test_int8_is_within_half_a_step(x) -> None:
    stored, scales = convert(x, "int8")
    assert stored.dtype == np.int8 and scales.dtype == np.float32
    error = np.abs(stored * scales[:, None].astype(np.float64) - x)
    assert (error <= scales[:, None] * 0.5001).all()
    assert (np.abs(stored).max(axis=1) == np.where(np.abs(x).max(axis=1) > 0, 127, 0)).all()
    shifted, _ = convert(x, "uint8")
    assert shifted.dtype == np.uint8
    assert (shifted.astype(int) - 128 == stored).all()


def test_int8_rounds_half_to_even() -> None:
    stored, _ = convert(np.array([[127, 0.5, 1.5, 2.5, -0.5]], dtype=np.float32), "int8")
    assert stored.tolist() == [[127, 0, 2, 2, 0]]


@given(bit_vectors)
def test_bits(x) -> None:
    packed, scales = convert(x, "ubinary")
    assert packed.dtype == np.uint8 and scales is None
    assert (packed == np.packbits(x > 0, axis=1)).all()
    signed, _ = convert(x, "binary")
    assert signed.dtype == np.int8
    assert (signed.astype(int) + 128 == packed).all()


@pytest.mark.parametrize("output", ["int8", "uint8", "binary", "ubinary"])
def test_failed_rows_are_zero_in_integer_types(output) -> None:
    x = np.array([[1, -2, 3, 4] * 2, [np.nan] * 8], dtype=np.float32)
    stored, _ = convert(x, output)
    assert stored[1].tolist() == [0] * stored.shape[1]
    assert stored[0].any()


@pytest.mark.parametrize("output", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_similarity_of_every_type(output) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    y = rng.standard_normal((4, 256)).astype(np.float32)
    stored = [convert(v, output)[0] for v in (x, y)]
    got = similarity(*stored, output)
    assert got.shape == (6, 4) and got.dtype == np.float32
    wide = [np.sign(v) if "binary" in output else v for v in (x, y)]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in wide]
    # int8 steps are 1/127 of the largest value: a cosine moves by under a hundredth.
    np.testing.assert_allclose(got, unit[0] @ unit[1].T, atol=1e-5 if "b" in output else 1e-2)
    np.testing.assert_allclose(np.diag(similarity(stored[0], stored[0], output)), 1, atol=1e-5)


def test_similarity_names_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"8 and 4 values.*same `dimensions`"):
        similarity(np.zeros((1, 8)), np.zeros((2, 4)))


@pytest.mark.parametrize("output", ["binary", "ubinary"])
@pytest.mark.parametrize("dimensions", [4, 12, 33, 100])
def test_bits_fill_their_bytes(output, dimensions) -> None:
    with pytest.raises(ValueError, match=rf"{dimensions} dimensions.*multiple of 8"):
        convert(np.ones((2, dimensions), dtype=np.float32), output)


@pytest.mark.parametrize("output", ["int8", "uint8", "binary", "ubinary"])
def test_integers_are_not_taken_for_floats(output) -> None:
    stored = convert(np.random.default_rng(0).standard_normal((3, 64), np.float32), output)[0]
    for value in (stored, torch.from_numpy(stored), stored.tolist()):
        with pytest.raises(ValueError, match=r"expected floats: pass output="):
            similarity(value, value)


@pytest.mark.parametrize("output", ["int8", "uint8", "binary", "ubinary"])
def test_other_types_are_not_taken_for_integers(output) -> None:
    floats = np.ones((2, 16), dtype=np.float32)
    other = np.int8 if output in ("uint8", "ubinary") else np.uint8
    wrong = (floats, floats.astype(other), floats.astype(bool), [[300] * 16], [[-129] * 16])
    for value in wrong:
        with pytest.raises(ValueError, match=r"pass output="):
            similarity(value, value, output)


def test_similarity_of_unknown_output_and_of_nothing() -> None:
    unit = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="output is 'foo': use one of float32"):
        similarity(unit, unit, "foo")  # type: ignore[arg-type]
    for nothing in ([], [[]], np.zeros((2, 0))):
        with pytest.raises(ValueError, match=r"a has the shape .*expected \[N, D\]"):
            similarity(nothing, nothing)
    with pytest.raises(ValueError, match=r"b has the shape \[1, 2, 2\]"):
        similarity(unit, unit[None])
    assert similarity(np.zeros((0, 2)), unit).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_similarity_takes_tensors(dtype) -> None:
    x = torch.tensor([[3.0, 4.0], [-4.0, 3.0]], dtype=dtype, requires_grad=True)
    for value in (x, list(x), Encoded(vectors=x, usage=[None, None]), x.tolist()):
        np.testing.assert_allclose(similarity(value, x), np.eye(2), atol=1e-6)
    np.testing.assert_allclose(similarity(x[0], x), [[1, 0]], atol=1e-6)


@pytest.mark.parametrize("output", ["int8", "uint8", "binary", "ubinary"])
def test_similarity_of_lists(output) -> None:
    stored = convert(np.random.default_rng(0).standard_normal((3, 64), np.float32), output)[0]
    expected = similarity(stored, stored, output)
    for value in (stored.tolist(), list(stored), torch.from_numpy(stored)):
        np.testing.assert_array_equal(similarity(value, stored, output), expected)
