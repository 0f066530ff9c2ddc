"""From float vectors to what a caller stores: shorter, of unit length, fewer bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

VectorType = Literal["float32", "int8", "uint8", "binary", "ubinary"]
VECTOR_TYPES: tuple[VectorType, ...] = ("float32", "int8", "uint8", "binary", "ubinary")


def cut(
    vectors: NDArray[np.float32], dimensions: int | None, normalize: bool
) -> NDArray[np.float32]:
    """The first ``dimensions`` values (Matryoshka), then scaled to unit length.

    Args:
        vectors: ``[N, D]``.
        dimensions: None keeps all D.
    """
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if not normalize:
        return np.ascontiguousarray(vectors)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = vectors / np.maximum(length, 1e-12)
    return scaled


def check_dimensions(dimensions: int, output: VectorType) -> None:
    """Refuse bits that do not fill their bytes: all who compare them would count the rest too.

    Raises:
        ValueError: ``output`` is ``binary`` or ``ubinary``, and ``dimensions`` no multiple of 8.
    """
    if output in ("binary", "ubinary") and dimensions % 8:
        raise ValueError(
            f"{dimensions} dimensions do not fill whole bytes: with output={output!r} use a "
            "multiple of 8"
        )


def convert(vectors: NDArray[np.float32], output: VectorType) -> tuple[NDArray[Any], Any]:
    """Store vectors in another type.

    ``int8``: round(x · 127 / absmax) per vector, ties to even; ``uint8``: the same plus 128;
    ``ubinary``: one bit a value, set where it is positive, eight to a byte, the first value in
    the highest bit; ``binary``: the same minus 128, as int8. A row with NaN becomes zeros.

    Args:
        vectors: ``[N, D]``; for bits, D is a multiple of 8.

    Returns:
        The vectors, ``[N, D]`` or for bits ``[N, D / 8]``, and for ``int8`` and ``uint8``
        the scales ``[N]`` float32 (value ≈ int8 · scale), else None.

    Raises:
        ValueError: see :func:`check_dimensions`.
    """
    check_dimensions(vectors.shape[1], output)
    if output == "float32":
        return vectors, None
    failed = np.asarray(np.isnan(vectors).any(axis=1))
    filled = np.where(failed[:, None], np.float32(0), vectors)
    if output in ("int8", "uint8"):
        largest = np.abs(filled).max(axis=1, initial=0.0)
        scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        rounded = np.rint(filled / scales[:, None]).clip(-127, 127).astype(np.int16)
        if output == "int8":
            return rounded.astype(np.int8), scales
        shifted = (rounded + 128).astype(np.uint8)
        shifted[failed] = 0
        return shifted, scales
    bits = np.packbits(filled > 0, axis=1)
    if output == "ubinary":
        return bits, None
    signed = (bits.astype(np.int16) - 128).astype(np.int8)
    signed[failed] = 0
    return signed, None


def similarity(a: Any, b: Any, output: VectorType = "float32") -> NDArray[np.float32]:
    """Similarity of each row of ``a`` with each row of ``b``: both of the type ``output``.

    The cosine; for bits, 1 − 2 · (share of differing bits), which is the cosine of their signs.

    Args:
        a: ``[N, D]`` or ``[D]``; numpy, torch (any device), nested lists, or an ``Encoded``.
        b: ``[M, D]`` or ``[D]``.
        output: what both were encoded to. ``float32`` stands for every float type.

    Returns:
        ``[N, M]`` float32.

    Raises:
        ValueError: an unknown ``output``, values that are not of that type, or rows that differ in
            length or are empty.
    """
    if output not in VECTOR_TYPES:
        raise ValueError(f"output is {output!r}: use one of {', '.join(VECTOR_TYPES)}")
    left, right = _rows(a, "a", output), _rows(b, "b", output)
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"cannot compare vectors of {left.shape[1]} and {right.shape[1]} values: "
            "encode both with the same `dimensions` and `output`"
        )
    left, right = (cut(_plain(x, output), None, normalize=True) for x in (left, right))
    product: NDArray[np.float32] = left @ right.T
    return product


def _rows(value: Any, name: str, output: VectorType) -> NDArray[Any]:
    """Vectors as ``[N, D]``, refused unless their type is ``output``."""
    value = getattr(value, "vectors", value)  # of an `Encoded`
    if isinstance(value, list | tuple):
        value = [_array(row) for row in value]
    rows = np.atleast_2d(_array(value))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} has the shape {list(np.shape(rows))}, expected [N, D] or [D]")
    if output == "float32":
        if not np.issubdtype(rows.dtype, np.floating):
            raise ValueError(
                f"{name} holds {rows.dtype}, expected floats: pass output=… as the vectors were "
                f"encoded, one of {', '.join(VECTOR_TYPES[1:])}, or convert them to float32"
            )
        return rows
    expected = np.iinfo(np.uint8 if output in ("uint8", "ubinary") else np.int8)
    # Lists, of JSON for one, become the widest integers.
    listed = rows.dtype == np.int64 and rows.size > 0
    if rows.dtype != expected.dtype and not (
        listed and expected.min <= rows.min() and rows.max() <= expected.max
    ):
        raise ValueError(
            f"{name} holds {rows.dtype}, and vectors of output={output!r} are {expected.dtype}: "
            "pass output=… as the vectors were encoded"
        )
    return rows.astype(expected.dtype)


def _array(value: Any) -> Any:
    """A tensor as an array, whatever its type and device; others as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _plain(rows: NDArray[Any], output: VectorType) -> NDArray[np.float32]:
    """The values that stored rows stand for, up to a factor for each row."""
    if output in ("binary", "ubinary"):
        packed = rows.view(np.uint8) ^ np.uint8(0x80 if output == "binary" else 0)
        return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
    shift = 128 if output == "uint8" else 0
    return rows.astype(np.float32) - np.float32(shift)
