"""The cost sheet: its arithmetic by hand, and that the committed page and table belong together."""

from __future__ import annotations

import pytest

from benchmarks import aot
from benchmarks.costs import (
    ARCHS,
    PAGE,
    Work,
    predict,
    predictions,
    product_bytes,
    read_table,
    render,
    resident,
    roofline,
)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        # 128 × 32 × 8 = 32,768 of 65,536 registers; 164 KB hold 4 of 32 + 1 KB.
        ("sm_80", 128, 32 * 1024, 8, 2),
        # 121 registers are handed out as 128, 129 as 136: 65,536 / 4,352 = 15 warps.
        ("sm_80", 121, 0, 8, 2),
        ("sm_80", 129, 0, 8, 1),
        # One of 96 + 1 KB in 100 KB, whatever the registers are.
        ("sm_89", 32, 96 * 1024, 4, 1),
        # 48 warps by 4, and never more than the 16 blocks of sm_87.
        ("sm_89", 32, 0, 4, 12),
        ("sm_87", 16, 0, 1, 16),
        ("sm_89", 32, 100 * 1024, 4, 0),
    ],
)
def test_resident(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert resident(ARCHS[target], registers, shared, warps) == programs


def test_roofline_of_a_product() -> None:
    """4096³ in bf16: 100.7 MB and 137.4 GFLOP; at 1 row the weight's 33.6 MB decide."""
    n = 4096
    size = product_bytes("float16", n, n, n, gated=False, residual=False, split=1)
    assert size == 3 * 2 * n * n
    bound, least = roofline(size, 2 * n**3, 2000, 300)
    assert bound == "arithmetic" and least == pytest.approx(2 * n**3 / 300e12 * 1e6)
    size = product_bytes("float16", 1, n, n, gated=False, residual=False, split=1)
    assert size == 2 * n * n + 4 * n
    bound, least = roofline(size, 2 * n * n, 2000, 300)
    assert bound == "memory" and least == pytest.approx(size / 2000e9 * 1e6)


def test_bytes_of_the_other_products() -> None:
    m, n, k = 2, 64, 128
    plain = {"gated": False, "residual": False, "split": 1}
    assert product_bytes("int8", m, n, k, **plain) == m * k + n * k + 4 * (m + n) + 2 * m * n
    assert product_bytes("int4", m, n, k, **plain) == (
        m * k + n * k // 2 + n * k // 64 + 4 * (m + n) + 2 * m * n
    )
    whole = product_bytes("float16", m, n, k, **plain)
    assert product_bytes("float16", m, n, k, **plain | {"gated": True}) == whole + 2 * n * k
    assert product_bytes("float16", m, n, k, **plain | {"residual": True}) == whole + 2 * m * n
    assert product_bytes("float16", m, n, k, **plain | {"split": 4}) == whole + 32 * m * n


def test_blocks_that_were_not_compiled_are_told() -> None:
    work = Work("linear", "x", "float16", 1, 1, 1, "m=3")
    with pytest.raises(LookupError, match=r"m=3 is not in aot\.csv: run benchmarks\.aot"):
        predict("sm_80", work, [])


def test_what_is_committed_is_what_the_command_writes() -> None:
    rows = read_table()
    assert rows == predictions(aot.read_table())
    assert PAGE.read_text(encoding="utf-8") == render(rows)
    assert {row.target for row in rows} == set(aot.TARGETS)
    assert all(row.bound_us > 0 and 0 < row.occupancy <= 1 for row in rows)
