"""What the two small models are trained and judged on: emoji pictures and words for them.

Names come from the PyPI package ``emoji`` and, with keywords, from Debian's
``unicode-cldr-core``; pictures from Debian's ``fonts-noto-color-emoji``. Only training needs the
three: the package ships the pictures, and ``benchmarks/data`` the queries of the evaluation.

    python -m benchmarks.emoji_data      # writes the shipped gallery and the evaluation's queries
"""

from __future__ import annotations

import gzip
import json
import random
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LANGUAGES = (
    "en", "de", "es", "fr", "it", "pt", "tr", "id", "ru", "ar", "fa", "zh", "ja", "ko",
)  # fmt: skip
CLDR = Path("/usr/share/unicode/cldr/common")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EVALUATION = Path(__file__).parent / "data" / "emoji_eval.json.gz"

SEED = 20260701
# CLDR 41 has words for every emoji up to this version.
NEWEST_EMOJI = 14
# A keyword of more emoji than this says nothing about any of them ("face").
MAX_TARGETS = 12
# So many relevant pictures at most, or a query is too easy to answer.
MAX_QUERY_TARGETS = 3
PAIR_SHARE = 0.04
KEYWORD_SHARE = 0.06
SEEN_QUERIES = 2000
FEATURED = 400
# Arrows, clock faces, zodiac signs, letters and other marks in a box: code points, both inclusive.
_SIGNS = (
    (0x0023, 0x2319), (0x2329, 0x23EF), (0x23F4, 0x25FF), (0x2648, 0x2653), (0x267E, 0x267F),
    (0x26AA, 0x26AB), (0x2714, 0x2716), (0x2733, 0x2734), (0x2747, 0x2757), (0x2795, 0x27BF),
    (0x2900, 0x2B1F), (0x2B55, 0x32FF), (0x1F170, 0x1F251), (0x1F500, 0x1F506), (0x1F519, 0x1F524),
    (0x1F52F, 0x1F53D), (0x1F550, 0x1F567), (0x1F6AD, 0x1F6B1), (0x1F6B3, 0x1F6B3),
    (0x1F6B7, 0x1F6B8), (0x1F6B9, 0x1F6BA), (0x1F6C2, 0x1F6C5),
)  # fmt: skip
_FAVOURITES = frozenset(
    "🍕🐶🎸🍉🐙🍌🐱🚗🌻🐘🎈🎂🏠🚀🦁🐬🍓🍄🎻🐢🌈🔥🔑🐝🦋🐧☂☀⛄🌵🐼🐷🐸🍍🍇🥕🥐🧀🍩☕🍷👑💎🎩👟👓📚✂🔔🧸🚂🚁⛵⚓🎹🥁🎨⚽🎾🏹🕷🦖🦉🐌"
)
# People and their hands, stationery, signs of traffic, discs: too alike at a glance.
_UNFEATURED = (
    (0x231A, 0x26BC), (0x26CE, 0x27BF), (0x1F400, 0x1F400), (0x1F440, 0x1F450), (0x1F464, 0x1F47A),
    (0x1F481, 0x1F487), (0x1F4AA, 0x1F4B1), (0x1F4BE, 0x1F4F6), (0x1F500, 0x1F5FA),
    (0x1F645, 0x1F64F), (0x1F6A9, 0x1F6AF), (0x1F7E0, 0x1F7EB), (0x1F910, 0x1F91F),
    (0x1F926, 0x1F94F), (0x1F9B0, 0x1F9DF),
)  # fmt: skip
_SKIN_TONES = frozenset("🏻🏼🏽🏾🏿")
_DIRECTION_MARKS = "\u200e\u200f\u202a\u202b\u202c"
_WORD = re.compile(r"\w+")
_FONT_SIZE = 109  # the one size of the font's bitmaps
_BITMAP = 136


@dataclass(frozen=True)
class Wording:
    """One thing that people of one language call some emoji.

    Attributes:
        targets: indices of the emoji, ascending.
        is_name: whether it is the name of at least one of them, not only a keyword.
    """

    language: str
    text: str
    targets: tuple[int, ...]
    is_name: bool


@dataclass(frozen=True)
class Splits:
    """Wordings for training, and those that training never sees.

    ``seen`` is a sample of ``train``; no text of ``unseen`` or ``pairs`` is in ``train``, in any
    language. Every word of a text in ``unseen`` occurs in another text of the same language in
    ``train``; of those in ``pairs`` all that one language says about an emoji was taken away.
    """

    train: tuple[Wording, ...]
    seen: tuple[Wording, ...]
    unseen: tuple[Wording, ...]
    pairs: tuple[Wording, ...]


class MissingSourceError(RuntimeError):
    """A package with the raw data is not installed."""


def list_emoji() -> list[str]:
    """Every emoji of the gallery, by code points: no skin tones, genders, flags, signs.

    Raises:
        MissingSourceError: the package ``emoji`` is not installed.
    """
    data = _emoji_package().EMOJI_DATA
    return sorted(c for c, entry in data.items() if _is_wanted(c, entry))


def _emoji_package() -> Any:
    try:
        import emoji
    except ModuleNotFoundError:
        raise MissingSourceError("the PyPI package `emoji` is missing: pip install emoji") from None
    emoji.config.load_language()
    return emoji


def _is_wanted(character: str, entry: dict[str, Any]) -> bool:
    if entry["status"] != 2 or entry["E"] > NEWEST_EMOJI or _SKIN_TONES & set(character):
        return False
    if any(first <= ord(character[0]) <= last for first, last in _SIGNS):
        return False
    country = 0x1F1E6 <= ord(character[0]) <= 0x1F1FF
    if country or "\U000e007f" in character or "\u20e3" in character:
        return False
    bare = character.replace("\ufe0f", "")
    return "\u200d" not in bare or (bare[-1] not in "♂♀" and bare[0] not in "👨👩👦👧")


def choose_featured(emoji: Sequence[str]) -> list[bool]:
    """Which emoji a small gallery shows: long-known ones of one code point, without people and
    office supplies, evenly thinned out, and all the favourites."""
    data = _emoji_package().EMOJI_DATA
    known = [
        i
        for i, character in enumerate(emoji)
        if len(character.replace("\ufe0f", "")) == 1
        and data[character]["E"] <= 5
        and not any(first <= ord(character[0]) <= last for first, last in _UNFEATURED)
    ]
    chosen = {
        i for i, character in enumerate(emoji) if character.replace("\ufe0f", "") in _FAVOURITES
    }
    rest = [i for i in known if i not in chosen]
    count = min(FEATURED - len(chosen), len(rest))
    chosen |= {rest[i * len(rest) // count] for i in range(count)}
    return [i in chosen for i in range(len(emoji))]


def read_names(emoji: Sequence[str]) -> list[dict[str, str]]:
    """For each emoji its short name in each language.

    Raises:
        MissingSourceError: a source is not installed.
    """
    names: list[dict[str, str]] = [{} for _ in emoji]
    for language, index, text, kind in _annotations(emoji):
        if kind == "tts":
            names[index].setdefault(language, text.strip(_DIRECTION_MARKS))
    return names


def read_wordings(emoji: Sequence[str]) -> list[Wording]:
    """Everything the sources call these emoji, without keywords that fit too many.

    Raises:
        MissingSourceError: a source is not installed.
    """
    found: dict[tuple[str, str], dict[int, bool]] = defaultdict(dict)
    for language, index, text, kind in _annotations(emoji):
        is_name = kind != "keyword"
        entry = found[language, text]
        entry[index] = entry.get(index, False) or is_name
    return [
        Wording(language, text, tuple(sorted(targets)), any(targets.values()))
        for (language, text), targets in sorted(found.items())
        if len(targets) <= MAX_TARGETS
    ]


def _annotations(emoji: Sequence[str]) -> Iterator[tuple[str, int, str, str]]:
    """(language, index, text, kind): CLDR's ``tts`` and ``keyword``, the package's ``name``."""
    package = _emoji_package()
    index = {character.replace("\ufe0f", ""): i for i, character in enumerate(emoji)}
    for language in LANGUAGES:
        for folder in ("annotations", "annotationsDerived"):
            path = CLDR / folder / f"{language}.xml"
            if not path.exists():
                raise MissingSourceError(f"{path} is missing: apt-get install unicode-cldr-core")
            for node in ET.parse(path).getroot().iter("annotation"):
                i = index.get(node.get("cp", ""))
                if i is None or not node.text or node.text.strip() == "↑↑↑":
                    continue
                kind = "tts" if node.get("type") == "tts" else "keyword"
                for part in node.text.split("|") if kind == "keyword" else [node.text]:
                    yield language, i, _clean(part), kind
        for i, character in enumerate(emoji):
            name = package.EMOJI_DATA[character].get(language)
            if name:
                yield language, i, _clean(name.strip(":").replace("_", " ")), "name"


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def split_wordings(wordings: Sequence[Wording], seed: int = SEED) -> Splits:
    """Divide wordings into training and evaluation; see :class:`Splits`."""
    rng = random.Random(seed)
    pairs = sorted({(w.language, t) for w in wordings for t in w.targets})
    held_pairs = {pair for pair in pairs if rng.random() < PAIR_SHARE}
    train = [w for w in (_without(w, held_pairs) for w in wordings) if w is not None]

    uses: dict[tuple[str, str], int] = defaultdict(int)
    for w in train:
        for word in words(w):
            uses[w.language, word] += 1
    held: set[str] = set()
    unseen: list[Wording] = []
    candidates = [w for w in train if not w.is_name and len(w.targets) <= MAX_QUERY_TARGETS]
    names = {w.text.casefold() for w in train if w.is_name}
    rng.shuffle(candidates)
    limit = int(KEYWORD_SHARE * len(candidates))
    for w in candidates:
        key, parts = w.text.casefold(), words(w)
        known = parts and all(uses[w.language, part] > 1 for part in parts)
        if len(unseen) < limit and known and key not in names and key not in held:
            held.add(key)
            unseen.append(w)
            for part in parts:
                uses[w.language, part] -= 1
    train = [w for w in train if w.text.casefold() not in held]
    # What another language took away may have been the last use of a word.
    known_words = {(w.language, part) for w in train for part in words(w)}
    unseen = [w for w in unseen if all((w.language, part) in known_words for part in words(w))]

    taken = held | {w.text.casefold() for w in train}
    hidden = [
        w
        for w in wordings
        if w.is_name
        and w.text.casefold() not in taken
        and any((w.language, t) in held_pairs for t in w.targets)
    ]
    easy = [w for w in train if len(w.targets) <= MAX_QUERY_TARGETS]
    seen = rng.sample(easy, min(SEEN_QUERIES, len(easy)))
    # An answer is right for whatever the language calls so, held-out pairs included.
    whole = {(w.language, w.text): w for w in wordings}
    seen, unseen = ([whole[w.language, w.text] for w in group] for group in (seen, unseen))
    trained = {w.text.casefold() for w in train}
    unseen, hidden = ([w for w in g if not _is_joined(w.text, trained)] for g in (unseen, hidden))
    return Splits(tuple(train), tuple(seen), tuple(unseen), tuple(hidden))


def _is_joined(text: str, trained: set[str]) -> bool:
    """Whether a text is two of training's, which training also shows joined by a space."""
    parts = text.casefold().split(" ")
    return any(
        " ".join(parts[:i]) in trained and " ".join(parts[i:]) in trained
        for i in range(1, len(parts))
    )


def words(wording: Wording) -> set[str]:
    """The words of a text; in Chinese and Japanese, its characters."""
    found = _WORD.findall(wording.text.casefold())
    return set("".join(found)) if wording.language in ("ja", "zh") else set(found)


def _without(w: Wording, held: set[tuple[str, int]]) -> Wording | None:
    kept = tuple(t for t in w.targets if (w.language, t) not in held)
    return Wording(w.language, w.text, kept, w.is_name) if kept else None


def draw_sprites(emoji: Sequence[str]) -> list[Image.Image]:
    """The font's own bitmap of each emoji, RGBA, 136 pixels wide and high.

    Raises:
        MissingSourceError: the font is not installed, or Pillow cannot shape text.
    """
    from PIL import features

    if not FONT.exists():
        raise MissingSourceError(f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
    if not features.check("raqm"):
        raise MissingSourceError("this Pillow has no raqm, which joined emoji need: use its wheel")
    font = ImageFont.truetype(str(FONT), _FONT_SIZE)
    sprites = []
    for character in emoji:
        wide = Image.new("RGBA", (2 * _BITMAP, 2 * _BITMAP), (0, 0, 0, 0))
        ImageDraw.Draw(wide).text((8, 8), character, font=font, embedded_color=True)
        left, top, right, bottom = wide.getbbox() or (0, 0, 0, 0)
        if not 0 < right - left <= _BITMAP:
            raise MissingSourceError(f"{FONT} draws {character!r} in pieces: use a newer one")
        sprite = Image.new("RGBA", (_BITMAP, _BITMAP), (0, 0, 0, 0))
        corner = ((_BITMAP - right + left) // 2, (_BITMAP - bottom + top) // 2)
        sprite.paste(wide.crop((left, top, right, bottom)), corner)
        sprites.append(sprite)
    return sprites


def render(
    sprite: Image.Image, canvas: int, rng: random.Random, variety: float = 1.0
) -> Image.Image:
    """A picture of one emoji at a random size and place on a random background.

    Args:
        variety: from 0, where the emoji fills a white picture, to 1.

    Returns:
        RGB, ``canvas`` pixels wide and high.
    """
    side = round(canvas * rng.uniform(1.0 - 0.28 * variety, 1.0))
    picture = _background(canvas, rng)
    if variety < 1.0:
        picture = Image.blend(Image.new("RGB", picture.size, "white"), picture, variety)
    scaled = sprite.resize((side, side), Image.Resampling.BICUBIC)
    corner = (rng.randint(0, canvas - side), rng.randint(0, canvas - side))
    picture.paste(scaled, corner, scaled)
    return picture


def _background(canvas: int, rng: random.Random) -> Image.Image:
    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGB", (canvas, canvas), "white")
    first = _colour(rng)
    if kind < 0.75:
        return Image.new("RGB", (canvas, canvas), first)
    if kind < 0.9:  # two colours that fade into each other
        pair = Image.new("RGB", (1, 2))
        pair.putdata([first, _colour(rng)])
        return pair.resize((canvas, canvas), Image.Resampling.BILINEAR)
    noise = np.frombuffer(rng.randbytes(6 * 6 * 3), np.uint8).reshape(6, 6, 3)
    return Image.fromarray(noise).resize((canvas, canvas), Image.Resampling.BICUBIC)


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def write_evaluation(splits: Splits, path: Path = EVALUATION) -> None:
    """Write the queries of the evaluation, the same bytes for the same splits."""
    document = {
        group: [[w.language, w.text, list(w.targets), w.is_name] for w in getattr(splits, group)]
        for group in ("seen", "unseen", "pairs")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def read_evaluation(path: Path = EVALUATION) -> dict[str, list[Wording]]:
    """The queries of the evaluation by group: ``seen``, ``unseen`` and ``pairs``."""
    document = json.loads(gzip.decompress(path.read_bytes()))
    return {
        group: [Wording(lang, text, tuple(targets), name) for lang, text, targets, name in rows]
        for group, rows in document.items()
    }


def main() -> None:
    """Write the gallery that the package ships and the queries of the evaluation."""
    from qvlfast.gallery import write_gallery

    emoji = list_emoji()
    write_gallery(emoji, read_names(emoji), draw_sprites(emoji), choose_featured(emoji))
    splits = split_wordings(read_wordings(emoji))
    write_evaluation(splits)
    counts = {group: len(getattr(splits, group)) for group in ("train", "seen", "unseen", "pairs")}
    print(f"{len(emoji)} emoji, wordings: {counts}")


if __name__ == "__main__":
    main()
