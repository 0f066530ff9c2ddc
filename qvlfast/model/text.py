"""The decoder: packed token ids and visual tokens in, hidden states of the read tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch
from ..config import TextConfig
from ..ops import Ops
from ..weights import TextLayer, TextWeights

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``[tokens, num_kv_heads, head_dim]``."""


@dataclass(frozen=True)
class TextOutput:
    """
    Attributes:
        hidden: ``[R, hidden_size]``: the read tokens before the final norm; or all tokens'.
        read: ``[R]`` int64, the rows of ``hidden`` that were read; None if it has no others.
        keys_values: keys and values of every layer for all computed tokens, when asked for.
    """

    hidden: Tensor
    read: Tensor | None
    keys_values: tuple[KeysValues, ...]


def text_forward(
    ops: Ops,
    weights: TextWeights,
    config: TextConfig,
    batch: Batch,
    visual: Tensor | None = None,
    deepstack: Sequence[Tensor] = (),
    resident: Sequence[KeysValues] = (),
    keep_keys_values: bool = False,
) -> TextOutput:
    """Run the decoder over one batch.

    Args:
        visual: ``[V, hidden_size]``: replaces the embeddings at ``batch.visual_index``.
        deepstack: level j, ``[V, hidden_size]``, is added there after layer j.
        resident: per layer, the keys and values of the batch's resident segments, which come
            first in ``batch.forest``.
        keep_keys_values: return keys and values, for use as ``resident`` in a later batch.
    """
    x = ops.embed(batch.ids, weights.embedding)
    if visual is not None:
        x[batch.visual_index] = visual
    tables = ops.mrope_tables(
        batch.positions, config.head_dim, config.rope_theta, config.mrope_section
    )
    kept: list[KeysValues] = []
    last = len(weights.layers) - 1
    # After the last layer only the read tokens are looked at, so it computes no others; unless
    # deepstack, which is indexed by token, still has to be added there.
    prune = last >= len(deepstack)
    for index, layer in enumerate(weights.layers):
        read = batch.read if prune and index == last else None
        past = resident[index] if resident else None
        x, keys_values = _layer(ops, layer, config, batch, x, tables, past, read)
        if keep_keys_values:
            kept.append(keys_values)
        if index < len(deepstack):
            ops.add_rows(x, batch.visual_index, deepstack[index])
    rows = None if prune else batch.read_rows
    return TextOutput(hidden=x, read=rows, keys_values=tuple(kept))


def _layer(
    ops: Ops,
    layer: TextLayer,
    config: TextConfig,
    batch: Batch,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    past: KeysValues | None,
    read: NDArray[np.int64] | None,
) -> tuple[Tensor, KeysValues]:
    cos, sin = tables
    heads = (-1, config.head_dim)
    normed = ops.rms_norm(x, layer.input_norm, config.norm_eps, rows=layer.kv_proj.rows)
    k, v = (half.unflatten(1, heads) for half in ops.linear(normed, layer.kv_proj).chunk(2, dim=1))
    k = ops.norm_rope(k, layer.k_norm, cos, sin, config.norm_eps)
    if read is not None:
        rows = batch.read_rows
        x, normed, cos, sin = x[rows], normed[rows], cos[rows], sin[rows]
    q = ops.linear(normed, layer.q_proj).unflatten(1, heads)
    q = ops.norm_rope(q, layer.q_norm, cos, sin, config.norm_eps)
    all_k, all_v = (k, v) if past is None else (torch.cat((past[0], k)), torch.cat((past[1], v)))
    scale = config.head_dim**-0.5
    attended = ops.attention(q, all_k, all_v, batch.forest, causal=True, scale=scale, read=read)
    x = ops.linear(attended.flatten(1), layer.o_proj, residual=x)
    normed = ops.rms_norm(x, layer.post_norm, config.norm_eps, rows=layer.gate_up_proj.rows)
    hidden = ops.gated_linear(normed, layer.gate_up_proj, rows=layer.down_proj.rows)
    return ops.linear(hidden, layer.down_proj, residual=x), (k, v)
