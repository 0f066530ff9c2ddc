"""The CPU kernels under pytest-benchmark, to compare two commits:

python -m pytest benchmarks/bench_ops.py --benchmark-autosave
python -m pytest benchmarks/bench_ops.py --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qvlfast.backends.native import NativeOps
from qvlfast.ops import Forest

Benchmark = Callable[..., Any]


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 16, 256])
def test_linear(benchmark: Benchmark, form: str, rows: int) -> None:
    n, k = 2048, 2048
    weight = (torch.randn(n, k) / k**0.5).bfloat16()
    layer = NativeOps.prepare([weight], form=None if form == "bf16" else form)
    y = benchmark(NativeOps.linear, torch.randn(rows, k).bfloat16(), layer)
    assert y.shape == (rows, n) and y.isfinite().all()


@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "causal"), [(16, 16, 64, False), (16, 8, 128, True)]
)
@pytest.mark.parametrize("length", [128, 1024])
def test_attention(
    benchmark: Benchmark, length: int, heads: int, key_heads: int, dim: int, causal: bool
) -> None:
    q, k, v = (torch.randn(length, h, dim).bfloat16() for h in (heads, key_heads, key_heads))
    forest = Forest.plain([length])
    out = benchmark(NativeOps.attention, q, k, v, forest, causal=causal, scale=dim**-0.5)
    assert out.shape == q.shape and out.isfinite().all()


def test_rms_norm(benchmark: Benchmark) -> None:
    x, weight = torch.randn(1024, 2048).bfloat16(), torch.ones(2048).bfloat16()
    assert benchmark(NativeOps.rms_norm, x, weight, 1e-6).isfinite().all()


def test_norm_rope(benchmark: Benchmark) -> None:
    x, weight = torch.randn(1024, 16, 128).bfloat16(), torch.ones(128).bfloat16()
    angle = torch.rand(1024, 64)
    benchmark(NativeOps.norm_rope, x, weight, angle.cos(), angle.sin(), 1e-6)
    assert x.isfinite().all()
