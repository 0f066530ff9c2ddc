"""Every launch of a Triton kernel that the 2B and 8B models make, recorded instead of run.

The wrappers get tensors without storage, and what they would launch is kept: so the arguments, the
configs and the constants are those of a real call. Import this where TRITON_INTERPRET is not 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from qvlfast.kernels.attention import attention
from qvlfast.kernels.common import RefusalError
from qvlfast.kernels.embed import add_rows, embed
from qvlfast.kernels.gemm import linear, linear_quantised
from qvlfast.kernels.norm import layer_norm, rms_norm
from qvlfast.kernels.patch_embed import patch_embed
from qvlfast.kernels.pool import pool, score
from qvlfast.kernels.quantise import quantise_rows
from qvlfast.kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables
from triton.tools.tensor_descriptor import TensorDescriptor

from qvlfast.ops import Forest

TOKENS = 705
# One of each class of rows that configs tell apart.
ROWS = (1, 40, 3000)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
FLOAT16_CASES = ("2b o m=1", "2b gate up m=3000", "2b text", "2b k=768")
FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

Case: TypeAlias = tuple[str, Callable[[], Any]]
"""What it is for, and the call that makes the launch."""


def new(*shape: int, of: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=of, device="meta")


def text_products(size: str, hidden: int, ffn: int, dtype: torch.dtype) -> Iterator[Case]:
    """q and kv (plain), o and down (onto the residual), gate and up (gated), for all rows."""
    layers = (
        ("q", hidden, hidden, False, False),
        ("o", hidden, hidden, True, False),
        ("down", hidden, ffn, True, False),
        ("gate up", 2 * ffn, hidden, False, True),
    )
    for (name, n, k, onto, gated), m in product(layers, ROWS):
        yield (
            f"{size} {name} m={m}",
            lambda m=m, n=n, k=k, onto=onto, gated=gated: linear(
                new(m, k, of=dtype),
                new(n, k, of=dtype),
                residual=new(m, n, of=dtype) if onto else None,
                gated=gated,
            ),
        )
    if dtype != torch.bfloat16:
        return
    for (name, n, k, onto, gated), m, form in product(layers, ROWS, ("int8", "fp8", "fp8 blocks")):
        values = FORMS[form.split()[0]]
        scales = (n,) if form in FORMS else (k // 128, n)
        yield (
            f"{size} {form} {name} m={m}",
            lambda m=m, n=n, k=k, onto=onto, gated=gated, values=values, scales=scales: (
                linear_quantised(
                    new(m, k, of=values),
                    new(m, of=torch.float32),
                    new(n, k, of=values),
                    new(*scales, of=torch.float32),
                    dtype=dtype,
                    residual=new(m, n, of=dtype) if onto else None,
                    gated=gated,
                )
            ),
        )


def vision_products(size: str, hidden: int, ffn: int, dtype: torch.dtype) -> Iterator[Case]:
    """qkv, fc1 of blocks and of mergers, proj and fc2; the first three in int8 and FP8 as well."""
    for name, n, k, kind, onto in (
        ("qkv", 3 * hidden, hidden, "none", False),
        ("fc1", ffn, hidden, "gelu_tanh", False),
        ("merger", 4 * hidden, 4 * hidden, "gelu_erf", False),
        ("fc2", hidden, ffn, "none", True),
    ):
        yield (
            f"{size} vision {name}",
            lambda n=n, k=k, kind=kind, onto=onto: linear(
                new(3000, k, of=dtype),
                new(n, k, of=dtype),
                new(n, of=dtype),
                activation=kind,
                residual=new(3000, n, of=dtype) if onto else None,
            ),
        )
        if dtype != torch.bfloat16 or name == "merger":
            continue
        for form, values in FORMS.items():
            yield (
                f"{size} {form} vision {name}",
                lambda n=n, k=k, kind=kind, onto=onto, values=values: linear_quantised(
                    new(3000, k, of=values),
                    new(3000, of=torch.float32),
                    new(n, k, of=values),
                    new(n, of=torch.float32),
                    new(n, of=dtype),
                    dtype=dtype,
                    activation=kind,
                    residual=new(3000, n, of=dtype) if onto else None,
                ),
            )


def attentions(
    size: str, heads: int, kv: int, vision_dim: int, dtype: torch.dtype
) -> Iterator[Case]:
    for label, lengths, q_heads, kv_heads, dim, read in (
        ("text", [TOKENS], heads, kv, 128, None),
        ("text short", [15] * (TOKENS // 15), heads, kv, 128, None),
        ("text last token", [TOKENS], heads, kv, 128, np.array([TOKENS - 1])),
        ("vision", [TOKENS], 16, 16, vision_dim, None),
    ):
        count = TOKENS if read is None else len(read)
        yield (
            f"{size} {label}",
            lambda count=count, h=q_heads, hk=kv_heads, d=dim, lengths=lengths, read=read: (
                attention(
                    new(count, h, d, of=dtype),
                    new(TOKENS, hk, d, of=dtype),
                    new(TOKENS, hk, d, of=dtype),
                    Forest.plain(lengths),
                    causal=True,
                    scale=1.0,
                    read=read,
                )
            ),
        )


def row_wise(
    size: str, hidden: int, ffn: int, vision: int, vision_dim: int, dtype: torch.dtype
) -> Iterator[Case]:
    f32, i64 = torch.float32, torch.int64

    def vector(c: int) -> torch.Tensor:
        return new(c, of=dtype)

    def rows(c: int) -> torch.Tensor:
        return new(9, c, of=dtype)

    for form in ("float", "int8", "fp8"):
        yield f"{size} {form}", lambda c=hidden, f=form: rms_norm(rows(c), vector(c), 1e-6, f)
        yield (
            f"{size} vision {form}",
            lambda c=vision, f=form: layer_norm(rows(c), vector(c), vector(c), 1e-6, f),
        )
    yield (
        f"{size} merged",
        lambda c=4 * vision: layer_norm(rows(c), vector(c), vector(c), 1e-6),
    )
    for form in FORMS:
        yield f"{size} ffn {form}", lambda c=ffn, f=form: quantise_rows(rows(c), f)
    index = new(9, of=i64)
    yield f"{size} hidden", lambda c=hidden: pool(rows(c), vector(c), 1e-6)
    yield f"{size} cut", lambda c=hidden: pool(rows(c), vector(c), 1e-6, read=index, size=512)
    yield (
        f"{size} hidden",
        lambda c=hidden: score(rows(c), vector(c), 1e-6, new(2, c, of=f32)),
    )
    yield f"{size} hidden", lambda c=hidden: embed(index, new(151936, c, of=dtype))
    yield f"{size} deepstack", lambda c=hidden: add_rows(rows(c), index, rows(c))
    cos = new(9, 64, of=f32)
    yield (
        f"{size} heads",
        lambda h=hidden // 128: norm_rope(new(9, h, 128, of=dtype), vector(128), cos, cos, 1e-6),
    )
    half = new(9, vision_dim // 2, of=f32)
    yield (
        f"{size} vision",
        lambda d=vision_dim: rope(new(9, 16, d, of=dtype), half, half),
    )
    yield (
        f"{size} vision",
        lambda d=vision_dim: vision_rope_tables(new(2, 9, of=i64), d, 1e4),
    )
    yield "all", lambda: mrope_tables(new(3, 9, of=i64), 128, 5e6, (24, 20, 20))


def calls(dtype: torch.dtype) -> Iterator[Case]:
    """Everything that is compiled in ``dtype``, on storageless tensors."""
    for size, hidden, ffn, vision, vision_ffn, vision_dim, kv in (
        ("2b", 2048, 6144, 1024, 4096, 64, 8),
        ("8b", 4096, 12288, 1152, 4304, 72, 8),
    ):
        yield from text_products(size, hidden, ffn, dtype)
        yield from vision_products(size, vision, vision_ffn, dtype)
        yield from attentions(size, hidden // 128, kv, vision_dim, dtype)
        for k in (768, 1536):
            yield (
                f"{size} k={k}",
                lambda c=vision, k=k: patch_embed(
                    new(3000, k, of=torch.uint8),
                    new(c, k, of=dtype),
                    new(c, of=torch.float32),
                    new(2304, c, of=dtype),
                    [(1, 60, 50)],
                    2,
                ),
            )
        yield from row_wise(size, hidden, ffn, vision, vision_dim, dtype)


def record(
    target: str,
) -> Iterator[tuple[str, str, str, Any, tuple[Any, ...], Any, dict[str, Any]]]:
    """(op, dtype, case, kernel, arguments, config, constants) of every different launch."""
    found: list[tuple[Any, ...]] = []

    def keep(
        op: str, kernel: Any, programs: int, *args: Any, config: Any, **constants: Any
    ) -> None:
        found.append((op, kernel, args, config, constants))

    for module in [m for name, m in sys.modules.items() if name.startswith("qvlfast.kernels.")]:
        for attribute, stand_in in (
            ("launch", keep),
            ("target_of", lambda device: target),
            ("require_device", lambda *args: None),
        ):
            if hasattr(module, attribute):
                setattr(module, attribute, stand_in)
    seen = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case, call in calls(dtype):
            # Both 16-bit types make the same code but for the matrix instruction's operands.
            if dtype == torch.float16 and case not in FLOAT16_CASES:
                continue
            found.clear()
            try:
                call()
            except RefusalError:
                if "fp8" in case and target in ("sm_80", "sm_87"):
                    continue
                raise
            for op, kernel, args, config, constants in found:
                key = (kernel.__name__, str(specialise(kernel, args, constants)), config)
                if key not in seen:
                    seen.add(key)
                    name = str(dtype).removeprefix("torch.")
                    yield op, name, case, kernel, args, config, constants


def specialise(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as Triton derives them from the arguments of a launch."""
    signature: dict[str, str] = {}
    values = dict(constants)
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if index >= len(args):
            signature[name] = "constexpr"
            continue
        value = args[index]
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            values[name] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, values, attributes
