"""The published numbers of Qwen3-VL-Embedding-2B, for ``verify`` to compare with.

The official notebook prints the similarities of its four inputs. They were made with vLLM in
bfloat16, which resizes the picture a little differently, so only that of the two texts is exact.
The first values of the picture's vector are those of the official script.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig

if TYPE_CHECKING:
    from .verify_report import Verdict

_NAME = "qwen3-vl-embedding-2b"
_HOST = "qianwen-res.oss-cn-beijing.aliyuncs.com"
_PICTURE = f"https://{_HOST}/Qwen-VL/assets/demo.jpeg"
_CAPTION = (
    "A woman shares a joyful moment with her golden retriever on a sun-drenched beach at sunset, "
    "as the dog offers its paw in a heartwarming display of companionship and trust."
)
_QUERY = {
    "text": "A woman playing with her dog on a beach at sunset.",
    "instruction": "Retrieve images or text relevant to the user's query.",
}
_NAMES = ("query", "caption", "picture", "picture + caption")
_SIMILARITIES = {
    (0, 1): 0.7896,
    (0, 2): 0.7156,
    (0, 3): 0.7236,
    (1, 2): 0.7650,
    (1, 3): 0.8473,
    (2, 3): 0.8239,
}
_FIRST_VALUES = (-0.0718, -0.0181, 0.0100, -0.0056, -0.0496, 0.1104, -0.0361, -0.0260)

# bfloat16 moves a cosine by up to 0.003; another resize of the picture by some 0.01 more.
_TEXT_TOLERANCE = 0.005
_PICTURE_TOLERANCE = 0.03
_VALUE_TOLERANCE = 0.005


def is_published(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint is that model, by its name and its sizes."""
    text, vision = config.text, config.vision
    sizes = (text.hidden_size, text.num_layers, text.vocab_size, vision.hidden_size, vision.depth)
    return _NAME in name.lower() and sizes == (2048, 28, 151936, 1024, 24)


def compare(options: argparse.Namespace, dtype: str, verdict: Verdict) -> None:
    """Print each published number beside what this package computes."""
    from .. import Embedder

    print("\npublished numbers")
    source = options.picture or (_PICTURE if options.fetch_picture else None)
    inputs: list[Any] = [_QUERY, _CAPTION]
    if source is None:
        print("  without the picture of the official example: see --picture, --fetch-picture")
    else:
        inputs += [{"image": source}, {"text": _CAPTION, "image": source}]
    with Embedder.from_pretrained(
        options.model,
        device=options.device,
        dtype=dtype,
        allow_media_domains=[_HOST] if options.fetch_picture else [],
        revision=options.revision,
        local_files_only=options.offline,
    ) as embedder:
        vectors = embedder.encode(inputs)
    found = vectors @ vectors.T
    for (i, j), expected in _SIMILARITIES.items():
        if j < len(inputs):
            allowed = _TEXT_TOLERANCE if j == 1 else _PICTURE_TOLERANCE
            name = f"{_NAMES[i]}, {_NAMES[j]}"
            _line(name, float(found[i, j]), expected, allowed, verdict)
    if source is not None:
        for k, expected in enumerate(_FIRST_VALUES):
            _line(f"picture, value {k}", float(vectors[2][k]), expected, _VALUE_TOLERANCE, verdict)


def _line(name: str, value: float, expected: float, allowed: float, verdict: Verdict) -> None:
    word = verdict.check(name, abs(value - expected) <= allowed)
    print(f"  {name:30}{value:9.4f}, published {expected:7.4f}, allowed ± {allowed:g}  {word}")
