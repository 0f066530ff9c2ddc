"""The table of compiled kernels keeps the rules, and the rules see what they are for."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks.aot import TARGETS, Row, broken, compare, parse_rows, read_table
from qvlfast.ops import Ops

GOOD = Row("sm_89", "linear", "bfloat16", "x", "m=16", 4, 2, 80, 9000, 0, "HMMA", 8, 4, "3.9.0", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"error": "aborted"}, "aborted"),
        ({"spills": 2}, "2 spills"),
        ({"spills": 16, "dtype": "float32"}, ""),
        ({"spills": 17, "dtype": "float32"}, "17 spills"),
        ({"shared_bytes": 100 * 1024}, "at most 99 KB"),
        ({"target": "sm_90", "shared_bytes": 100 * 1024}, ""),
        ({"matrix": ""}, "matrix instruction none, expected HMMA"),
        ({"op": "gated_linear_int8"}, "matrix instruction HMMA, expected IMMA"),
        ({"op": "linear_int4", "matrix": "IMMA"}, ""),
        ({"op": "gated_linear_int4_float"}, ""),
        ({"op": "linear_int4_float", "matrix": "IMMA"}, "expected HMMA"),
        ({"op": "linear_fp8", "matrix": "QMMA"}, ""),
        ({"op": "linear_fp8", "target": "sm_90"}, ""),
        ({"op": "linear_fp8", "target": "sm_90", "blocks": "m=64"}, "expected QGMMA"),
        ({"target": "sm_90", "blocks": "m=128", "matrix": "HGMMA"}, ""),
        ({"target": "sm_100", "blocks": "m=128", "matrix": "HMMA"}, "expected UTCHMMA"),
        ({"target": "sm_110", "blocks": "m=128", "op": "linear_int8", "matrix": "IMMA"}, ""),
        ({"async_copies": 0}, "no asynchronous copies"),
        ({"async_copies": 0, "stages": 1}, ""),
        ({"matrix": "", "dtype": "float32"}, ""),
        ({"matrix": "", "op": "rms_norm"}, ""),
    ],
)
def test_rules(change, message) -> None:
    assert message in broken(replace(GOOD, **change))
    assert bool(broken(replace(GOOD, **change))) == bool(message)


def test_counts_are_compared_under_one_triton_only() -> None:
    other = replace(GOOD, registers=81)
    assert compare([GOOD], [GOOD]) == []
    assert len(compare([other], [GOOD])) == 1
    assert compare([replace(other, triton="3.8.0")], [GOOD]) == []


def test_a_compiler_that_dies_leaves_a_row() -> None:
    announced = json.dumps(asdict(replace(GOOD, error="aborted")))
    done = json.dumps(asdict(GOOD))
    assert parse_rows("\n".join((announced, done, announced))) == [
        GOOD,
        replace(GOOD, error="aborted"),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_the_committed_table(target) -> None:
    rows = [row for row in read_table() if row.target == target]
    assert not [row for row in rows if broken(row)]
    ops = {name for name, entry in vars(Ops).items() if isinstance(entry, staticmethod)}
    forms = ("int8", "int4", "int4_float")
    ops |= {f"{gated}linear_{form}" for gated in ("", "gated_") for form in forms}
    if target not in ("sm_80", "sm_87"):
        ops |= {"linear_fp8", "gated_linear_fp8"}
    ops |= {"quantise_rows", "widen_int4"}
    # Preparing weights is no kernel, and what adds a product has those of linear.
    assert ops - {"prepare", "add_linear"} <= {row.op for row in rows}
