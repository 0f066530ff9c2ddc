"""The vision tower: uint8 patches in, one vector a visual token (and deepstack level) out."""

from __future__ import annotations

import math
from collections.abc import Generator

import torch
from torch import Tensor

from ..arena import HEAP
from ..batch import VisionBatch, Window
from ..config import VisionConfig
from ..ops import Forest, Ops
from ..weights import Merger, VisionBlock, VisionWeights


def vision_forward(
    ops: Ops, weights: VisionWeights, config: VisionConfig, batch: VisionBatch
) -> Generator[None, None, list[Tensor]]:
    """Run the tower over packed pictures and videos, piece by piece: a block, or a window of one.

    Hidden states change in place; what else a block makes is in a scope of ``ops.memory``. What is
    returned is not in that memory.

    Returns:
        The visual tokens ``[V, out_hidden_size]``, and then for each deepstack level what is added
        to them after the decoder layer of that number, ``[V, out_hidden_size]`` each.
    """
    x = _embed_patches(ops, weights, config, batch)
    cos, sin = ops.vision_rope_tables(batch.positions, config.head_dim, config.rope_theta)
    deepstack = []
    windows = batch.windows or (Window(slice(0, len(x)), batch.forest),)
    for index, block in enumerate(weights.blocks):
        for window in windows:
            at = window.rows
            _block(ops, block, config, window.forest, x[at], cos[at], sin[at])
            if len(windows) > 1:
                yield
        if index in config.deepstack_layers:
            level = config.deepstack_layers.index(index)
            deepstack.append(_merge(ops, weights.deepstack[level], config, x))
        yield
    return [_merge(ops, weights.merger, config, x), *deepstack]


def _embed_patches(
    ops: Ops, weights: VisionWeights, config: VisionConfig, batch: VisionBatch
) -> Tensor:
    pictures, patches = 0, 0
    while patches < len(batch.stills):
        patches += math.prod(batch.grids[pictures])
        pictures += 1
    parts = []
    for pixels, embed, grids in (
        (batch.stills, weights.patch_still, batch.grids[:pictures]),
        (batch.videos, weights.patch_video, batch.grids[pictures:]),
    ):
        if grids:
            merge = config.spatial_merge_size
            parts.append(ops.patch_embed(pixels, embed, weights.positions, grids, merge))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _block(
    ops: Ops,
    block: VisionBlock,
    config: VisionConfig,
    forest: Forest,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """One block for some patches, in place."""
    norm1, norm2 = block.norm1, block.norm2
    with ops.memory.scope():
        normed = ops.layer_norm(x, norm1.weight, norm1.bias, config.norm_eps, rows=block.qkv.rows)
        qkv = ops.linear(normed, block.qkv)
        q, k, v = qkv.view(len(x), 3, config.num_heads, config.head_dim).unbind(1)
        for rotated in (q, k):
            ops.rope(rotated, cos, sin)
        scale = config.head_dim**-0.5
        attended = ops.attention(q, k, v, forest, causal=False, scale=scale)
        ops.add_linear(x, attended.flatten(1), block.proj)
    with ops.memory.scope():
        normed = ops.layer_norm(x, norm2.weight, norm2.bias, config.norm_eps, rows=block.fc1.rows)
        hidden = ops.linear(normed, block.fc1, activation="gelu_tanh")
        ops.add_linear(x, hidden, block.fc2)


def _merge(ops: Ops, merger: Merger, config: VisionConfig, x: Tensor) -> Tensor:
    """Neighbouring patches are adjacent rows, so concatenating them is a view."""
    if merger.norm_merged:
        x = x.view(-1, config.merged_size)
    with ops.memory.scope():
        normed = ops.layer_norm(x, merger.norm.weight, merger.norm.bias, config.norm_eps)
        assert isinstance(normed, Tensor)
        hidden = ops.linear(normed.view(-1, config.merged_size), merger.fc1, activation="gelu_erf")
        return ops.on(HEAP).linear(hidden, merger.fc2)
