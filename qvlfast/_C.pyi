from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tensor: TypeAlias = Any
"""A DLPack capsule of a tensor on the CPU, or what has ``__dlpack__``; it is only borrowed."""

def cpu_features() -> dict[str, bool]:
    """What this processor can do, by name."""

def isa() -> str:
    """The instruction set in use: scalar, avx2, avx512 or amx.

    Raises:
        ValueError: the environment variable QVLFAST_ISA asks for an unknown one or for more than
            the processor has.
    """

def best_isa() -> str:
    """The best instruction set of this processor."""

def num_threads() -> int:
    """Threads that share the work of one kernel.

    Raises:
        ValueError: the environment variable QVLFAST_THREADS is not a number in 1..1024.
    """

def set_num_threads(n: int) -> None:
    """Set the number of threads that share the work of one kernel.

    Raises:
        ValueError: n is not in 1..1024.
    """

def extract_patches(
    frames: NDArray[np.uint8], patch: int, temporal: int, merge: int
) -> NDArray[np.uint8]:
    """Cut frames into the rows that the patch embedding multiplies.

    Args:
        frames: uint8 [T, H, W, 3], C-contiguous; H and W multiples of ``patch * merge``;
            T is 1 (a still) or a multiple of ``temporal``.
        patch: side of a patch in pixels.
        temporal: frames of a patch.
        merge: patches on a side of a block.

    Returns:
        uint8 [N, K], each row a patch as (channel, frame, row, column); a still has patches of one
        frame. Rows are in the order (time, block row, block column, row in block, column in block).

    Raises:
        TypeError: frames is not a uint8 array.
        ValueError: a wrong shape or stride; the message names it.
    """

class PackedWeight:
    """A weight in the layout that :func:`gemm` reads; docs/cpu.md draws it."""

    @property
    def format(self) -> str:
        """f32, bf16, int8 or int4."""
    @property
    def n(self) -> int:
        """Output channels, of both parts of a gated weight."""
    @property
    def k(self) -> int:
        """Inputs."""
    @property
    def gated(self) -> bool:
        """Whether gate and up are interleaved."""
    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

def pack_floats(parts: Sequence[Tensor], format: str, gated: bool = False) -> PackedWeight:
    """Pack ``[Ni, K]`` float32, bfloat16 or float16 below each other, as ``f32`` or ``bf16``.

    Raises:
        ValueError: parts do not fit; ``gated`` takes two of equal shape, gate and up.
    """

def pack_int8(parts: Sequence[tuple[Tensor, Tensor]], gated: bool = False) -> PackedWeight:
    """Pack (values ``[Ni, K]`` int8 in −127 … 127, scale ``[Ni]`` float32) below each other."""

def pack_int4(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], group: int, gated: bool = False
) -> PackedWeight:
    """Pack (pairs ``[Ni, K / 2]``, multiplier ``[Ni, ceil(K / group)]``, scale ``[Ni]``), as
    :func:`quantise_int4` makes them, below each other."""

def unpack(weight: PackedWeight, out: Tensor) -> None:
    """Write what a weight stands for to float32 ``[n, k]``, parts below each other."""

def gemm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """out = activation(x · weightᵀ + bias) + residual.

    Args:
        x: ``[M, K]`` float32 (for f32), bfloat16 (bf16), uint8 (both of them), or float32,
            bfloat16 or int8 (int8, int4).
        x_scale: ``[M]`` float32 of int8 rows.
        bias: ``[N]`` float32.
        activation: none, gelu_tanh, gelu_erf, silu, or swiglu, which takes a gated weight.
        residual, out: ``[M, N]`` or ``[M, N / 2]`` for swiglu, float32 or bfloat16.
        isa: for tests; an instruction set of this processor.

    Raises:
        ValueError: an operand does not fit; the message names it.
    """

def quantise_rows(x: Tensor, values: Tensor, scale: Tensor, isa: str | None = None) -> None:
    """Round rows ``[M, K]`` to int8 values with scales ``[M]``, as :mod:`qvlfast.ops.rows` says."""

def quantise_int4(
    x: Tensor,
    group: int,
    pairs: Tensor,
    multiplier: Tensor,
    scale: Tensor,
    isa: str | None = None,
) -> None:
    """``[N, K]`` in two levels of scales, see :class:`qvlfast.quant.weights.Int4Weight`.

    Args:
        x: float32, bfloat16 or float16; K is even.
        group: 32, 64 or 128.
        pairs: ``[N, K / 2]`` uint8.
        multiplier: ``[N, ceil(K / group)]`` uint8.
        scale: ``[N]`` float32; NaN for a row with NaN or infinity in it.
    """

def pool(
    x: Tensor,
    read: Tensor | None,
    weight: Tensor,
    eps: float,
    unit: bool,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """:func:`qvlfast.ops.head.pool`; ``unit`` scales the columns of ``out`` to unit length."""

def score(
    x: Tensor,
    read: Tensor | None,
    weight: Tensor,
    eps: float,
    answers: Tensor,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """:func:`qvlfast.ops.head.score`."""

def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, isa: str | None = None) -> None:
    """:func:`qvlfast.ops.norm.rms_norm` on ``[M, C]``."""

def rms_norm_rows(
    x: Tensor, weight: Tensor, eps: float, values: Tensor, scale: Tensor, isa: str | None = None
) -> None:
    """:func:`rms_norm`, then :func:`quantise_rows`."""

def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, isa: str | None = None
) -> None:
    """:func:`qvlfast.ops.norm.layer_norm` on ``[M, C]``."""

def rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, isa: str | None = None) -> None:
    """:func:`qvlfast.ops.rope.rope` of ``[T, H, D]`` into ``out``, which may be ``x``."""

def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """:func:`qvlfast.ops.rope.norm_rope` of ``[T, H, D]`` into ``out``, which may be ``x``."""

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: NDArray[np.int32],
    cu_k: NDArray[np.int32],
    parent: NDArray[np.int32],
    causal: bool,
    scale: float,
    read: NDArray[np.int64] | None,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """:func:`qvlfast.ops.attention.attention`; the same tokens give the same bits, however they
    are cut into segments."""
