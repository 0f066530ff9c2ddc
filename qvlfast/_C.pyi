import numpy as np
from numpy.typing import NDArray

def cpu_features() -> dict[str, bool]:
    """What this processor can do, by name."""

def isa() -> str:
    """The instruction set in use: scalar, avx2, avx512 or amx.

    Raises:
        ValueError: the environment variable QVLFAST_ISA asks for an unknown one or for more than
            the processor has.
    """

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
