"""Run Triton kernels under triton-viz's sanitizer, which proves their addresses within bounds.

It needs an environment of its own, with this package's requirements, Triton 3.6 and NumPy 2.3:

    pip install 'triton==3.6.0' 'numpy<2.4' triton-viz
    TRITON_INTERPRET=1 python scripts/sanitize_kernels.py

Left out is what triton-viz 3.0 cannot follow, and says so: addresses that were themselves loaded
(attention's tiles, the patch embedding's grid, the axis of mrope), K split over programs, and
tensor descriptors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import triton_viz
from qvlfast.kernels.common import RowConfig
from qvlfast.kernels.configs import GemmConfig
from triton_viz.clients import Sanitizer

from qvlfast.kernels import (
    embed,
    epilogue,
    gemm,
    gemm_int4,
    gemm_int4_float,
    norm,
    pool,
    quantise,
    rope,
)

BLOCKS = GemmConfig(m=16, n=32, k=32, warps=4, stages=2)
# Rows and columns that are no multiples of any block.
ROWS, INPUTS, OUTPUTS = 17, 70, 34


def wrap() -> None:
    """Replace every kernel by one that is watched."""
    modules = (embed, epilogue, gemm, gemm_int4, gemm_int4_float, norm, pool, quantise, rope)
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            watched = triton_viz.trace(Sanitizer(abort_on_error=True))(getattr(module, name))
            setattr(module, name, watched)


def calls() -> dict[str, Callable[[], object]]:
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    bias, residual = torch.randn(OUTPUTS), torch.randn(ROWS, OUTPUTS)
    x8, w8 = (t.clamp(-7, 7).to(torch.int8) for t in (x, weight))
    x_scale, w_scale = torch.rand(ROWS), torch.rand(OUTPUTS)
    groups = torch.ones(OUTPUTS, -(-INPUTS // 32), dtype=torch.uint8)
    int4 = gemm_int4.pack_int4([(w8, groups, w_scale)], 32)
    heads, half = torch.randn(ROWS, 3, 72), torch.rand(ROWS, 36)
    one, index = torch.ones(INPUTS), torch.tensor([4, 0, 16])
    f32, c = torch.float32, BLOCKS
    return {
        "linear": lambda: gemm.linear(x, weight, bias, residual=residual, config=c),
        "gated_linear": lambda: gemm.linear(x, weight, gated=True, config=c),
        "linear_int8": lambda: gemm.linear_quantised(
            x8, x_scale, w8, w_scale, bias, dtype=f32, residual=residual, config=c
        ),
        "gated_linear_int8": lambda: gemm.linear_quantised(
            x8, x_scale, w8, w_scale, dtype=f32, gated=True, config=c
        ),
        "linear_int4": lambda: gemm_int4.linear_int4(x8, x_scale, int4, dtype=f32, config=c),
        "linear_int4_float": lambda: gemm_int4_float.linear_int4_float(
            x, int4, bias, residual=residual, config=c
        ),
        "gated_linear_int4_float": lambda: gemm_int4_float.linear_int4_float(
            x, int4, gated=True, config=c
        ),
        "widen_int4": lambda: gemm_int4.widen_int4(int4),
        "quantise_rows": lambda: quantise.quantise_rows(x),
        "rms_norm": lambda: norm.rms_norm(x, one, 1e-6),
        "rms_norm int8": lambda: norm.rms_norm(x, one, 1e-6, "int8"),
        "layer_norm": lambda: norm.layer_norm(x, one, one, 1e-6),
        "rope": lambda: rope.rope(heads, half, half),
        "norm_rope": lambda: rope.norm_rope(heads, torch.ones(72), half, half, 1e-6),
        "pool": lambda: pool.pool(x, one, 1e-6, read=index, size=7),
        "score": lambda: pool.score(x, one, 1e-6, torch.randn(2, INPUTS)),
        "embed": lambda: embed.embed(index, x),
        "add_rows": lambda: embed.add_rows(x, index, torch.randn(3, INPUTS)),
    }


def sees_a_fault() -> bool:
    """Whether a kernel that is told of one row too many is found out."""
    x, out, scale = torch.randn(5, 33), torch.empty(5, 33, dtype=torch.int8), torch.empty(5)
    config = RowConfig(rows=4, columns=64, warps=4)
    try:
        quantise.quantise_kernel[(2,)](
            x, out, scale, 6, 33, 33, FORM="int8", BT=config.rows, BC=config.columns
        )
    except SystemExit:
        return True
    return False


def main() -> None:
    wrap()
    if not sees_a_fault():
        sys.exit("the sanitizer does not see a row too many: nothing was shown")
    for name, call in calls().items():
        call()  # the sanitizer prints a report and exits where it finds a fault
        print(f"{name}: within bounds")


if __name__ == "__main__":
    main()
