"""Products by the vendor's library: when, and that they are the same ones."""

from __future__ import annotations

import pytest
import torch
from qvlfast.kernels.common import LAUNCHES, RefusalError
from qvlfast.kernels.configs import TARGETS
from qvlfast.kernels.vendor import choose_product, vendor_linear

from qvlfast.arena import Arena
from qvlfast.backends import triton as backend
from qvlfast.backends.triton import TritonOps
from qvlfast.kernels import vendor

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 16, 40, 4096])
def test_plain_products_go_to_the_library_until_measured(target: str, rows: int) -> None:
    for extra in ({}, {"bias": True}, {"residual": True}):
        choice = choose_product(target, BF16, rows, **extra)
        assert choice.vendor
        assert target in choice.reason
    for extra in ({"gated": True}, {"activation": "gelu_tanh"}, {"bias": True, "residual": True}):
        assert not choose_product(target, BF16, rows, **extra).vendor


def test_a_measured_ratio_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "VENDOR", {("sm_90", 16): 0.8, ("sm_90", 64): 0.99})
    fast = choose_product("sm_90", BF16, 3)
    assert not fast.vendor
    assert "0.80 of the library's time" in fast.reason
    assert choose_product("sm_90", BF16, 40).vendor  # a hundredth is noise
    assert choose_product("sm_90", BF16, 1000).vendor
    assert choose_product("sm_89", BF16, 3).vendor
    assert choose_product("sm_90", torch.float32, 3).vendor  # the ratio is of 16 bits


def test_the_interpreter_runs_the_kernels() -> None:
    assert not choose_product("interpreter", BF16, 3).vendor
    layer = TritonOps.prepare([draw(8, 16, seed=1)])
    LAUNCHES.clear()
    TritonOps(CPU).linear(draw(3, 16, seed=2), layer)
    assert dict(LAUNCHES) == {"linear": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_the_backend_takes_it_where_it_is_chosen(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "target_of", lambda device: "sm_90")
    arena = Arena(CPU)
    arena.reserve(1 << 16)
    ops = TritonOps(CPU).on(arena)
    x = draw(rows, 40, seed=1, dtype=dtype)
    weight, bias = draw(24, 40, seed=2, dtype=dtype) / 6, draw(24, seed=3)
    plain, biased = ops.prepare([weight]), ops.prepare([weight], bias)
    LAUNCHES.clear()
    # One rounding of the result, and in bfloat16 one of the bias.
    close = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 8e-3}
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(ops.linear(x, plain).double(), exact, **close)
    torch.testing.assert_close(ops.linear(x, biased).double(), exact + bias.double(), **close)
    y = draw(rows, 24, seed=4, dtype=dtype)
    onto = y.double() + exact
    ops.add_linear(y, x, plain)
    torch.testing.assert_close(y.double(), onto, **close)
    assert dict(LAUNCHES) == {"linear_vendor": 3}
    assert arena.spilled == 0
    assert arena.peak == (2 * 256 * -(-rows * 24 * dtype.itemsize // 256))
    # What it cannot do whole is the kernel's.
    expected = y.double() + exact + bias.double()
    ops.add_linear(y, x, biased)
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(
        ops.linear(x, biased, activation="gelu_tanh").double(),
        torch.nn.functional.gelu(exact + bias.double(), approximate="tanh"),
        **close,
    )
    assert LAUNCHES["linear"] == (2 if rows else 0)


def test_what_it_does_not_take() -> None:
    x, weight, bias = draw(3, 8, seed=1), draw(4, 8, seed=2), draw(4, seed=3)
    with pytest.raises(RefusalError, match="a bias or a residual, not both"):
        vendor_linear(x, weight, bias, residual=draw(3, 4, seed=4))
    with pytest.raises(RefusalError, match="one dtype"):
        vendor_linear(x, weight.bfloat16())
