"""What ``verify`` compares: texts in ten languages, drawn pictures, a drawn video, pairs to score.

Pictures are drawn with integer arithmetic from a seed, so they are the same everywhere.
"""

# ruff: noqa: RUF001

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

TEXTS = {
    "English": "A woman walks along the shore with her dog while the sun goes down.",
    "Chinese": "日落时分，一位女士带着她的狗在海边散步。",
    "Spanish": "Una mujer pasea con su perro por la orilla mientras se pone el sol.",
    "Arabic": "امرأة تمشي مع كلبها على الشاطئ عند غروب الشمس.",
    "Hindi": "सूरज ढलते समय एक महिला अपने कुत्ते के साथ समुद्र तट पर टहलती है।",
    "French": "Une femme se promène avec son chien au bord de la mer, au soleil couchant.",
    "Russian": "Женщина гуляет с собакой по берегу моря на закате.",
    "Japanese": "夕暮れの海辺を、女性が犬と一緒に歩いている。",
    "German": "Eine Frau geht bei Sonnenuntergang mit ihrem Hund am Strand spazieren.",
    "Swahili": "Mwanamke anatembea ufukweni na mbwa wake jua linapotua. 🐕🌅",
}
PICTURES = ((320, 240), (96, 480), (480, 64), (33, 31))
INSTRUCTION = "Retrieve images or text relevant to the user's query."
QUERY = "a dog on a beach at sunset"


@dataclass(frozen=True)
class Sample:
    """One input, and whether its prompt holds a video."""

    name: str
    value: Any
    video: bool = False


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Ramps, discs and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.int64)
    channels = [(x * int(a) + y * int(b)) // 16 % 256 for a, b in rng.integers(4, 40, (3, 2))]
    values = np.stack(channels, axis=-1)
    for _ in range(4):
        row, column = int(rng.integers(height)), int(rng.integers(width))
        radius = int(rng.integers(3, 4 + min(width, height) // 2))
        inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
        values[inside] = rng.integers(0, 256, 3)
    values += rng.integers(-12, 13, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def video(count: int, width: int, height: int) -> list[Image.Image]:
    """Frames of a camera that moves along a wide picture."""
    scene = picture(width + 8 * count, height, seed=100)
    return [scene.crop((8 * i, 0, 8 * i + width, height)) for i in range(count)]


def embed_samples() -> list[Sample]:
    """The inputs of an embedder."""
    samples = [Sample(name, text) for name, text in TEXTS.items()]
    samples.append(Sample("instruction", {"text": QUERY, "instruction": INSTRUCTION}))
    samples += [
        Sample(f"picture {w}x{h}", {"image": picture(w, h, seed)})
        for seed, (w, h) in enumerate(PICTURES)
    ]
    captioned = {"text": TEXTS["English"], "image": picture(200, 150, 50)}
    samples.append(Sample("picture + text", captioned))
    samples.append(Sample("video, 6 frames", {"video": video(6, 160, 120)}, video=True))
    return samples


def rerank_samples() -> list[Sample]:
    """The pairs of a reranker; each value is (query, document)."""
    documents: list[tuple[str, Any]] = [
        ("right text", TEXTS["English"]),
        ("right text, other language", TEXTS["Chinese"]),
        ("wrong text", "The invoice is due within thirty days of delivery."),
        ("picture", {"image": picture(200, 150, 50)}),
        ("picture + text", {"text": TEXTS["German"], "image": picture(150, 200, 51)}),
    ]
    pairs = [Sample(name, (QUERY, document)) for name, document in documents]
    pairs.append(Sample("picture query", ({"image": picture(96, 96, 52)}, TEXTS["French"])))
    pairs.append(Sample("video", (QUERY, {"video": video(4, 96, 96)}), video=True))
    return pairs
