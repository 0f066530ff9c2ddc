"""Attention over a forest of segments, of any head size, with grouped heads.

A program holds the queries of a few neighbouring tokens, for all query heads that share one key
head, and walks keys block by block with a running softmax in float32: first its own segment's,
then its parent's, and so on up to the root. So keys are read once for the whole group of heads,
and a shared beginning is neither copied nor masked.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .common import (
    TRITON_DTYPES,
    New,
    RefusalError,
    dot,
    launch,
    narrow,
    require_floats,
    require_unit_stride,
    target_of,
)
from .measured import ATTENTION


class Forest(Protocol):
    """``cu_q`` and ``cu_k`` ``[S + 1]``, ``parent`` ``[S]``, int32, as the ops' contract says."""

    @property
    def cu_q(self) -> NDArray[np.int32]: ...
    @property
    def cu_k(self) -> NDArray[np.int32]: ...
    @property
    def parent(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class AttentionConfig:
    """A program holds ``m`` queries (tokens × heads of a group), and takes ``n`` keys at a time."""

    m: int
    n: int
    warps: int
    stages: int


def attention_config(target: str, dtype: torch.dtype, dim: int, longest: int) -> AttentionConfig:
    """Blocks for heads of ``dim`` values: measured ones if there are any, else by reasoning.

    Args:
        longest: the most queries (tokens × group) that a segment has.

    Queries of 128 × 128 in 16 bits take 32 KB, and 2 stages of 64 keys and values 64 KB: together
    within the 99 KB of the smallest target. Short segments, such as last tokens only, get few
    rows, since rows that are not there cost as much as others. float32 is multiplied from
    registers, which hold 16 queries. With heads of 128 only sm_90, which multiplies from shared
    memory, has the registers for 64 keys at a time (seen in the machine code).
    """
    padded = triton.next_power_of_2(dim)
    rows = min(128, max(16, triton.next_power_of_2(longest)))
    if target == "interpreter":
        return AttentionConfig(rows, 128, warps=4, stages=1)
    if dtype == torch.float32:
        return AttentionConfig(16, 16, warps=8, stages=1)
    if measured := ATTENTION.get((target, padded, rows)):
        return AttentionConfig(*measured.blocks)
    if rows < 64:
        return AttentionConfig(rows, 64, warps=4, stages=2)
    return AttentionConfig(rows, 32 if padded > 64 and target != "sm_90" else 64, warps=8, stages=2)


@dataclass(frozen=True)
class Plan:
    """The forest as the kernel reads it, on its device.

    Attributes:
        tiles: ``[programs, 3]`` int32: segment, first row, rows.
        last: ``[R]`` int32: the last key of its own segment that each row sees.
        cu_k, parent: of the forest.
    """

    tiles: Tensor
    last: Tensor
    cu_k: Tensor
    parent: Tensor


def plan(
    forest: Forest,
    read: NDArray[np.int64] | None,
    tokens: int,
    causal: bool,
    device: torch.device,
) -> Plan:
    """Cut every segment's wanted rows into tiles of up to ``tokens``."""
    cu_q, cu_k = forest.cu_q.astype(np.int64), forest.cu_k.astype(np.int64)
    rows = np.arange(cu_q[-1]) if read is None else read
    owner = np.searchsorted(cu_q, rows, side="right") - 1
    last = np.diff(cu_k)[owner] - 1
    if causal:
        last = last - (cu_q[owner + 1] - 1 - rows)
    tiles: list[tuple[int, int, int]] = []
    starts = np.searchsorted(rows, cu_q)
    for segment in np.flatnonzero(np.diff(starts)):
        first, stop = int(starts[segment]), int(starts[segment + 1])
        tiles += [(int(segment), i, min(tokens, stop - i)) for i in range(first, stop, tokens)]

    def place(values: object) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int32)).to(device)

    return Plan(
        place(tiles if tiles else np.empty((0, 3))), place(last), place(cu_k), place(forest.parent)
    )


# Every layer of a forward pass asks for the same plan. Entries hold what they are named after, so
# that no other object can take its address meanwhile.
_PLANS: dict[tuple[object, ...], tuple[Plan, Forest, NDArray[np.int64] | None]] = {}
_PLANS_LOCK = threading.Lock()


def _plan_of(
    forest: Forest,
    read: NDArray[np.int64] | None,
    tokens: int,
    causal: bool,
    device: torch.device,
) -> Plan:
    key = (id(forest), id(read), tokens, causal, device)
    with _PLANS_LOCK:
        if key not in _PLANS:
            while len(_PLANS) >= 8:
                del _PLANS[next(iter(_PLANS))]
            _PLANS[key] = (plan(forest, read, tokens, causal, device), forest, read)
        return _PLANS[key][0]


@triton.jit
def attention_kernel(
    p_q,
    p_k,
    p_v,
    p_y,
    p_tiles,
    p_last,
    p_cu_k,
    p_parent,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,
    HK: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """One program: a tile's tokens, for the GROUP query heads of one key head.

    ``scale`` includes log2(e): the softmax is taken in powers of two. Strides count in UNIT
    values: what the compiler knows to be multiples of 8, it reads 16 bytes at a time.
    """
    stride_qt, stride_qh = stride_qt * UNIT, stride_qh * UNIT
    stride_kt, stride_kh = stride_kt * UNIT, stride_kh * UNIT
    stride_vt, stride_vh = stride_vt * UNIT, stride_vh * UNIT
    i_h = tl.program_id(0) % HK
    p_tile = p_tiles + (tl.program_id(0) // HK) * 3
    i_segment, i_row, n_rows = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    # [BM]: a query is a token and one of its heads
    o_m = tl.arange(0, BM)
    o_t = (i_row + o_m // GROUP).to(tl.int64)
    o_h = i_h * GROUP + o_m % GROUP
    m_m = o_m < n_rows * GROUP
    # [BD], [BN]
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    m_d = o_d < D
    # [BM, BD]
    m_q = m_m[:, None] & m_d[None, :]
    p_queries = p_q + (o_t * stride_qt + o_h * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_queries, mask=m_q, other=0.0)
    # [BM]: the last own key each sees; beyond the tile's end none of them matters
    b_last = tl.load(p_last + o_t, mask=m_m, other=0)
    # [BM]
    b_max = tl.full((BM,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BM,), dtype=tl.float32)
    # [BM, BD]
    b_acc = tl.zeros((BM, BD), dtype=tl.float32)
    # Rows rise, so the last one sees most.
    n_keys = tl.load(p_last + i_row + n_rows - 1) + 1
    while i_segment >= 0:
        i_first = tl.load(p_cu_k + i_segment).to(tl.int64)
        p_k_head = p_k + i_first * stride_kt + i_h * stride_kh
        p_v_head = p_v + i_first * stride_vt + i_h * stride_vh
        for i_n in range(0, n_keys, BN):
            # [BN]
            o_key = i_n + o_n
            m_n = o_key < n_keys
            # [BD, BN]
            p_keys = p_k_head + o_key.to(tl.int64)[None, :] * stride_kt + o_d[:, None]
            b_k = tl.load(p_keys, mask=m_d[:, None] & m_n[None, :], other=0.0)
            # [BM, BN]
            b_s = dot(b_q, b_k, tl.zeros((BM, BN), dtype=tl.float32)) * scale
            m_seen = m_n[None, :] & (o_key[None, :] <= b_last[:, None])
            b_s = tl.where(m_seen, b_s, float("-inf"))
            # [BM]: a row that has seen nothing yet keeps a finite maximum
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_shrink = tl.exp2(b_max - b_safe)
            # [BM, BN]
            b_p = tl.exp2(b_s - b_safe[:, None])
            b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
            b_max = b_new
            # [BN, BD]
            p_values = p_v_head + o_key.to(tl.int64)[:, None] * stride_vt + o_d[None, :]
            b_v = tl.load(p_values, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_acc = dot(narrow(b_p, DTYPE), b_v, b_acc * b_shrink[:, None])
        # Of its ancestors a token sees all.
        i_segment = tl.load(p_parent + i_segment)
        i_above = tl.maximum(i_segment, 0)
        n_keys = tl.load(p_cu_k + i_above + 1) - tl.load(p_cu_k + i_above)
        b_last = tl.full((BM,), 2147483647, dtype=tl.int32)
    b_y = b_acc / b_sum[:, None]
    # [BM, BD]
    p_out = p_y + (o_t * (HK * GROUP) + o_h)[:, None] * D + o_d[None, :]
    tl.store(p_out, narrow(b_y, DTYPE), mask=m_q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    *,
    causal: bool,
    scale: float,
    read: NDArray[np.int64] | None = None,
    config: AttentionConfig | None = None,
    new: New = torch.empty,
) -> Tensor:
    """softmax(scale · q kᵀ) v, each token over its ancestors' tokens and its own segment's.

    Args:
        q: ``[cu_q[S], Hq, D]``, or ``[R, Hq, D]`` with ``read``; float32, float16 or bfloat16.
        k, v: ``[cu_k[S], Hk, D]``; Hq is a multiple of Hk. Tokens and heads of all three may be
            apart.
        causal: within its own segment a token sees itself and the tokens before it; otherwise
            the whole segment. It sees all of its ancestors either way.
        read: ``[R]`` rising indices into the queries' tokens: only these are wanted.

    Returns:
        The shape and dtype of ``q``, contiguous.

    Raises:
        RefusalError: shapes do not fit each other or the forest, or dtypes differ.
    """
    require_floats("attention", q=q, k=k, v=v)
    require_unit_stride("attention", q=q, k=k, v=v)
    rows = int(forest.cu_q[-1]) if read is None else len(read)
    heads, dim = q.shape[1:]
    if k.shape != v.shape or k.shape[2] != dim or heads % k.shape[1]:
        raise RefusalError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "k and v must be alike, heads of one size, and Hq a multiple of Hk"
        )
    if len(q) != rows or len(k) != forest.cu_k[-1]:
        raise RefusalError(
            f"attention: {len(q)} queries and {len(k)} keys, "
            f"the forest has {rows} and {int(forest.cu_k[-1])}"
        )
    if dim > 256:
        raise RefusalError(f"attention: heads of {dim} values, at most 256 fit")
    group = heads // k.shape[1]
    if config is None:
        longest = int(np.diff(forest.cu_q).max(initial=0)) if read is None else 1
        config = attention_config(target_of(q.device), q.dtype, dim, longest * group)
    if config.m < group:
        raise RefusalError(
            f"attention: {group} query heads a key head, blocks have {config.m} rows"
        )
    planned = _plan_of(forest, read, config.m // group, causal, q.device)
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 1)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    out = new(q.shape, dtype=q.dtype, device=q.device)
    launch(
        "attention",
        attention_kernel,
        len(planned.tiles) * k.shape[1],
        q,
        k,
        v,
        out,
        planned.tiles,
        planned.last,
        planned.cu_k,
        planned.parent,
        *(stride // unit for stride in strides),
        scale * 1.4426950408889634,
        config=config,
        HK=k.shape[1],
        GROUP=group,
        D=dim,
        UNIT=unit,
        DTYPE=TRITON_DTYPES[q.dtype],
        BM=config.m,
        BN=config.n,
        BD=max(16, triton.next_power_of_2(dim)),
    )
    return out
