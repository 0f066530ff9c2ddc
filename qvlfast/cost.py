"""What requests cost, and how much of it a batch may hold. Pure Python.

The unit of work is what the linears of a model's decoder cost for one token.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The most one batch may hold, as predicted. A request over it on its own runs alone.

    Attributes:
        tokens: decoder tokens, visual ones included.
        patches: vision tower patches (four to a visual token).
        work: everything together, see :class:`Rates`.
    """

    tokens: int = 16_384
    patches: int = 16_384
    work: float = math.inf

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.patches < 1 or self.work <= 0:
            raise ValueError(f"a batch budget must be positive, got {self}")

    def scaled(self, factor: float, most: Budget) -> Budget:
        """So many times as much of everything, but at least 1, and no more than ``most``."""
        return Budget(
            min(max(1, int(self.tokens * factor)), most.tokens),
            min(max(1, int(self.patches * factor)), most.patches),
            min(self.work * factor, most.work),
        )


@dataclass(frozen=True)
class Rates:
    """What a model's work is made of, in units of one token through the decoder's linears.

    Attributes:
        pair: a query and a key in the decoder's attention.
        patch: the linears of the vision tower for one patch.
        patch_pair: a query and a key in the tower's attention.
        unit: what the unit itself costs, to compare models that share a device: multiplications.
    """

    pair: float = 0.0
    patch: float = 0.0
    patch_pair: float = 0.0
    unit: float = 1.0

    def text(self, tokens: int, known: int = 0) -> float:
        """Work of a prompt whose first ``known`` tokens are computed anyway."""
        return tokens - known + self.pair * (tokens**2 - known**2) / 2

    def media(self, media: Media) -> float:
        """Work of a picture or video in the tower."""
        return media.patches * (self.patch + self.patch_pair * media.frame)


@dataclass(frozen=True)
class Media:
    """One picture or video: equal ``key``, equal pixels."""

    key: Hashable
    patches: int
    frame: int  # patches of one frame: attention is within it


@dataclass(frozen=True)
class Cost:
    """What a request needs on its own.

    Attributes:
        tokens: of its prompt.
        media: its pictures and videos.
        prefixes: (hash, length) of some of its beginnings, the shortest first. A beginning that
            another request of the batch has as well is not counted again; without any, and
            without equal keys in ``media``, nothing is taken to be shared.
    """

    tokens: int
    media: tuple[Media, ...] = ()
    prefixes: tuple[tuple[int, int], ...] = ()

    @property
    def patches(self) -> int:
        """Of all media."""
        return sum(m.patches for m in self.media)

    def work(self, rates: Rates) -> float:
        """Of a model with these rates."""
        return rates.text(self.tokens) + sum(map(rates.media, self.media))
