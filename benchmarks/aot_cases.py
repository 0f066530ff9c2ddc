"""Every launch of a Triton kernel that the 2B and 8B models make, recorded instead of run.

The wrappers get tensors without storage, and what they would launch is kept: so the arguments, the
configs and the constants are those of a real call. Import this where TRITON_INTERPRET is not 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from qvlfast.kernels.attention import attention
from qvlfast.kernels.embed import add_rows, embed
from qvlfast.kernels.gemm import linear, linear_quantised
from qvlfast.kernels.gemm_int4 import Int4Packed, linear_int4
from qvlfast.kernels.gemm_int4_float import linear_int4_float
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
FLOAT16_CASES = (
    "2b o m=1", "2b gate up m=3000", "2b int4_float o m=1", "2b int4_float gate up m=3000",
    "2b text", "2b k=768",
)  # fmt: skip
FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def new(*shape: int, of: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=of, device="meta")


def fours(n: int, k: int) -> Int4Packed:
    """A weight of 4 bits in groups of 64."""
    packed = new(n, k // 2, of=torch.uint8), new(k // 64, n, of=torch.uint8)
    return Int4Packed(*packed, new(n, of=torch.float32), k, 64)


def text_products(
    size: str, hidden: int, ffn: int, dtype: torch.dtype, forms: Sequence[str]
) -> Iterator[str]:
    """q and kv (plain), o and down (onto the residual), gate and up (gated), for all rows."""
    layers = (
        ("q", hidden, hidden, False, False),
        ("o", hidden, hidden, True, False),
        ("down", hidden, ffn, True, False),
        ("gate up", 2 * ffn, hidden, False, True),
    )
    for (name, n, k, onto, gated), m in product(layers, ROWS):
        residual = new(m, n, of=dtype) if onto else None
        x = new(m, k, of=dtype)
        linear(x, new(n, k, of=dtype), residual=residual, gated=gated)
        yield f"{size} {name} m={m}"
        linear_int4_float(x, fours(n, k), residual=residual, gated=gated)
        yield f"{size} int4_float {name} m={m}"
    if dtype != torch.bfloat16:
        return
    for (name, n, k, onto, gated), m, form in product(layers, ROWS, forms):
        residual = new(m, n, of=dtype) if onto else None
        scale = new(n, of=torch.float32)
        values = torch.float8_e4m3fn if form.startswith("fp8") else torch.int8
        rows = new(m, k, of=values), new(m, of=torch.float32)
        if form == "int4":
            linear_int4(*rows, fours(n, k), dtype=dtype, residual=residual, gated=gated)
        else:
            if form == "fp8 blocks":
                scale = new(k // 128, n, of=torch.float32)
            w = new(n, k, of=values)
            linear_quantised(*rows, w, scale, dtype=dtype, residual=residual, gated=gated)
        yield f"{size} {form} {name} m={m}"


def vision_products(
    size: str, hidden: int, ffn: int, dtype: torch.dtype, forms: Sequence[str]
) -> Iterator[str]:
    """qkv, fc1 of blocks and of mergers, proj and fc2; all but the mergers quantised as well."""
    m = 3000
    for name, n, k, kind, onto in (
        ("qkv", 3 * hidden, hidden, "none", False),
        ("fc1", ffn, hidden, "gelu_tanh", False),
        ("merger", 4 * hidden, 4 * hidden, "gelu_erf", False),
        ("fc2", hidden, ffn, "none", True),
    ):
        residual, bias = new(m, n, of=dtype) if onto else None, new(n, of=dtype)
        x, w = new(m, k, of=dtype), new(n, k, of=dtype)
        linear(x, w, bias, activation=kind, residual=residual)
        yield f"{size} vision {name}"
        for form in forms if dtype == torch.bfloat16 and name != "merger" else ():
            if form in FORMS:
                linear_quantised(
                    new(m, k, of=FORMS[form]),
                    new(m, of=torch.float32),
                    new(n, k, of=FORMS[form]),
                    new(n, of=torch.float32),
                    bias,
                    dtype=dtype,
                    activation=kind,
                    residual=residual,
                )
                yield f"{size} {form} vision {name}"


def attentions(
    size: str, heads: int, kv: int, vision_dim: int, dtype: torch.dtype
) -> Iterator[str]:
    for label, lengths, q_heads, kv_heads, dim, read in (
        ("text", [TOKENS], heads, kv, 128, None),
        ("text short", [15] * (TOKENS // 15), heads, kv, 128, None),
        ("text last token", [TOKENS], heads, kv, 128, np.array([TOKENS - 1])),
        ("vision", [TOKENS], 16, 16, vision_dim, None),
    ):
        q = new(TOKENS if read is None else len(read), q_heads, dim, of=dtype)
        keys = new(TOKENS, kv_heads, dim, of=dtype)
        attention(q, keys, keys, Forest.plain(lengths), causal=True, scale=1.0, read=read)
        yield f"{size} {label}"


def row_wise(
    size: str,
    hidden: int,
    ffn: int,
    vision: int,
    vision_dim: int,
    dtype: torch.dtype,
    forms: Sequence[str],
) -> Iterator[str]:
    f32, i64 = torch.float32, torch.int64
    x, weight, index = new(9, hidden, of=dtype), new(hidden, of=dtype), new(9, of=i64)
    patches, norm = new(9, vision, of=dtype), new(vision, of=dtype)
    kinds = [form for form in forms if form in FORMS]
    for form in ("float", *kinds):
        rms_norm(x, weight, 1e-6, form)
        yield f"{size} hidden {form}"
        layer_norm(patches, norm, norm, 1e-6, form)
        yield f"{size} vision {form}"
    merged = new(4 * vision, of=dtype)
    layer_norm(new(9, 4 * vision, of=dtype), merged, merged, 1e-6)
    yield f"{size} merged"
    for form in kinds:
        quantise_rows(new(9, ffn, of=dtype), form)
        yield f"{size} ffn {form}"
    pool(x, weight, 1e-6)
    yield f"{size} hidden"
    pool(x, weight, 1e-6, read=index, size=512)
    yield f"{size} cut"
    score(x, weight, 1e-6, new(2, hidden, of=f32))
    yield f"{size} hidden"
    embed(index, new(151936, hidden, of=dtype))
    yield f"{size} hidden"
    add_rows(x, index, x)
    yield f"{size} deepstack"
    cos = new(9, 64, of=f32)
    norm_rope(new(9, hidden // 128, 128, of=dtype), new(128, of=dtype), cos, cos, 1e-6)
    yield f"{size} heads"
    half = new(9, vision_dim // 2, of=f32)
    rope(new(9, 16, vision_dim, of=dtype), half, half)
    yield f"{size} vision"
    vision_rope_tables(new(2, 9, of=i64), vision_dim, 1e4)
    yield f"{size} vision"
    mrope_tables(new(3, 9, of=i64), 128, 5e6, (24, 20, 20))
    yield "all"


def calls(dtype: torch.dtype, forms: Sequence[str]) -> Iterator[str]:
    """Launch everything that is compiled in ``dtype``, and name each call after it was made."""
    for size, hidden, ffn, vision, vision_ffn, vision_dim, kv in (
        ("2b", 2048, 6144, 1024, 4096, 64, 8),
        ("8b", 4096, 12288, 1152, 4304, 72, 8),
    ):
        yield from text_products(size, hidden, ffn, dtype, forms)
        yield from vision_products(size, vision, vision_ffn, dtype, forms)
        yield from attentions(size, hidden // 128, kv, vision_dim, dtype)
        for k in (768, 1536):
            pixels, weight = new(3000, k, of=torch.uint8), new(vision, k, of=dtype)
            bias, table = new(vision, of=torch.float32), new(2304, vision, of=dtype)
            patch_embed(pixels, weight, bias, table, [(1, 60, 50)], 2)
            yield f"{size} k={k}"
        # In float32, which is there for checking, the wider rows are enough.
        if dtype == torch.bfloat16 or size == "8b":
            yield from row_wise(size, hidden, ffn, vision, vision_dim, dtype, forms)


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
    forms = (
        ["int8", "int4"] if target in ("sm_80", "sm_87") else ["int8", "int4", "fp8", "fp8 blocks"]
    )
    seen = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in calls(dtype, forms if dtype == torch.bfloat16 else []):
            launches, found[:] = list(found), []
            # Both 16-bit types make the same code but for the matrix instruction's operands.
            if dtype == torch.float16 and case not in FLOAT16_CASES:
                continue
            for op, kernel, args, config, constants in launches:
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
