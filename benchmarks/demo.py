"""The package at work, with nothing downloaded: ``python -m benchmarks.demo``.

Makes a small checkpoint of the published layout with seeded random weights, embeds photographs, a
video file, document pages and texts in several languages, reranks them, and prints similarities,
scores, token counts and times. Everything is real but the weights, so the numbers show that the
path works; they mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.checkpoints import write_checkpoint
from qvlfast import Embedder, Encoded, Reranker

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "page")
TEXTS = {
    "en": "A portrait of an astronaut in an orange suit",
    "de": "Eine Katze mit grünen Augen",
    "fr": "Une tasse de café sur une table en bois",
    "zh": "发射架上的火箭",
    "ar": "مجرات بعيدة في الفضاء السحيق",
    "hi": "एक दस्तावेज़ का पृष्ठ",
}
LETTER = (
    "Dear reader,",
    "this page was drawn a moment ago. It stands for the",
    "invoices, slides and scans that people search in.",
    "",
    "    Item              Price",
    "    Coffee, 250 g      7.90",
    "    Cat food          12.40",
    "    Total             20.30",
)

T = TypeVar("T")


def photographs() -> dict[str, Path]:
    """Pictures that scikit-image ships."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {name: next(folder.glob(f"{name}.*")) for name in PHOTOGRAPHS}


def letter() -> Image.Image:
    """A rendered document page."""
    page = Image.new("RGB", (620, 400), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=20)
    for i, line in enumerate(LETTER):
        draw.text((40, 40 + 38 * i), line, fill="black", font=font)
    return page


def write_video(path: Path, photograph: Path, seconds: int = 6, fps: int = 12) -> None:
    """A camera that pans over a photograph, as an MP4 file."""
    picture = np.asarray(Image.open(photograph).convert("RGB").resize((480, 320)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        count = seconds * fps
        for i in range(count):
            x, y = 160 * i // count, 80 * i // count
            frame = np.ascontiguousarray(picture[y : y + 240, x : x + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def print_matrix(title: str, rows: Sequence[str], columns: Sequence[str], values: Any) -> None:
    print(f"\n{title}\n{'':16}" + "".join(f"{name[:9]:>10}" for name in columns))
    for name, line in zip(rows, values, strict=True):
        print(f"{name[:15]:16}" + "".join(f"{value:10.3f}" for value in line))


def timed(label: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    print(f"{label}: {time.perf_counter() - start:.2f} s")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="use this checkpoint for both classes instead")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or timed(
            "checkpoint written", lambda: write_checkpoint(Path(scratch) / "model", "tiny")
        )
        pictures = photographs()
        video = Path(scratch) / "pan.mp4"
        write_video(video, pictures["coffee"])
        documents: dict[str, Any] = {name: {"image": path} for name, path in pictures.items()}
        documents["letter"] = {"image": letter()}
        documents["video"] = {"video": video}
        documents["cat, captioned"] = {"text": "My cat", "image": pictures["chelsea"]}
        run(model, documents)


def run(model: Path, documents: dict[str, Any]) -> None:
    names = list(documents)
    with timed("embedder loaded", lambda: Embedder.from_pretrained(model)) as embedder:
        encoded: Encoded = timed(
            f"{len(documents)} documents embedded",
            lambda: embedder.encode_document(list(documents.values()), details=True),
        )
        queries = timed(
            f"{len(TEXTS)} queries embedded",
            lambda: embedder.encode_query(
                list(TEXTS.values()), "Retrieve images relevant to the user's query."
            ),
        )
        print(f"\n{'document':16}{'tokens':>8}{'visual':>8}")
        for name, usage in zip(names, encoded.usage, strict=True):
            if usage is not None:
                print(f"{name:16}{usage.tokens:8}{usage.visual_tokens:8}")
        print_matrix(
            "cosine of each query with each document",
            list(TEXTS),
            names,
            embedder.similarity(queries, encoded.vectors),
        )
    print()
    with timed("reranker loaded", lambda: Reranker.from_pretrained(model)) as reranker:
        query = TEXTS["en"]
        ranked = timed(
            f"{len(documents)} documents reranked",
            lambda: reranker.rank(query, list(documents.values())),
        )
        print(f"\nscores for “{query}”")
        for place, result in enumerate(ranked, start=1):
            print(f"{place:3}  {names[result['index']]:16}{result['score']:8.4f}")
    print("\nThe weights are random: the path is real, the numbers mean nothing.")


if __name__ == "__main__":
    main()
