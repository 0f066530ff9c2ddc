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
class _Part:
    """Tokens that are worked at once.

    Attributes:
        x: ``[N, hidden_size]``, their hidden states, a view where they are not all there is.
        tables: cosines and sines of their positions.
        forest: in which they ask, see :class:`qvlfast.batch.Window`.
        read: which of the forest's tokens they are; None: all that ask in it.
    """

    x: Tensor
    tables: tuple[Tensor, Tensor]
    forest: Forest
    read: NDArray[np.int64] | None = None


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
    """Run the decoder over one batch, piece by piece: a layer, or a part of one for a window.

    Hidden states change in place; what else a layer makes is in a scope of ``ops.memory``.

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
    parts = [_Part(x[w.rows], _at(tables, w.rows), w.forest) for w in windows]
    kept: list[list[KeysValues]] = [[] for _ in keep]
    last = len(weights.layers) - 1
    # After the last layer only the read tokens are looked at, so it computes no others; unless
    # deepstack, which is indexed by token, still has to be added there.
    prune = last >= len(deepstack)
    for index, layer in enumerate(weights.layers):
        past = [segment[index] for segment in resident]
        with ops.memory.scope():
            k, v, normed = yield from _all_keys_values(ops, layer, config, parts, past)
            first = len(k) - len(x)
            for span, layers in zip(keep, kept, strict=True):
                rows = slice(first + span.start, first + span.stop)
                layers.append((_copied(k[rows]), _copied(v[rows])))
            if prune and index == last:
                own = batch.read_rows
                x, normed = x[own], None
                parts = [_Part(x, _at(tables, own), batch.forest, batch.read)]
            for part in parts:
                with ops.memory.scope():
                    _attend(ops, layer, config, part, k, v, normed)
                if len(parts) > 1:
                    yield
        del k, v, normed  # not beside what follows, which takes the most memory
        for part in parts:
            with ops.memory.scope():
                _mix(ops, layer, config, part.x)
            if len(parts) > 1:
                yield
        if index < len(deepstack):
            ops.add_rows(x, batch.visual_index, deepstack[index])
        yield
    read = None if prune else batch.read_rows
    return TextOutput(hidden=x, read=read, kept=tuple(tuple(layers) for layers in kept))


def _at(tables: tuple[Tensor, Tensor], rows: slice | Tensor) -> tuple[Tensor, Tensor]:
    return tables[0][rows], tables[1][rows]


def _copied(x: Tensor) -> Tensor:
    """Not a view, which would keep the whole batch's memory alive."""
    return x.clone(memory_format=torch.contiguous_format)


def _normed(ops: Ops, layer: TextLayer, config: TextConfig, x: Tensor, projection: Linear) -> Rows:
    """The rows of ``x`` as one of the layer's first projections wants them."""
    return ops.rms_norm(x, layer.input_norm, config.norm_eps, rows=projection.rows)


def _all_keys_values(
    ops: Ops,
    layer: TextLayer,
    config: TextConfig,
    parts: Sequence[_Part],
    past: Sequence[KeysValues],
) -> Generator[None, None, tuple[Tensor, Tensor, Rows | None]]:
    """Keys and values ``[P + T, Hk, D]`` of resident segments and then of all parts; and the normed
    rows, if there is one part whose queries want them in the same form."""
    own = None
    if len(parts) == 1:
        own = _normed(ops, layer, config, parts[0].x, layer.kv_proj)
    again = own if layer.q_proj.rows == layer.kv_proj.rows else None
    if own is not None and not past:
        return *_keys_values(ops, layer, config, own, parts[0].tables), again
    x = parts[0].x
    count = sum(len(k) for k, _ in past) + sum(len(part.x) for part in parts)
    shape = (count, config.num_kv_heads, config.head_dim)
    k, v = (ops.memory.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    start = 0

    def put(pair: KeysValues) -> None:
        nonlocal start
        stop = start + len(pair[0])
        k[start:stop], v[start:stop] = pair
        start = stop

    for pair in past:
        put(pair)
    for part in parts:
        with ops.memory.scope():
            rows = own if own is not None else _normed(ops, layer, config, part.x, layer.kv_proj)
            put(_keys_values(ops, layer, config, rows, part.tables))
        if len(parts) > 1:
            yield
    return k, v, again


def _keys_values(
    ops: Ops, layer: TextLayer, config: TextConfig, normed: Rows, tables: tuple[Tensor, Tensor]
) -> KeysValues:
    both = ops.linear(normed, layer.kv_proj).chunk(2, dim=1)
    k, v = (half.unflatten(1, (-1, config.head_dim)) for half in both)
    ops.norm_rope(k, layer.k_norm, *tables, config.norm_eps)
    return k, v


def _attend(
    ops: Ops,
    layer: TextLayer,
    config: TextConfig,
    part: _Part,
    k: Tensor,
    v: Tensor,
    normed: Rows | None,
) -> None:
    """The first half of a layer for some tokens, in place.

    Args:
        normed: their rows as the queries' projection wants them, if they are there already. Those
            of all windows would take as much memory as the hidden states.
    """
    if normed is None:
        normed = _normed(ops, layer, config, part.x, layer.q_proj)
    q = ops.linear(normed, layer.q_proj).unflatten(1, (-1, config.head_dim))
    ops.norm_rope(q, layer.q_norm, *part.tables, config.norm_eps)
    keys, scale = int(part.forest.cu_k[-1]), config.head_dim**-0.5
    attended = ops.attention(
        q, k[:keys], v[:keys], part.forest, causal=True, scale=scale, read=part.read
    )
    ops.add_linear(part.x, attended.flatten(1), layer.o_proj)


def _mix(ops: Ops, layer: TextLayer, config: TextConfig, x: Tensor) -> None:
    """The second half of a layer for some tokens, in place."""
    normed = ops.rms_norm(x, layer.post_norm, config.norm_eps, rows=layer.gate_up_proj.rows)
    hidden = ops.gated_linear(normed, layer.gate_up_proj, rows=layer.down_proj.rows)
    ops.add_linear(x, hidden, layer.down_proj)
