"""Blocks that were measured. Written by ``python -m benchmarks.tune``, not by hand."""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """
    Attributes:
        blocks: the leading fields of the config, in their order.
        was: the blocks that they were timed against, and replaced.
        ratio: time over that of ``was``, the geometric mean over the shapes of the models.
    """

    blocks: tuple[int, ...]
    was: tuple[int, ...]
    ratio: float


# target → device, versions, date and commit of its last run
PROVENANCE: dict[str, str] = {}

# (kind, target, most rows, gated) → m, n, k, warps, stages
PRODUCTS: dict[tuple[str, str, int, bool], Measured] = {}

# (target, most rows) → time of the chosen blocks over that of the vendor's library: plain products
# in 16 bits, the geometric mean over the shapes of the models
VENDOR: dict[tuple[str, int], float] = {}

# (target, head size as a power of two, queries of a segment as one) → m, n, warps, stages
ATTENTION: dict[tuple[str, int, int], Measured] = {}

# (target, columns as a power of two) → rows, columns, warps
ROWS: dict[tuple[str, int], Measured] = {}
