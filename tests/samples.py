"""Made-up pictures and videos, the same on every machine: integer arithmetic and a seed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image

# Bytes a pixel of the modes whose rows are 8-bit channels side by side.
_CHANNELS = {
    "L": 1,
    "P": 1,
    "LA": 2,
    "PA": 2,
    "RGB": 3,
    "YCbCr": 3,
    "HSV": 3,
    "RGBA": 4,
    "RGBX": 4,
    "RGBa": 4,
    "CMYK": 4,
}
MODES = (*_CHANNELS, "1", "I", "F")


def pixel_array(
    width: int, height: int, channels: int = 3, *, seed: int = 0, noise: int = 32
) -> np.ndarray:
    """Smooth ramps, an edge and noise, uint8 [height, width, channels].

    Args:
        noise: range of the noise, 0 for none.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    layers = []
    for c in range(channels):
        rows, columns, start = (int(n) for n in rng.integers(1, 256, 3))
        ramp = start + (rows * y + columns * x) * 256 // (64 * (16 + 8 * c))
        ramp = np.abs(ramp % 512 - 256)  # a triangle wave: no jumps
        ramp[(2 * y + x) % 97 < 24] //= 2
        layers.append(ramp)
    values = np.stack(layers, axis=-1)
    if noise:
        values += rng.integers(-noise, noise + 1, values.shape)
    return np.clip(values, 0, 255).astype(np.uint8)


def picture(
    width: int, height: int, mode: str = "RGB", *, seed: int = 0, noise: int = 32
) -> PIL.Image.Image:
    """A picture of any mode in :data:`MODES`; a palette is made from the seed too."""
    if mode in _CHANNELS:
        pixels = pixel_array(width, height, _CHANNELS[mode], seed=seed, noise=noise)
        image = PIL.Image.frombytes(mode, (width, height), pixels.tobytes())
        if mode in ("P", "PA"):
            image.putpalette(pixel_array(256, 1, 3, seed=seed + 1).tobytes())
        return image
    grey = pixel_array(width, height, 1, seed=seed, noise=noise)[..., 0]
    if mode == "1":
        return PIL.Image.fromarray(grey > 127)
    if mode == "I":
        # Some values lie outside 0..255, where Pillow clips.
        return PIL.Image.fromarray(grey.astype(np.int32) * 2 - 100)
    if mode == "F":
        return PIL.Image.fromarray(grey.astype(np.float32) * 1.5 - 50)
    raise ValueError(f"mode {mode!r}: give one of {', '.join(MODES)}")


def frames(
    count: int, width: int, height: int, *, seed: int = 0, noise: int = 0
) -> list[PIL.Image.Image]:
    """RGB frames of a camera that moves along a wide picture."""
    step = 3
    scene = pixel_array(width + step * count, height, seed=seed, noise=noise)
    return [PIL.Image.fromarray(scene[:, step * i : step * i + width]) for i in range(count)]


@dataclass(frozen=True)
class Film:
    """What a video file is made of. ``options`` go to the encoder."""

    width: int
    height: int
    count: int
    fps: Fraction = Fraction(25)
    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    seed: int = 0
    options: tuple[tuple[str, str], ...] = (("crf", "34"), ("preset", "veryslow"))


def write_film(path: Path, film: Film) -> None:
    """Encode a video file; the container follows from the name's ending.

    The bytes depend on the encoder's version: keep the file where they matter.
    """
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(film.codec, rate=film.fps, options=dict(film.options))
        stream.width, stream.height = film.width, film.height
        stream.pix_fmt = film.pixel_format
        stream.thread_count = 1
        for image in frames(film.count, film.width, film.height, seed=film.seed):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
