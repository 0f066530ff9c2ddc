"""Every launch of a Triton kernel that the 2B and 8B models make, recorded instead of run.

The wrappers get tensors without storage, and what they would launch is kept: so the arguments, the
configs and the constants are those of a real call. Import this where TRITON_INTERPRET is not 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from qvlfast.kernels.activation import gelu_erf, gelu_tanh, swiglu
from qvlfast.kernels.attention import attention
from qvlfast.kernels.embed import embed
from qvlfast.kernels.gemm import linear
from qvlfast.kernels.gemm_int8 import linear_int8, quantise_rows
from qvlfast.kernels.norm import layer_norm, rms_norm
from qvlfast.kernels.patch_embed import patch_embed, resample_positions
from qvlfast.kernels.pool import pool, score
from qvlfast.kernels.rope import mrope_tables, norm_rope, rope, vision_rope_tables

from qvlfast.ops import Forest

PRODUCTS = ("linear", "linear_int8", "patch_embed", "attention")
TOKENS = 705
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def calls(dtype: Any) -> Iterator[tuple[str, Any]]:
    """Name and thunk of every launch that is compiled in ``dtype``, on storageless tensors."""

    def new(*shape: int, of: Any = dtype) -> Any:
        return torch.zeros(shape, dtype=of, device="meta")

    f32, i64 = torch.float32, torch.int64
    for size, hidden, ffn, vision, vision_ffn, vision_dim, kv in (
        ("2b", 2048, 6144, 1024, 4096, 64, 8),
        ("8b", 4096, 12288, 1152, 4304, 72, 8),
    ):
        q_heads = hidden // 128
        for m in (1, 40, 3000):
            yield f"{size} text m={m}", lambda m=m, n=ffn, k=hidden: linear(new(m, k), new(n, k))
        for m in (1, 40, 3000):
            yield (
                f"{size} text m={m}",
                lambda m=m, n=ffn, k=hidden: linear_int8(
                    new(m, k, of=torch.int8),
                    new(m, of=f32),
                    new(n, k, of=torch.int8),
                    new(n, of=f32),
                    dtype=dtype,
                ),
            )
        yield f"{size} ffn", lambda c=ffn: quantise_rows(new(9, c))
        yield (
            f"{size} vision",
            lambda c=vision, n=vision_ffn: linear(new(3000, c), new(n, c), new(n)),
        )
        for kind in ("gelu_tanh", "gelu_erf"):
            yield (
                f"{size} vision {kind}",
                lambda c=vision, n=vision_ffn, kind=kind: linear(
                    new(3000, c), new(n, c), new(n), activation=kind
                ),
            )
        for k in (768, 1536):
            yield (
                f"{size} k={k}",
                lambda c=vision, k=k: patch_embed(
                    new(3000, k, of=torch.uint8), new(c, k), new(c, of=f32), new(3000, c, of=f32)
                ),
            )
        yield f"{size} grid", lambda c=vision: resample_positions(new(2304, c), [(1, 8, 6)], 2)
        yield f"{size} hidden", lambda c=hidden: rms_norm(new(9, c), new(c), 1e-6)
        yield f"{size} vision", lambda c=vision: layer_norm(new(9, c), new(c), new(c), 1e-6)
        yield (
            f"{size} merged",
            lambda c=4 * vision: layer_norm(new(9, c), new(c), new(c), 1e-6),
        )
        yield f"{size} hidden", lambda c=hidden: pool(new(9, c), new(c), 1e-6)
        yield f"{size} hidden", lambda c=hidden: embed(new(9, of=i64), new(151936, c))
        yield f"{size} ffn", lambda c=ffn: swiglu(new(9, c), new(9, c))
        yield f"{size} ffn", lambda c=vision_ffn: gelu_tanh(new(9, c))
        yield f"{size} merged", lambda c=4 * vision: gelu_erf(new(9, c))
        yield (
            f"{size} heads",
            lambda h=q_heads: norm_rope(
                new(9, h, 128), new(128), new(9, 64, of=f32), new(9, 64, of=f32), 1e-6
            ),
        )
        yield (
            f"{size} vision",
            lambda d=vision_dim: rope(
                new(9, 16, d), new(9, d // 2, of=f32), new(9, d // 2, of=f32)
            ),
        )
        yield (
            f"{size} vision",
            lambda d=vision_dim: vision_rope_tables(new(2, 9, of=i64), d, 1e4),
        )
        for label, lengths, heads, kv_heads, dim, read in (
            ("text", [TOKENS], q_heads, kv, 128, None),
            ("text short", [15] * (TOKENS // 15), q_heads, kv, 128, None),
            ("text last token", [TOKENS], q_heads, kv, 128, np.array([TOKENS - 1])),
            ("vision", [TOKENS], 16, 16, vision_dim, None),
        ):
            count = TOKENS if read is None else len(read)
            yield (
                f"{size} {label}",
                lambda count=count, h=heads, hk=kv_heads, d=dim, lengths=lengths, read=read: (
                    attention(
                        new(count, h, d),
                        new(TOKENS, hk, d),
                        new(TOKENS, hk, d),
                        Forest.plain(lengths),
                        causal=True,
                        scale=1.0,
                        read=read,
                    )
                ),
            )
    yield "all", lambda: mrope_tables(new(3, 9, of=i64), 128, 5e6, (24, 20, 20))
    yield "all", lambda: score(new(9, 2048, of=f32), new(2, 2048, of=f32))


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
            found.clear()
            call()
            ((op, kernel, args, config, constants),) = found
            # The row-wise kernels are the same code in both 16-bit types.
            if dtype == torch.float16 and op not in PRODUCTS:
                continue
            key = (kernel.__name__, str(specialise(kernel, args, constants)), config)
            if key not in seen:
                seen.add(key)
                yield op, str(dtype).removeprefix("torch."), case, kernel, args, config, constants


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
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
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
