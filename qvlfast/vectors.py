"""From float vectors to what a caller stores: shorter, of unit length, fewer bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
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


def convert(vectors: NDArray[np.float32], output: VectorType) -> tuple[NDArray[Any], Any]:
    """Store vectors in another type.

    ``int8``: round(x · 127 / absmax) per vector, ties to even; ``uint8``: the same plus 128;
    ``ubinary``: one bit a value, set where it is positive, eight to a byte, the first value in
    the highest bit; ``binary``: the same minus 128, as int8. A row with NaN becomes zeros.

    Args:
        vectors: ``[N, D]``.

    Returns:
        The vectors, ``[N, D]`` or for bits ``[N, ceil(D / 8)]``, and for ``int8`` and ``uint8``
        the scales ``[N]`` float32 (value ≈ int8 · scale), else None.
    """
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
        a: ``[N, D]`` or ``[D]``; numpy, torch or nested lists.
        b: ``[M, D]`` or ``[D]``.

    Returns:
        ``[N, M]`` float32.
    """
    left, right = np.atleast_2d(np.asarray(a)), np.atleast_2d(np.asarray(b))
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"cannot compare vectors of {left.shape[1]} and {right.shape[1]} values: "
            "encode both with the same `dimensions` and `output`"
        )
    if output in ("binary", "ubinary"):
        offset = 128 if output == "binary" else 0
        left, right = (
            _signs((x.astype(np.int16) + offset).astype(np.uint8)) for x in (left, right)
        )
    elif output == "uint8":
        left, right = (x.astype(np.float32) - 128 for x in (left, right))
    left, right = (cut(x.astype(np.float32), None, normalize=True) for x in (left, right))
    product: NDArray[np.float32] = left @ right.T
    return product


def _signs(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
