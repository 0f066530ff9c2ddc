"""Score documents against a query, best first.

QUERY is a text, a JSON object ({"text": …, "image": …, "video": …, "instruction": …}), or @FILE:
a picture, a video, a .json file with such an object, or a text file. DOCUMENTS is what `qvlfast
embed` takes as INPUT, except that a document has no instruction: it is the query's. A score is the
probability, from 0 to 1, that the document meets the query.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from .options import (
    add_device_options,
    add_hub_options,
    add_input_options,
    model_arguments,
    positive_int,
)
from .streams import json_text, one_line, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or a hub id")
    parser.add_argument("query", metavar="QUERY", help="see above")
    parser.add_argument("documents", metavar="DOCUMENTS", help="a file, a folder, or -")
    parser.add_argument(
        "--format", choices=("auto", "jsonl", "text"), default="auto", help="of DOCUMENTS"
    )
    parser.add_argument("--top-k", metavar="N", type=positive_int, help="print only the best N")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a line instead of a table"
    )
    add_input_options(parser)
    add_device_options(parser)
    add_hub_options(parser)


def run(options: argparse.Namespace) -> int:
    from ..errors import InputError
    from .sources import open_source

    query = read_query(options.query)
    names: list[str | int] = []
    documents: list[Any] = []
    broken: dict[int, InputError] = {}
    for line in open_source(options.documents, options.format):
        name: str | int = line.index
        value: Any = None
        try:
            name, value = line.parse()
        except InputError as error:
            broken[line.index] = error
        names.append(name)
        documents.append(value)
    if not documents:
        raise ValueError(f"{options.documents} holds no documents")

    from .. import Reranker

    with Reranker.from_pretrained(options.model, **model_arguments(options)) as reranker:
        results = reranker.rank(query, documents, options.instruction, on_error="return")
    good = [result for result in results if "error" not in result]
    for place, result in enumerate(good[: options.top_k], start=1):
        index = result["index"]
        if options.json:
            entry = {"rank": place, "index": index, "id": names[index], "score": result["score"]}
            print(json_text(entry))
        else:
            label = f"{one_line(names[index]):.20}"
            print(f"{place:4}  {result['score']:.4f}  {label:20}  {_shown(documents[index])}")
    failed = sorted((r for r in results if "error" in r), key=lambda r: r["index"])
    for result in failed:
        index = result["index"]
        message = " ".join(str(broken.get(index, result["error"])).split())
        say(one_line(f"qvlfast: document {names[index]} failed: {message}"))
    return int(bool(failed))


def read_query(text: str) -> Any:
    """The query that an argument names.

    Raises:
        ValueError: it is empty, or is an object that cannot be read.
        OSError: the file cannot be read.
    """
    from .sources import PICTURES, VIDEOS, parse_json

    base = Path()
    if text.startswith("@"):
        path = Path(text[1:])
        suffix = path.suffix.lower()
        if suffix in PICTURES | VIDEOS:
            with path.open("rb"):  # a file that is not there is found before the model is loaded
                return {"image" if suffix in PICTURES else "video": path}
        text, base = path.read_text(encoding="utf-8-sig"), path.parent
        if suffix != ".json":
            return _not_blank(text.removesuffix("\n"))
        value = parse_json(text, base, 0)[1]
        return _not_blank(value) if isinstance(value, str) else _with_content(value)
    if text.lstrip().startswith("{"):
        return _with_content(parse_json(text, base, 0)[1])
    return _not_blank(text)


def _with_content(query: dict[str, Any]) -> dict[str, Any]:
    if not any(query.get(key) for key in ("text", "image", "video")):
        raise ValueError("the query is an empty object: give it a text, an image or a video")
    return query


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the query is empty")
    return text


def _shown(document: Any) -> str:
    """A document in what is left of a line."""
    if isinstance(document, dict):
        parts = [f"[{key}]" for key in ("video", "image") if document.get(key) is not None]
        text = document.get("text")
        parts += [text] if isinstance(text, str) else [] if text is None else map(str, text)
        document = " ".join(parts)
    room = max(20, shutil.get_terminal_size((100, 24)).columns - 36)
    line = one_line(" ".join(str(document).split()))
    return line if len(line) <= room else f"{line[: room - 1]}…"
