"""The emoji pictures that come with the package, with their names in fourteen languages.

Pictures are Noto Color Emoji's, names the Unicode CLDR's; see ``NOTICE``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).parent / "assets"
EMBEDDER = ASSETS / "emoji-embedder"
RERANKER = ASSETS / "emoji-reranker"
SPRITE_SIZE = 96

_SHEET = ASSETS / "emoji-gallery.webp"
_NAMES = ASSETS / "emoji-gallery.json.gz"
_COLUMNS = 40


@dataclass(frozen=True, eq=False)
class Emoji:
    """One emoji.

    Attributes:
        character: the emoji itself.
        names: its short name by language code, such as ``{"en": "pizza", "de": "Pizza"}``.
        sprite: RGBA, 96 pixels wide and high, transparent around the drawing.
        is_featured: whether it is one of the few hundred that are easiest to recognise.
    """

    character: str
    names: Mapping[str, str]
    sprite: Image.Image
    is_featured: bool

    def picture(self, background: str = "white") -> Image.Image:
        """The drawing on a plain background: RGB, 96 pixels wide and high."""
        picture = Image.new("RGB", self.sprite.size, background)
        picture.paste(self.sprite, (0, 0), self.sprite)
        return picture


@cache
def load_gallery() -> tuple[Emoji, ...]:
    """Every emoji of the gallery, in the order of code points."""
    rows = json.loads(gzip.decompress(_NAMES.read_bytes()))
    with Image.open(_SHEET) as file:
        sheet = file.convert("RGBA")
    gallery = []
    for i, (character, names, is_featured) in enumerate(rows):
        left, top = i % _COLUMNS * SPRITE_SIZE, i // _COLUMNS * SPRITE_SIZE
        sprite = sheet.crop((left, top, left + SPRITE_SIZE, top + SPRITE_SIZE))
        gallery.append(Emoji(character, names, sprite, is_featured))
    return tuple(gallery)


def featured() -> tuple[Emoji, ...]:
    """The part of the gallery that is easiest to recognise: food, animals, things, faces."""
    return tuple(emoji for emoji in load_gallery() if emoji.is_featured)


def write_gallery(
    characters: Sequence[str],
    names: Sequence[Mapping[str, str]],
    sprites: Sequence[Image.Image],
    is_featured: Sequence[bool],
) -> None:
    """Write the files that :func:`load_gallery` reads, from RGBA sprites of any size."""
    rows = -(-len(sprites) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE), (0, 0, 0, 0))
    for i, sprite in enumerate(sprites):
        scaled = sprite.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
        sheet.paste(scaled, (i % _COLUMNS * SPRITE_SIZE, i // _COLUMNS * SPRITE_SIZE))
    ASSETS.mkdir(exist_ok=True)
    sheet.save(_SHEET, quality=62, method=6, alpha_quality=60)
    table = [
        [character, dict(own), shown]
        for character, own, shown in zip(characters, names, is_featured, strict=True)
    ]
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":"))
    _NAMES.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
