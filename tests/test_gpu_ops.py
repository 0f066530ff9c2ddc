"""Every kernel on a GPU against the reference: pytest -m gpu, with TRITON_INTERPRET=0."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import check, distance
from benchmarks.gpu_cases import Sizes, cases
from qvlfast.backends.triton import TritonOps
from qvlfast.dispatch import choose_ops
from qvlfast.flash import flash_first, installed_version
from qvlfast.ops import Forest, Ops

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_every_case_equals_the_reference() -> None:
    ops = TritonOps(CUDA)
    faults = []
    for case in cases(Sizes(vocab=5000), CUDA, fp8="fp8" in ops.keeps):
        row, _ = check(case, ops)
        if row.state != "ok":
            faults.append(row)
    assert not faults


@pytest.mark.parametrize("dim", [64, 72, 128])
def test_flash_attn_equals_the_reference(dim: int) -> None:
    version = installed_version()
    if version is None:
        pytest.fail("flash-attn is not installed: pip install 'qvlfast[flash-attn]'")
    forest = Forest.plain([1, 17, 300])
    q = torch.randn(318, 16, dim, device=CUDA, dtype=torch.bfloat16)
    k, v = (torch.randn(318, 8, dim, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    options = {"causal": True, "scale": dim**-0.5}
    got = flash_first(Ops.attention)(q, k, v, forest, **options)
    truth = Ops.attention(q.float(), k.float(), v.float(), forest, **options)
    assert distance(got, truth) < 1.6e-2


def test_auto_on_a_gpu_is_the_reference() -> None:
    assert choose_ops("auto", CUDA, torch.bfloat16).name == "reference"
