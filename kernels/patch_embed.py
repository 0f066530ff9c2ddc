"""From uint8 pixels to the vision tower's first hidden states.

The pixels stay bytes until they are in registers: no float patch tensor exists. The position rows
are added before the one rounding to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    TRITON_DTYPES,
    RefusalError,
    RowConfig,
    dot,
    launch,
    narrow,
    require_device,
    require_floats,
    require_unit_stride,
    row_config,
    target_of,
    widen,
)
from .gemm import GemmConfig, gemm_config


def patch_embed_config(target: str, dtype: torch.dtype, n: int, c: int, k: int) -> GemmConfig:
    """As for any product, but never 256 columns: pixels become floats in registers, and with the
    wider block they do not fit (seen in the machine code)."""
    config = gemm_config(target, dtype, n, c, k)
    return config if target == "interpreter" else replace(config, n=min(config.n, 128))


@triton.jit(do_not_specialize=["N"])
def patch_embed_kernel(
    p_pixels,
    p_weight,
    p_bias,
    p_positions,
    p_y,
    N,
    C,
    K,
    stride_pixels,
    stride_weight,
    stride_positions,
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
    for i_k in range(0, tl.cdiv(K, BK)):
        m_k = o_k < K - i_k * BK
        # [BM, BK]
        b_x = tl.load(p_x_block, mask=(o_n < N)[:, None] & m_k[None, :], other=0)
        # [BK, BN]
        b_w = tl.load(p_w_block, mask=m_k[:, None] & (o_c < C)[None, :], other=0.0)
        # 0 to 255 are exact in all three types.
        b_acc = dot(narrow(b_x.to(tl.float32), DTYPE), b_w, b_acc)
        p_x_block += BK
        p_w_block += BK
    # [BM, BN]
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    b_acc += tl.load(p_bias + o_c, mask=o_c < C, other=0.0)[None, :]
    p_place = p_positions + o_n[:, None] * stride_positions + o_c[None, :]
    b_acc += tl.load(p_place, mask=m, other=0.0)
    tl.store(p_y + o_n[:, None] * C + o_c[None, :], narrow(b_acc, DTYPE), mask=m)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    *,
    config: GemmConfig | None = None,
) -> Tensor:
    """pixels · weightᵀ + bias + positions.

    Args:
        pixels: ``[N, K]`` uint8, one flattened patch a row.
        weight: ``[C, K]`` with the pixel normalisation folded in.
        bias: ``[C]`` float32.
        positions: ``[N, C]`` float32.

    Returns:
        ``[N, C]`` in the dtype of ``weight``.
    """
    op = "patch_embed"
    require_floats(op, weight=weight)
    require_device(op, pixels, weight, bias, positions)
    (n, k), c = pixels.shape, len(weight)
    if pixels.dtype != torch.uint8:
        raise RefusalError(f"{op}: pixels are {pixels.dtype}, not uint8")
    for name, tensor, shape in (("bias", bias, (c,)), ("positions", positions, (n, c))):
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise RefusalError(
                f"{op}: {name} {tuple(tensor.shape)} {tensor.dtype}, not {shape} float32"
            )
    if weight.shape != (c, k):
        raise RefusalError(f"{op}: weight {tuple(weight.shape)} for patches of {k} values")
    require_unit_stride(op, pixels=pixels, weight=weight, bias=bias, positions=positions)
    config = config or patch_embed_config(target_of(weight.device), weight.dtype, n, c, k)
    out = torch.empty((n, c), dtype=weight.dtype, device=weight.device)
    launch(
        op,
        patch_embed_kernel,
        triton.cdiv(n, config.m) * triton.cdiv(c, config.n),
        pixels,
        weight,
        bias,
        positions,
        out,
        n,
        c,
        k,
        pixels.stride(0),
        weight.stride(0),
        positions.stride(0),
        config=config,
        DTYPE=TRITON_DTYPES[weight.dtype],
        BM=config.m,
        BN=config.n,
        BK=config.k,
    )
    return out


@triton.jit
def resample_kernel(
    p_table,
    p_tiles,
    p_y,
    C,
    stride_table,
    SIDE: tl.constexpr,
    MERGE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: up to BT patches of one picture, in merge order."""
    p_tile = p_tiles + tl.program_id(0) * 5
    # A tile: its first row of y, its first patch within the frame's picture, how many patches the
    # picture or video still has from there, and the frame's height and width in patches.
    i_row, i_first, n_left = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    n_height, n_width = tl.load(p_tile + 3), tl.load(p_tile + 4)
    # [BT]
    o_t = tl.arange(0, BT)
    # [BT]: the patch's place within its frame, then its row and column
    o_patch = (i_first + o_t) % (n_height * n_width)
    o_block, o_in = o_patch // (MERGE * MERGE), o_patch % (MERGE * MERGE)
    n_across = n_width // MERGE
    o_y = (o_block // n_across) * MERGE + o_in // MERGE
    o_x = (o_block % n_across) * MERGE + o_in % MERGE
    # [BT]: where that is in the grid, corners on corners
    b_y = o_y.to(tl.float32) * (SIDE - 1) / tl.maximum(n_height - 1, 1).to(tl.float32)
    b_x = o_x.to(tl.float32) * (SIDE - 1) / tl.maximum(n_width - 1, 1).to(tl.float32)
    o_top, o_left = b_y.to(tl.int32), b_x.to(tl.int32)
    b_down, b_across = (b_y - o_top)[:, None], (b_x - o_left)[:, None]
    o_bottom, o_right = tl.minimum(o_top + 1, SIDE - 1), tl.minimum(o_left + 1, SIDE - 1)
    # [1, BC]
    o_c = tl.arange(0, BC)[None, :]
    # [BT, BC]
    m = (o_t < n_left)[:, None] & (o_c < C)
    p_top = p_table + (o_top * SIDE)[:, None] * stride_table + o_c
    p_bottom = p_table + (o_bottom * SIDE)[:, None] * stride_table + o_c
    o_left, o_right = o_left[:, None] * stride_table, o_right[:, None] * stride_table
    b_sum = widen(tl.load(p_top + o_left, mask=m, other=0.0)) * ((1 - b_down) * (1 - b_across))
    b_sum += widen(tl.load(p_top + o_right, mask=m, other=0.0)) * ((1 - b_down) * b_across)
    b_sum += widen(tl.load(p_bottom + o_left, mask=m, other=0.0)) * (b_down * (1 - b_across))
    b_sum += widen(tl.load(p_bottom + o_right, mask=m, other=0.0)) * (b_down * b_across)
    tl.store(p_y + (i_row + o_t).to(tl.int64)[:, None] * C + o_c, b_sum, mask=m)


def resample_positions(
    table: Tensor,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
    *,
    config: RowConfig | None = None,
) -> Tensor:
    """The learned position grid, resampled bilinearly with aligned corners to each picture.

    Args:
        table: ``[side², C]``, row by row.
        grids: frames (pairs), rows and columns of patches of each picture or video.
        merge: patches come in blocks of ``merge`` × ``merge``.

    Returns:
        ``[sum of t · h · w, C]`` float32; every frame of a video has the same positions.
    """
    op = "resample_positions"
    require_floats(op, table=table)
    require_unit_stride(op, table=table)
    side = round(len(table) ** 0.5)
    if side * side != len(table):
        raise RefusalError(f"{op}: a grid of {len(table)} rows is not square")
    columns = table.shape[1]
    config = config or row_config(target_of(table.device), columns)
    tiles: list[tuple[int, int, int, int, int]] = []
    total = 0
    for t, h, w in grids:
        if h % merge or w % merge:
            raise RefusalError(f"{op}: {h} × {w} patches are not whole blocks of {merge} × {merge}")
        count = t * h * w
        for first in range(0, count, config.rows):
            tiles.append((total + first, first % (h * w), count - first, h, w))
        total += count
    out = torch.empty((total, columns), dtype=torch.float32, device=table.device)
    launch(
        op,
        resample_kernel,
        len(tiles),
        table,
        torch.tensor(tiles, dtype=torch.int32).to(table.device),
        out,
        columns,
        table.stride(0),
        config=config,
        SIDE=side,
        MERGE=merge,
        BT=config.rows,
        BC=config.columns,
    )
    return out
