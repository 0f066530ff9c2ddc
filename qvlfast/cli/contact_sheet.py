"""One picture of what several queries found: a row a query, the best on the left."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

_LABEL, _CARD, _ROW, _GAP, _MARGIN, _HEAD = 300, 120, 150, 12, 28, 92
_PICTURE = 96
_BACKGROUND, _CARD_COLOUR, _LINE = "#f4f2ee", "#ffffff", "#e2ded6"
_INK, _FAINT, _ACCENT = "#24221f", "#7c776e", "#d9622b"

# Fonts that machines tend to have, for scripts that Pillow's own does not draw.
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts")
_FILES = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "PingFang.ttc", "NotoSans-Regular.ttf",
    "NotoNaskhArabic-Regular.ttf", "DejaVuSans.ttf",
)  # fmt: skip
# Right to left, or shapes that depend on the neighbours: only right with a shaping library.
_SHAPED = ((0x0590, 0x08FF), (0x0900, 0x0DFF), (0x0E00, 0x0FFF))

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """What one query found.

    Attributes:
        title: the query, a text or a picture.
        note: a second, smaller line.
        plain: what is written in place of a title that no font here can draw.
        found: pictures with their scores, best first.
    """

    title: str | Image.Image
    note: str
    plain: str
    found: Sequence[tuple[Image.Image, float]]


def draw(rows: Sequence[Row], heading: str, note: str) -> Image.Image:
    """The sheet, RGB."""
    columns = max(len(row.found) for row in rows)
    width = 2 * _MARGIN + _LABEL + columns * (_CARD + _GAP)
    sheet = Image.new("RGB", (width, _HEAD + len(rows) * _ROW + _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 24), heading, _INK, _font(28))
    pen.text((_MARGIN, 60), note, _FAINT, _font(15))
    for i, row in enumerate(rows):
        top = _HEAD + i * _ROW
        pen.line((_MARGIN, top, width - _MARGIN, top), _LINE)
        _label(sheet, pen, row, top)
        for j, (picture, score) in enumerate(row.found):
            left = _MARGIN + _LABEL + j * (_CARD + _GAP)
            _card(sheet, pen, picture, score, (left, top + 9), best=j == 0)
    return sheet


def _label(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    if isinstance(row.title, Image.Image):
        size = (_PICTURE, _PICTURE)
        sheet.paste(row.title.convert("RGB").resize(size), (_MARGIN, top + 14))
        pen.text((_MARGIN, top + 118), row.note, _FAINT, _font(15))
        return
    font = _font_for(row.title, 22)
    title = row.title if font is not None else row.plain
    font = font or _font(22)
    lines = _wrapped(pen, title, font, _LABEL - _GAP)
    y = top + 62 - 14 * len(lines)
    for line in lines:
        pen.text((_MARGIN, y), line, _INK, font)
        y += 28
    pen.text((_MARGIN, y + 4), row.note, _FAINT, _font(15))


def _card(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    picture: Image.Image,
    score: float,
    corner: tuple[int, int],
    best: bool,
) -> None:
    left, top = corner
    box = (left, top, left + _CARD, top + _ROW - 18)
    outline, weight = (_ACCENT, 3) if best else (_LINE, 1)
    pen.rounded_rectangle(box, 10, _CARD_COLOUR, outline, weight)
    side = (_CARD - _PICTURE) // 2
    sheet.paste(picture.convert("RGB").resize((_PICTURE, _PICTURE)), (left + side, top + 8))
    place = (left + _CARD // 2, top + _PICTURE + 20)
    pen.text(place, f"{score:.3f}", _ACCENT if best else _FAINT, _font(14), anchor="mm")


def _wrapped(pen: ImageDraw.ImageDraw, text: str, font: Font, room: int) -> list[str]:
    """At most three lines, cut where there are spaces and otherwise anywhere."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if not lines[-1] or pen.textlength(joined, font) <= room:
            lines[-1] = joined
        else:
            lines.append(word)
    shown = []
    for line in lines[:3]:
        while pen.textlength(line, font) > room:
            line = f"{line[:-2]}…"
        shown.append(line)
    if len(lines) > 3:
        shown[-1] = f"{shown[-1][:-1]}…"
    return shown


@functools.cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _font_for(text: str, size: int) -> Font | None:
    """A font that has every character of a text, None if there is none here."""
    shaped = any(low <= ord(c) <= high for c in text for low, high in _SHAPED)
    if shaped and not features.check("raqm"):
        return None
    for font in (_font(size), *_system_fonts(size)):
        if all(_has(font, character) for character in text if not character.isspace()):
            return font
    return None


@functools.cache
def _system_fonts(size: int) -> tuple[Font, ...]:
    fonts: list[Font] = []
    for name in _FILES:
        for folder in _FOLDERS:
            for path in Path(folder).rglob(name):
                try:
                    fonts.append(ImageFont.truetype(path, size))
                except OSError:
                    continue
                break
    return tuple(fonts)


def _has(font: Font, character: str) -> bool:
    """Whether the font draws this character as something else than what it lacks."""
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))
