"""The decoder: packed token ids and visual tokens in, hidden states of the read tokens out."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch, Window
from ..cache import KeysValues
from ..config import TextConfig
from ..ops import Forest, Linear, Ops, Rows
from ..weights import TextLayer, TextWeights


@dataclass(frozen=True)
class TextOutput:
    """
    Attributes:
        hidden: ``[R, hidden_size]``: the read tokens before the final norm; or all tokens'.
        read: ``[R]`` int64, the rows of ``hidden`` that were read; None if it has no others.
        kept: for each span asked for, the keys and values of every layer.
    """

    hidden: Tensor
    read: Tensor | None
    kept: tuple[tuple[KeysValues, ...], ...]


def text_forward(
    ops: Ops,
    weights: TextWeights,
    config: TextConfig,
    batch: Batch,
    visual: Tensor | None = None,
    deepstack: Sequence[Tensor] = (),
    resident: Sequence[Sequence[KeysValues]] = (),
    keep: Sequence[slice] = (),
) -> Generator[None, None, TextOutput]:
    """Run the decoder over one batch, piece by piece: a layer, or a window of one.

    Args:
        visual: ``[V, hidden_size]``: replaces the embeddings at ``batch.visual_index``.
        deepstack: level j, ``[V, hidden_size]``, is added there after layer j.
        resident: per resident segment and layer its keys and values; those segments come first
            in ``batch.forest``.
        keep: spans of the computed tokens whose keys and values are wanted, for use as
            ``resident`` in a later batch.
    """
    x = ops.embed(batch.ids, weights.embedding)
    if visual is not None:
        x[batch.visual_index] = visual
    tables = ops.mrope_tables(
        batch.positions, config.head_dim, config.rope_theta, config.mrope_section
    )
    windows = batch.windows or (Window(slice(0, len(x)), batch.forest),)
    kept: list[list[KeysValues]] = [[] for _ in keep]
    last = len(weights.layers) - 1
    # After the last layer only the read tokens are looked at, so it computes no others; unless
    # deepstack, which is indexed by token, still has to be added there.
    prune = last >= len(deepstack)
    for index, layer in enumerate(weights.layers):
        parts = []
        for window in windows:
            normed = _normed(ops, layer, config, x[window.rows], layer.kv_proj)
            parts.append(_keys_values(ops, layer, config, normed, _at(tables, window.rows)))
            if len(windows) > 1:
                yield
        past = [segment[index] for segment in resident]
        k, v = (_joined([pair[i] for pair in (*past, *parts)]) for i in (0, 1))
        first = len(k) - len(x)
        for span, layers in zip(keep, kept, strict=True):
            rows = slice(first + span.start, first + span.stop)
            layers.append((_copied(k[rows]), _copied(v[rows])))
        if prune and index == last:
            own = batch.read_rows
            x = x[own]
            normed = _normed(ops, layer, config, x, layer.q_proj)
            q = _queries(ops, layer, config, normed, _at(tables, own))
            x = _attend_and_mix(ops, layer, config, x, q, k, v, batch.forest, batch.read)
        elif len(windows) == 1:
            if layer.q_proj.rows != layer.kv_proj.rows:
                normed = _normed(ops, layer, config, x, layer.q_proj)
            q = _queries(ops, layer, config, normed, tables)
            del normed  # not beside what follows, which takes the most memory
            x = _attend_and_mix(ops, layer, config, x, q, k, v, batch.forest)
        else:
            # In place: keys and values of the layer are there already, and nothing else of a token
            # is looked at by others. Rows are normed a second time: to keep those of all windows
            # would take as much memory as the hidden states.
            for window in windows:
                here, keys = window.rows, int(window.forest.cu_k[-1])
                normed = _normed(ops, layer, config, x[here], layer.q_proj)
                q = _queries(ops, layer, config, normed, _at(tables, here))
                del normed
                x[here] = _attend_and_mix(
                    ops, layer, config, x[here], q, k[:keys], v[:keys], window.forest
                )
                yield
        if index < len(deepstack):
            ops.add_rows(x, batch.visual_index, deepstack[index])
        yield
    read = None if prune else batch.read_rows
    return TextOutput(hidden=x, read=read, kept=tuple(tuple(layers) for layers in kept))


def _at(tables: tuple[Tensor, Tensor], rows: slice | Tensor) -> tuple[Tensor, Tensor]:
    return tables[0][rows], tables[1][rows]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _copied(x: Tensor) -> Tensor:
    """Not a view, which would keep the whole batch's memory alive."""
    return x.clone(memory_format=torch.contiguous_format)


def _normed(ops: Ops, layer: TextLayer, config: TextConfig, x: Tensor, projection: Linear) -> Rows:
    """The rows of ``x`` as one of the layer's first projections wants them."""
    return ops.rms_norm(x, layer.input_norm, config.norm_eps, rows=projection.rows)


def _keys_values(
    ops: Ops, layer: TextLayer, config: TextConfig, normed: Rows, tables: tuple[Tensor, Tensor]
) -> KeysValues:
    both = ops.linear(normed, layer.kv_proj).chunk(2, dim=1)
    k, v = (half.unflatten(1, (-1, config.head_dim)) for half in both)
    return ops.norm_rope(k, layer.k_norm, *tables, config.norm_eps), v


def _queries(
    ops: Ops, layer: TextLayer, config: TextConfig, normed: Rows, tables: tuple[Tensor, Tensor]
) -> Tensor:
    q = ops.linear(normed, layer.q_proj).unflatten(1, (-1, config.head_dim))
    return ops.norm_rope(q, layer.q_norm, *tables, config.norm_eps)


def _attend_and_mix(
    ops: Ops,
    layer: TextLayer,
    config: TextConfig,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    read: NDArray[np.int64] | None = None,
) -> Tensor:
    """The rest of a layer for some tokens; arguments as in :func:`qvlfast.ops.attention`."""
    scale = config.head_dim**-0.5
    attended = ops.attention(q, k, v, forest, causal=True, scale=scale, read=read)
    x = ops.linear(attended.flatten(1), layer.o_proj, residual=x)
    normed = ops.rms_norm(x, layer.post_norm, config.norm_eps, rows=layer.gate_up_proj.rows)
    hidden = ops.gated_linear(normed, layer.gate_up_proj, rows=layer.down_proj.rows)
    return ops.linear(hidden, layer.down_proj, residual=x)
