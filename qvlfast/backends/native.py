"""The CPU backend: the ops that cost anything as calls into ``qvlfast._C``.

Weights are packed once, when they are loaded, into the layout that the products read; the C++ side
checks shapes, dtypes and strides, and docs/cpu.md describes the layouts. What is left out runs once
a batch or is a copy, and is the reference's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import dlpack

from .. import _C
from ..arena import HEAP, Memory
from ..ops import Forest, Linear, Ops, QuantisedRows, RowFormat, Rows, Weight
from ..ops.patch_embed import resample_positions
from ..quant import Int4Weight, Int8Weight
from ..quant.weights import quantise

view = dlpack.to_dlpack  # type: ignore[attr-defined]  # public, and missing from its __all__
_STORED = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _maybe(x: Tensor | None) -> object:
    return None if x is None else view(x)


def _prepare(
    parts: Sequence[Weight],
    bias: Tensor | None = None,
    *,
    form: str | None = None,
    group: int = 64,
    weight_only: bool = False,
    gated: bool = False,
) -> Linear:
    if weight_only:
        raise TypeError("this is a bug: the CPU kernels multiply int4 weights by int8 rows only")
    bias = None if bias is None else bias.float().contiguous()
    wide = list(parts)
    if form is not None:
        wide = [quantise(part, form, group) if isinstance(part, Tensor) else part for part in wide]
    tensors = [part for part in wide if isinstance(part, Tensor)]
    fours = [part for part in wide if isinstance(part, Int4Weight)]
    if tensors:
        # A file may hold some of the parts quantised: one layout serves all of them.
        dtype = tensors[0].dtype
        tensors = [w if isinstance(w, Tensor) else w.dequantise().to(dtype) for w in wide]
        packed = _C.pack_floats([view(t) for t in tensors], _STORED[tensors[0].dtype], gated)
        return Linear(packed, bias)
    if len(fours) == len(wide) and len({four.group for four in fours}) == 1:
        triples = [(view(f.packed), view(f.multiplier), view(f.scale)) for f in fours]
        packed = _C.pack_int4(triples, fours[0].group, gated)
    else:
        eights = [part.widen() if isinstance(part, Int4Weight) else part for part in wide]
        pairs = [(view(e.values), view(e.scale)) for e in eights if isinstance(e, Int8Weight)]
        packed = _C.pack_int8(pairs, gated)
    return Linear(packed, bias, "int8")


def _linear(
    x: Rows, layer: Linear, *, activation: str | None = None, memory: Memory = HEAP
) -> Tensor:
    packed = layer.weight
    out = memory.empty((len(x), packed.n // 2 if packed.gated else packed.n), dtype=x.dtype)
    _multiply(x, layer, activation or "none", None, out)
    return out


def _add_linear(y: Tensor, x: Rows, layer: Linear) -> None:
    # A value of y is read as the residual before it is written, by the same thread.
    _multiply(x, layer, "none", y, y)


def _multiply(
    x: Rows, layer: Linear, activation: str, residual: Tensor | None, out: Tensor
) -> None:
    values, scale = (x, None) if isinstance(x, Tensor) else (x.values, x.scale)
    rest = (_maybe(layer.bias), activation, _maybe(residual), view(out))
    _C.gemm(view(values), _maybe(scale), layer.weight, *rest)


def _gated_linear(
    x: Rows, layer: Linear, *, rows: RowFormat = "float", memory: Memory = HEAP
) -> Rows:
    out = _linear(x, layer, activation="swiglu", memory=memory)
    return out if rows == "float" else _quantise(out, memory)


def _quantise(x: Tensor, memory: Memory) -> QuantisedRows:
    rows = _new_rows(x, memory)
    _C.quantise_rows(view(x), view(rows.values), view(rows.scale))
    return rows


def _new_rows(x: Tensor, memory: Memory) -> QuantisedRows:
    values = memory.empty(x.shape, dtype=torch.int8)
    return QuantisedRows(values, memory.empty((len(x),), dtype=torch.float32), x.dtype)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, rows: RowFormat = "float", memory: Memory = HEAP
) -> Rows:
    if rows == "float":
        out = memory.empty(x.shape, dtype=x.dtype)
        _C.rms_norm(view(x), view(weight), eps, view(out))
        return out
    made = _new_rows(x, memory)
    _C.rms_norm_rows(view(x), view(weight), eps, view(made.values), view(made.scale))
    return made


def _layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    rows: RowFormat = "float",
    memory: Memory = HEAP,
) -> Rows:
    out = memory.empty(x.shape, dtype=x.dtype)
    _C.layer_norm(view(x), view(weight), view(bias), eps, view(out))
    return out if rows == "float" else _quantise(out, memory)


def _embed(ids: Tensor, table: Tensor, *, memory: Memory = HEAP) -> Tensor:
    out = memory.empty((len(ids), table.shape[1]), dtype=table.dtype)
    return torch.index_select(table, 0, ids, out=out)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _C.rope(view(x), view(cos), view(sin), view(x))


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    _C.norm_rope(view(x), view(weight), view(cos), view(sin), eps, view(x))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    *,
    causal: bool,
    scale: float,
    read: NDArray[np.int64] | None = None,
    memory: Memory = HEAP,
) -> Tensor:
    out = memory.empty(q.shape, dtype=q.dtype)
    edges = (forest.cu_q, forest.cu_k, forest.parent)
    _C.attention(view(q), view(k), view(v), *edges, causal, scale, read, view(out))
    return out


def _patch_embed(
    pixels: Tensor,
    layer: Linear,
    table: Tensor,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
    *,
    memory: Memory = HEAP,
) -> Tensor:
    dtype = torch.float32 if layer.weight.format == "f32" else torch.bfloat16
    out = memory.empty((len(pixels), layer.weight.n), dtype=dtype)
    positions = resample_positions(table, grids, merge)
    rest = (_maybe(layer.bias), "none", view(positions), view(out))
    _C.gemm(view(pixels), None, layer.weight, *rest)
    return out


def _pool(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    read: Tensor | None = None,
    size: int | None = None,
) -> Tensor:
    rows = len(x) if read is None else len(read)
    out = torch.empty(rows, size or x.shape[1], dtype=torch.float32)
    _C.pool(view(x), _maybe(read), view(weight), eps, size is not None, view(out))
    return out


def _score(
    x: Tensor, weight: Tensor, eps: float, answer_rows: Tensor, *, read: Tensor | None = None
) -> Tensor:
    out = torch.empty(len(x) if read is None else len(read), dtype=torch.float32)
    _C.score(view(x), _maybe(read), view(weight), eps, view(answer_rows), view(out))
    return out


class NativeOps(Ops):
    """The table with the ops that cost anything in C++."""

    name = "native"
    keeps = frozenset({"int8", "int4"})

    allocating = (
        "linear",
        "gated_linear",
        "embed",
        "rms_norm",
        "layer_norm",
        "attention",
        "patch_embed",
    )

    prepare = staticmethod(_prepare)
    linear = staticmethod(_linear)
    add_linear = staticmethod(_add_linear)
    gated_linear = staticmethod(_gated_linear)
    embed = staticmethod(_embed)
    rms_norm = staticmethod(_rms_norm)
    layer_norm = staticmethod(_layer_norm)
    rope = staticmethod(_rope)
    norm_rope = staticmethod(_norm_rope)
    attention = staticmethod(_attention)
    patch_embed = staticmethod(_patch_embed)
    pool = staticmethod(_pool)
    score = staticmethod(_score)
