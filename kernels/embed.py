"""The lookup of token embeddings, and what is added to some of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPES,
    New,
    RefusalError,
    RowConfig,
    launch,
    narrow,
    require_device,
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)


@triton.jit(do_not_specialize=["T"])
def embed_kernel(
    p_ids, p_table, p_y, T, V, C, stride_ids, stride_table, BT: tl.constexpr, BC: tl.constexpr
):
    """One program: BT rows, whole. An id outside the table gives a row of NaN."""
    # [BT]
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    # [BT]
    b_id = tl.load(p_ids + o_t.to(tl.int64) * stride_ids, mask=o_t < T, other=-1).to(tl.int64)
    m_id = (b_id >= 0) & (b_id < V)
    # [BT, BC]
    m = m_id[:, None] & (o_c < C)
    b_y = tl.load(p_table + b_id[:, None] * stride_table + o_c, mask=m, other=float("nan"))
    p_out = p_y + o_t.to(tl.int64)[:, None] * C + o_c
    tl.store(p_out, b_y, mask=(o_t < T)[:, None] & (o_c < C))


def embed(
    ids: Tensor, table: Tensor, *, config: RowConfig | None = None, new: New = torch.empty
) -> Tensor:
    """Rows of ``table`` ``[V, C]`` at ``ids`` ``[T]`` int32 or int64; ``[T, C]``.

    An id outside the table gives a row of NaN: to refuse it would make the host wait for the
    device.

    Raises:
        RefusalError: ids of another type, or a table of no float type.
    """
    require_floats("embed", table=table)
    require_device("embed", ids, table)
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1:
        raise RefusalError(f"embed: ids are {ids.dtype} {tuple(ids.shape)}, not int32 or int64 [T]")
    require_unit_stride("embed", table=table)
    out = new((len(ids), table.shape[1]), dtype=table.dtype, device=table.device)
    config = config or row_config(target_of(table.device), table.shape[1])
    launch(
        "embed",
        embed_kernel,
        triton.cdiv(len(ids), config.rows),
        ids,
        table,
        out,
        len(ids),
        len(table),
        table.shape[1],
        ids.stride(0),
        table.stride(0),
        config=config,
        BT=config.rows,
        BC=config.columns,
    )
    return out


@triton.jit(do_not_specialize=["V"])
def add_rows_kernel(
    p_x,
    p_index,
    p_rows,
    V,
    C,
    stride_x,
    stride_rows,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BT rows, whole."""
    # [BT]
    o_v = tl.program_id(0) * BT + tl.arange(0, BT)
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    # [BT, BC]
    m = (o_v < V)[:, None] & (o_c < C)
    # [BT]
    b_index = tl.load(p_index + o_v, mask=o_v < V, other=0).to(tl.int64)
    # [BT, BC]
    p_place = p_x + b_index[:, None] * stride_x + o_c
    p_added = p_rows + o_v.to(tl.int64)[:, None] * stride_rows + o_c
    b_x = widen(tl.load(p_place, mask=m, other=0.0))
    b_x += widen(tl.load(p_added, mask=m, other=0.0))
    tl.store(p_place, narrow(b_x, DTYPE), mask=m)


def add_rows(x: Tensor, index: Tensor, rows: Tensor, *, config: RowConfig | None = None) -> None:
    """``x[index] += rows``, in place: deepstack's addition at the visual tokens.

    Args:
        x: ``[T, C]``, float32, float16 or bfloat16.
        index: ``[V]`` int32 or int64 rows of ``x``, none of them twice.
        rows: ``[V, C]``, the dtype of ``x``.

    Raises:
        RefusalError: shapes or dtypes do not fit.
    """
    op = "add_rows"
    require_floats(op, x=x, rows=rows)
    require_device(op, x, index)
    if index.dtype not in (torch.int32, torch.int64) or not index.is_contiguous():
        raise RefusalError(f"{op}: index is {index.dtype}, not contiguous int32 or int64")
    if x.dim() != 2 or rows.shape != (len(index), x.shape[1]):
        raise RefusalError(
            f"{op}: rows {tuple(rows.shape)} at {len(index)} places of x {tuple(x.shape)}"
        )
    require_unit_stride(op, x=x, rows=rows)
    config = config or row_config(target_of(x.device), x.shape[1])
    launch(
        op,
        add_rows_kernel,
        triton.cdiv(len(rows), config.rows),
        x,
        index,
        rows,
        len(rows),
        x.shape[1],
        x.stride(0),
        rows.stride(0),
        config=config,
        DTYPE=TRITON_DTYPES[x.dtype],
        BT=config.rows,
        BC=config.columns,
    )
