"""Every operation of the model: its contract, and its reference in plain torch.

``Ops`` is the table. The forward pass calls nothing else; a backend is a subclass that replaces
entries (:mod:`qvlfast.dispatch` chooses one).
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from functools import partial
from typing import ClassVar, TypeVar

from ..arena import HEAP, Memory
from .attention import Forest, attention
from .head import pool, score
from .linear import Linear, Weight, add_linear, embed, gated_linear, linear, prepare
from .norm import layer_norm, rms_norm
from .patch_embed import patch_embed
from .rope import mrope_tables, norm_rope, rope, vision_rope_tables
from .rows import QuantisedRows, RowFormat, Rows, add_rows

__all__ = ["Forest", "Linear", "Ops", "QuantisedRows", "RowFormat", "Rows", "Weight"]

_Table = TypeVar("_Table", bound="Ops")


class Ops:
    """The reference backend: each op as written in its own file."""

    name = "reference"
    keeps: frozenset[str] = frozenset({"int8", "int4", "fp8"})
    """Formats of stored weights that ``prepare`` takes as they are; loading widens the others."""
    memory: Memory = HEAP
    """What results are put in."""
    allocating: ClassVar[Collection[str]] = ()
    """The entries that take a ``memory``; those of others come from the heap."""

    def on(self: _Table, memory: Memory) -> _Table:
        """The same table with results in ``memory``."""
        table = copy(self)
        table.memory = memory
        for name in self.allocating:
            setattr(table, name, partial(getattr(type(self), name), memory=memory))
        return table

    prepare = staticmethod(prepare)
    linear = staticmethod(linear)
    add_linear = staticmethod(add_linear)
    gated_linear = staticmethod(gated_linear)
    embed = staticmethod(embed)
    rms_norm = staticmethod(rms_norm)
    layer_norm = staticmethod(layer_norm)
    mrope_tables = staticmethod(mrope_tables)
    vision_rope_tables = staticmethod(vision_rope_tables)
    rope = staticmethod(rope)
    norm_rope = staticmethod(norm_rope)
    attention = staticmethod(attention)
    patch_embed = staticmethod(patch_embed)
    add_rows = staticmethod(add_rows)
    pool = staticmethod(pool)
    score = staticmethod(score)
