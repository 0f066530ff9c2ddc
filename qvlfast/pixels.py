"""From a decoded picture to the packed patches that the vision tower reads."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
import PIL.Image

from . import _C
from .config import VisionConfig
from .errors import InputError

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class PixelLimits:
    """How many pixels a picture, or all frames of a video together, may have after resizing.

    ``fps`` holds for video files that bring no number of their own, ``max_frames`` for those and
    for lists of frames.
    """

    min_pixels: int = 4096
    max_pixels: int = 1_843_200
    video_total_pixels: int = 7_864_320
    fps: float = 1.0
    max_frames: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                name = name.removeprefix("video_")
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: expected "
                "0 < min_pixels <= max_pixels"
            )
        if self.video_total_pixels <= 0:
            raise ValueError(f"total_pixels is {self.video_total_pixels}, expected > 0")
        if self.fps <= 0:
            raise ValueError(f"fps is {self.fps}, expected a finite number above 0")
        if self.max_frames < 2:
            raise ValueError(f"max_frames is {self.max_frames}, expected at least 2")


@dataclass(frozen=True, eq=False)
class Patches:
    """One picture or video, cut into patches in merge order.

    Attributes:
        pixels: uint8 [N, K], N = t·h·w. K = 3·p² for a still, flattened (channel, row, column),
            and 3·2·p² for a video, flattened (channel, frame, row, column); p the patch size.
        grid: (t, h, w), counted in patches; t counts frame pairs.
        num_tokens: how many pad tokens stand for it in the prompt, N / merge².
        seconds: the time of each frame pair in the source; empty for a still.
        reduced: a video file was made smaller than usual to fit the caller's token limit.
    """

    pixels: np.ndarray
    grid: tuple[int, int, int]
    num_tokens: int
    is_video: bool = False
    seconds: tuple[float, ...] = ()
    reduced: bool = False

    @cached_property
    def digest(self) -> bytes:
        """A cryptographic hash of the pixels and their grid: equal for equal media only."""
        shape = repr((self.grid, self.is_video, self.pixels.shape)).encode()
        pixels = np.ascontiguousarray(self.pixels).data
        return hashlib.blake2b(pixels, digest_size=32).digest() + shape


def target_size(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """The size that a picture is resized to: sides are multiples of ``factor``.

    Args:
        height, width: of the picture, in pixels.
        min_pixels, max_pixels: bounds on the area; the minimum yields to the rounding.

    Returns:
        (height, width), each at least ``factor``.

    Raises:
        InputError: an empty picture, or one more than 200 times longer than wide.
    """
    if height < 1 or width < 1:
        raise InputError("invalid_value", f"the picture is {width}x{height} pixels: it is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InputError(
            "aspect_ratio",
            f"the picture is {width}x{height} pixels: one side is more than "
            f"{MAX_ASPECT_RATIO} times the other, crop it",
        )
    # Python's round (half to even) is what the reference uses.
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def image_patches(image: PIL.Image.Image, vision: VisionConfig, limits: PixelLimits) -> Patches:
    """Resize an RGB picture and cut it into patches.

    Raises:
        InputError: see :func:`target_size`.
    """
    factor = vision.patch_size * vision.spatial_merge_size
    resized = resize_image(image, factor, limits.min_pixels, limits.max_pixels)
    return cut(np.asarray(resized)[None], vision)


def resize_image(
    image: PIL.Image.Image, factor: int, min_pixels: float, max_pixels: float
) -> PIL.Image.Image:
    """Resize an RGB picture to its target size with Pillow's default filter, bicubic."""
    height, width = target_size(image.height, image.width, factor, min_pixels, max_pixels)
    return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def cut(
    frames: np.ndarray,
    vision: VisionConfig,
    seconds: tuple[float, ...] = (),
    reduced: bool = False,
) -> Patches:
    """Cut frames of the final size into patches.

    Args:
        frames: uint8 [T, H, W, 3], C-contiguous; T is 1 for a still.
        seconds: one time a frame pair; none for a still.
    """
    count, height, width, _ = frames.shape
    size, temporal, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    pixels = _C.extract_patches(frames, size, temporal, merge)
    grid = (max(1, count // temporal), height // size, width // size)
    return Patches(
        pixels=pixels,
        grid=grid,
        num_tokens=math.prod(grid) // merge**2,
        is_video=bool(seconds),
        seconds=seconds,
        reduced=reduced,
    )
