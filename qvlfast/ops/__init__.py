"""Every operation of the model: its contract, and its reference in plain torch.

``Ops`` is the table. The forward pass calls nothing else; a backend is a subclass that replaces
entries (:mod:`qvlfast.dispatch` chooses one).
"""

from __future__ import annotations

from .activation import gelu_erf, gelu_tanh, swiglu
from .attention import Forest, attention
from .head import pool, score
from .linear import embed, linear
from .norm import layer_norm, rms_norm
from .patch_embed import patch_embed, resample_positions
from .rope import mrope_tables, norm_rope, rope, vision_rope_tables

__all__ = ["Forest", "Ops"]


class Ops:
    """The reference backend: each op as written in its own file."""

    name = "reference"

    linear = staticmethod(linear)
    embed = staticmethod(embed)
    rms_norm = staticmethod(rms_norm)
    layer_norm = staticmethod(layer_norm)
    gelu_tanh = staticmethod(gelu_tanh)
    gelu_erf = staticmethod(gelu_erf)
    swiglu = staticmethod(swiglu)
    mrope_tables = staticmethod(mrope_tables)
    vision_rope_tables = staticmethod(vision_rope_tables)
    rope = staticmethod(rope)
    norm_rope = staticmethod(norm_rope)
    attention = staticmethod(attention)
    patch_embed = staticmethod(patch_embed)
    resample_positions = staticmethod(resample_positions)
    pool = staticmethod(pool)
    score = staticmethod(score)
