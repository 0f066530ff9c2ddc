"""Search emoji pictures by words, in several languages.

Everything is in the package: a small trained embedder, a small trained reranker and the pictures.
Each WORDS is a query of its own; without any, built-in queries and one picture are asked. The table
shows the best of each query after reranking, and a contact sheet is drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import positive_int
from .streams import naming, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from ..gallery import Emoji

_RERANKED = 20
_COLUMNS = 8
_MOST = 100  # pictures on a row of the sheet
_PRINTED = 5

# The language, the query, and what it means.
_QUERIES = (
    ("English", "pizza", "pizza"),
    ("German", "roter Apfel", "red apple"),
    ("Spanish", "gato", "cat"),
    ("French", "chien", "dog"),
    ("Chinese", "彩虹", "rainbow"),
    ("Japanese", "魚", "fish"),
    ("Arabic", "شمس", "sun"),
)
_PICTURE_QUERY = "🚗"


@dataclass(frozen=True)
class Query:
    """A question to the gallery; ``note`` and ``meaning`` are for the reader."""

    value: Any
    title: str | Image.Image
    note: str
    meaning: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", metavar="WORDS", nargs="*", help="your own queries")
    parser.add_argument(
        "--sheet",
        metavar="FILE",
        type=Path,
        default=Path("qvlfast-demo.png"),
        help="the contact sheet",
    )
    parser.add_argument("--all", action="store_true", help="search the whole gallery")
    parser.add_argument(
        "--top",
        metavar="N",
        type=positive_int,
        default=_COLUMNS,
        help=f"pictures of a query on the sheet, at most {_MOST}; the table has the best "
        f"{_PRINTED} of them",
    )
    parser.add_argument(
        "--embedder", metavar="MODEL", help="another embedder; only --reranker then reranks"
    )
    parser.add_argument("--reranker", metavar="MODEL", help="another reranker")


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    try:
        from ..gallery import EMBEDDER, RERANKER, featured, load_gallery

        emoji = load_gallery() if options.all else featured()
    except (ImportError, FileNotFoundError):
        raise ValueError("this installation has no gallery: install the whole package") from None

    from .. import Embedder, Reranker
    from .contact_sheet import Row, draw

    _check(options)
    queries = _own(options.words) if options.words else _built_in(load_gallery())
    pictures = [each.picture() for each in emoji]
    documents = [{"image": picture} for picture in pictures]
    with Embedder.from_pretrained(options.embedder or EMBEDDER) as embedder:
        gallery = embedder.encode_document(documents)
        vectors = embedder.encode_query([query.value for query in queries])
        cosines = embedder.similarity(vectors, gallery)
    _say(f"embedded {len(emoji)} pictures, and queries: {len(queries)}", start)

    # The small reranker knows words, and would spoil what a larger embedder finds.
    judge = options.reranker or (None if options.embedder else RERANKER)
    rows = []
    with contextlib.ExitStack() as stack:
        reranker = None
        if judge is not None:
            reranker = stack.enter_context(Reranker.from_pretrained(judge))
        for query, row in zip(queries, cosines, strict=True):
            best = _best(row, max(_RERANKED, options.top))
            scores = [float(row[i]) for i in best]
            is_judged = isinstance(query.value, str) or options.reranker
            if reranker is not None and is_judged:
                scores = reranker.predict([(query.value, documents[i]) for i in best]).tolist()
            order = sorted(range(len(best)), key=lambda k: -scores[k])[: options.top]
            found = [(best[k], scores[k]) for k in order]
            _print_found(query, found, emoji, row)
            drawn = [(pictures[i], score) for i, score in found]
            rows.append(Row(query.title, query.note, query.meaning, drawn))
    how = "found by their vectors" + (", then reranked" if judge else "")
    sheet = draw(rows, "qvlfast demo", f"{len(emoji)} pictures, {how}")
    with naming(options.sheet):
        sheet.save(options.sheet)
    print(f"\ncontact sheet: {options.sheet}")
    _say("done", start)
    return 0


def _say(text: str, start: float) -> None:
    say(f"qvlfast: {text}, {time.monotonic() - start:.1f} s")


def _check(options: argparse.Namespace) -> None:
    """Find before the work what would fail after it.

    Raises:
        ValueError: a query or the sheet's name cannot be used, or too many pictures are wanted.
    """
    from PIL import Image

    for text in options.words:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"the query {text!r} is not valid Unicode: write it in UTF-8")
    if options.top > _MOST:
        raise ValueError(f"--top {options.top}: the sheet has room for {_MOST} pictures a query")
    sheet = options.sheet
    if Image.registered_extensions().get(sheet.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{sheet} is no name of a picture that can be written: end it in .png")
    if sheet.is_dir():
        raise ValueError(f"{sheet} is a folder: name a file")
    if not sheet.parent.is_dir():
        raise ValueError(f"{sheet.parent} is no folder: the sheet cannot be written there")


def _own(words: Sequence[str]) -> list[Query]:
    return [Query(text, text, "", text) for text in words]


def _built_in(gallery: Sequence[Emoji]) -> list[Query]:
    from PIL import Image

    queries = []
    for language, text, meaning in _QUERIES:
        note = language if text == meaning else f"{language}: {meaning}"
        queries.append(Query(text, text, note, meaning))
    for emoji in gallery:
        if emoji.character.startswith(_PICTURE_QUERY):
            # On another ground and turned, so that it is not the gallery's own picture.
            ground = "#cfe3f5"
            smooth = Image.Resampling.BICUBIC
            picture = emoji.picture(ground).rotate(12, smooth, fillcolor=ground)
            queries.append(Query({"image": picture}, picture, "a picture", "a picture"))
            break
    return queries


def _best(cosines: NDArray[np.float32], count: int) -> list[int]:
    import numpy as np

    best: list[int] = np.argsort(-cosines, kind="stable")[:count].tolist()
    return best


def _print_found(
    query: Query,
    found: Sequence[tuple[int, float]],
    emoji: Sequence[Emoji],
    cosines: NDArray[np.float32],
) -> None:
    title = query.title if isinstance(query.title, str) else "[picture]"
    print(f"\n{title}" + (f"  ({query.note})" if query.note else ""))
    print(f"  {'':4}{'score':>6}{'cosine':>9}")
    for index, score in found[:_PRINTED]:
        character, name = emoji[index].character, emoji[index].names.get("en", "")
        print(f"  {character}  {score:6.3f}{float(cosines[index]):9.3f}  {name}")
