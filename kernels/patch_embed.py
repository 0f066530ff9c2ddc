"""From uint8 pixels to the vision tower's first hidden states.

The pixels stay bytes until they are in registers: no float patch tensor exists. The learned
position grid is resampled where it is added, before the one rounding to the model's dtype, so that
no tensor of positions exists either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

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
    inline,
    launch,
    narrow,
    require_device,
    require_floats,
    require_unit_stride,
    target_of,
    widen,
)
from .configs import GemmConfig, gemm_config, reasoned, row_class


def patch_embed_config(target: str, dtype: torch.dtype, n: int, c: int, k: int) -> GemmConfig:
    """As reasoned for any product, but by pointers, never split, and never more than 64 columns:
    pixels become floats in registers, and the grid's corners are added there; with the wider block
    they do not fit (seen in the machine code)."""
    kind = "float32" if dtype == torch.float32 else "float16"
    if target == "interpreter":
        return gemm_config(kind, target, n, c, k)
    config = reasoned(kind, target, row_class(kind, n))
    return replace(config, n=min(config.n, 64))


@inline
def add_corner(b_acc, p_table, stride_table, o_row, b_share, o_c, m):
    """b_acc ``[BM, BN]`` + rows ``o_row`` of the grid · their shares, both ``[BM]``."""
    p_corner = p_table + o_row.to(tl.int64)[:, None] * stride_table + o_c[None, :]
    return b_acc + widen(tl.load(p_corner, mask=m, other=0.0)) * b_share[:, None]


@triton.jit(do_not_specialize=["N"])
def patch_embed_kernel(
    p_pixels,
    p_weight,
    p_bias,
    p_table,
    p_places,
    p_y,
    N,
    C,
    K,
    stride_pixels,
    stride_weight,
    stride_table,
    SIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: BM patches by BN channels; channels run fastest, so pixels are read from L2."""
    n_c = tl.cdiv(C, BN)
    # [BM], [BN], [BK]
    o_n = ((tl.program_id(0) // n_c) * BM + tl.arange(0, BM)).to(tl.int64)
    o_c = (tl.program_id(0) % n_c) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    # [BM, BK]
    p_x_block = p_pixels + o_n[:, None] * stride_pixels + o_k[None, :]
    # [BK, BN]
    p_w_block = p_weight + o_c[None, :] * stride_weight + o_k[:, None]
    # [BM, BN]
    b_acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(0, K, BK):
        m_k = o_k < K - i_k
        # [BM, BK]
        b_x = tl.load(p_x_block + i_k, mask=(o_n < N)[:, None] & m_k[None, :], other=0)
        # [BK, BN]
        b_w = tl.load(p_w_block + i_k, mask=m_k[:, None] & (o_c < C)[None, :], other=0.0)
        # 0 to 255 are exact in all three types.
        b_acc = dot(narrow(b_x.to(tl.float32), DTYPE), b_w, b_acc)
    # [BM, BN]
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    b_acc += tl.load(p_bias + o_c, mask=o_c < C, other=0.0)[None, :]
    # [BM]: where each patch is in the grid, and the grid's rows and columns around it
    b_down = tl.load(p_places + o_n, mask=o_n < N, other=0.0)
    b_across = tl.load(p_places + N + o_n, mask=o_n < N, other=0.0)
    o_top, o_left = b_down.to(tl.int32), b_across.to(tl.int32)
    b_down, b_across = b_down - o_top, b_across - o_left
    o_bottom, o_right = tl.minimum(o_top + 1, SIDE - 1), tl.minimum(o_left + 1, SIDE - 1)
    b_acc = add_corner(
        b_acc, p_table, stride_table, o_top * SIDE + o_left, (1 - b_down) * (1 - b_across), o_c, m
    )
    b_acc = add_corner(
        b_acc, p_table, stride_table, o_top * SIDE + o_right, (1 - b_down) * b_across, o_c, m
    )
    b_acc = add_corner(
        b_acc, p_table, stride_table, o_bottom * SIDE + o_left, b_down * (1 - b_across), o_c, m
    )
    b_acc = add_corner(
        b_acc, p_table, stride_table, o_bottom * SIDE + o_right, b_down * b_across, o_c, m
    )
    tl.store(p_y + o_n[:, None] * C + o_c[None, :], narrow(b_acc, DTYPE), mask=m)


@lru_cache(maxsize=256)
def _frame_places(height: int, width: int, merge: int, side: int) -> NDArray[np.float32]:
    """Row and column in the grid of each patch of a frame, corners on corners, in merge order."""
    spans = [
        np.arange(n, dtype=np.float32) * np.float32(side - 1) / np.float32(max(n - 1, 1))
        for n in (height, width)
    ]
    places = np.stack(np.meshgrid(*spans, indexing="ij"))
    blocks = places.reshape(2, height // merge, merge, width // merge, merge).swapaxes(2, 3)
    return np.ascontiguousarray(blocks).reshape(2, -1)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    table: Tensor,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
    *,
    config: GemmConfig | None = None,
    new: New = torch.empty,
) -> Tensor:
    """pixels · weightᵀ + bias + the position grid, resampled bilinearly with aligned corners.

    Args:
        pixels: ``[N, K]`` uint8, one flattened patch a row.
        weight: ``[C, K]`` with the pixel normalisation folded in.
        bias: ``[C]`` float32.
        table: ``[side², C]``, row by row, in any float dtype.
        grids: frames (pairs), rows and columns of patches of each picture or video; their patches
            make up ``pixels``. Every frame of a video has the same positions.
        merge: patches come in blocks of ``merge`` × ``merge``.

    Returns:
        ``[N, C]`` in the dtype of ``weight``.

    Raises:
        RefusalError: shapes or dtypes do not fit.
    """
    op = "patch_embed"
    require_floats(op, weight=weight)
    require_floats(op, table=table)
    require_device(op, pixels, weight, bias, table)
    (n, k), c = pixels.shape, len(weight)
    side = round(len(table) ** 0.5)
    if pixels.dtype != torch.uint8:
        raise RefusalError(f"{op}: pixels are {pixels.dtype}, not uint8")
    if bias.shape != (c,) or bias.dtype != torch.float32:
        raise RefusalError(f"{op}: bias {tuple(bias.shape)} {bias.dtype}, not {(c,)} float32")
    if weight.shape != (c, k):
        raise RefusalError(f"{op}: weight {tuple(weight.shape)} for patches of {k} values")
    if table.shape != (side * side, c):
        raise RefusalError(f"{op}: table {tuple(table.shape)} is no square grid of {c} channels")
    for _, h, w in grids:
        if h % merge or w % merge:
            raise RefusalError(f"{op}: {h} × {w} patches are not whole blocks of {merge} × {merge}")
    if (count := sum(t * h * w for t, h, w in grids)) != n:
        raise RefusalError(f"{op}: {n} patches for grids of {count}")
    require_unit_stride(op, pixels=pixels, weight=weight, bias=bias, table=table)
    frames = [np.tile(_frame_places(h, w, merge, side), t) for t, h, w in grids]
    places = np.concatenate([np.empty((2, 0), np.float32), *frames], axis=1)
    config = config or patch_embed_config(target_of(weight.device), weight.dtype, n, c, k)
    out = new((n, c), dtype=weight.dtype, device=weight.device)
    launch(
        op,
        patch_embed_kernel,
        triton.cdiv(n, config.m) * triton.cdiv(c, config.n),
        pixels,
        weight,
        bias,
        table,
        torch.from_numpy(places).to(weight.device),
        out,
        n,
        c,
        k,
        pixels.stride(0),
        weight.stride(0),
        table.stride(0),
        config=config,
        SIDE=side,
        DTYPE=TRITON_DTYPES[weight.dtype],
        BM=config.m,
        BN=config.n,
        BK=config.k,
    )
    return out
