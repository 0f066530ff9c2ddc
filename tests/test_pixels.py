"""Sizes and patches of pictures."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlfast.config import VisionConfig
from qvlfast.errors import InputError
from qvlfast.pixels import PixelLimits, cut, image_patches, resize_image, target_size

VISION = VisionConfig(
    hidden_size=32,
    depth=1,
    intermediate_size=32,
    num_heads=2,
    in_channels=3,
    patch_size=16,
    temporal_patch_size=2,
    spatial_merge_size=2,
    out_hidden_size=32,
    num_positions=2304,
    deepstack_layers=(),
    rope_theta=1e4,
    norm_eps=1e-6,
)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((100, 150), (4096, 1_843_200), (96, 160)),
        ((1, 1), (4096, 1_843_200), (64, 64)),
        ((1500, 2100), (4096, 1_843_200), (1120, 1600)),
        ((20, 3000), (4096, 1_843_200), (32, 3008)),
        ((1, 200), (4096, 1_843_200), (32, 192)),
        ((48, 80), (1, 1 << 30), (64, 64)),  # half to even: 1.5 and 2.5 both give 2
        ((16, 6000), (4096, 1_843_200), None),
        ((2000, 10), (4096, 4096), (896, 32)),  # the reference's floor gives a width of 0 here
        ((5000, 5000), (1, 1), (32, 32)),
    ],
)
def test_target_size(
    size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    if expected is None:
        with pytest.raises(InputError, match="6000x16 pixels: one side is more than 200") as caught:
            target_size(*size, 32, *limits)
        assert caught.value.code == "aspect_ratio"
    else:
        assert target_size(*size, 32, *limits) == expected


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_empty_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="it is empty"):
        target_size(*size, 32, 4096, 8192)
    with pytest.raises(InputError, match="it is empty"):
        image_patches(PIL.Image.new("RGB", size), VISION, PixelLimits())


@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([32, 64]), st.integers(1, 10**7)
)
def test_target_size_keeps_its_promises(
    height: int, width: int, factor: int, min_pixels: int
) -> None:
    max_pixels = max(min_pixels, factor**2) * 4
    try:
        rows, columns = target_size(height, width, factor, min_pixels, max_pixels)
    except InputError:
        assert max(height, width) > 200 * min(height, width)
        return
    assert rows % factor == columns % factor == 0
    assert min(rows, columns) >= factor
    if min(rows, columns) > factor:
        assert rows * columns <= max_pixels
    assert rows * columns >= min(min_pixels, max_pixels / 4) / 4


def _merge_order(frames: np.ndarray) -> np.ndarray:
    """Patches of uint8 [T, H, W, 3] in plain numpy, always with the frame axis."""
    count, height, width, _ = frames.shape
    blocks = frames.reshape(count // 2, 2, height // 32, 2, 16, width // 32, 2, 16, 3)
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * 256)


def test_patches_of_a_still() -> None:
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (70, 130, 3), dtype=np.uint8))
    patches = image_patches(picture, VISION, PixelLimits())
    resized = np.asarray(picture.resize((128, 64)))
    expected = _merge_order(np.stack([resized, resized])).reshape(-1, 3, 2, 256)[:, :, 0]
    assert patches.grid == (1, 4, 8)
    assert patches.num_tokens == 8
    assert not patches.is_video and patches.seconds == () and not patches.reduced
    assert patches.pixels.dtype == np.uint8
    np.testing.assert_array_equal(patches.pixels, expected.reshape(32, 768))


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_patches_of_a_video(pairs: int, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (2 * pairs, 32 * rows, 32 * columns, 3), dtype=np.uint8)
    patches = cut(frames, VISION, seconds=tuple(map(float, range(pairs))))
    assert patches.grid == (pairs, 2 * rows, 2 * columns)
    assert patches.num_tokens == pairs * rows * columns
    assert patches.is_video
    np.testing.assert_array_equal(patches.pixels, _merge_order(frames))


def test_resizing_leaves_the_callers_picture_alone() -> None:
    picture = PIL.Image.new("RGB", (64, 64), (9, 8, 7))
    before = picture.tobytes()
    resize_image(picture, 32, 4096, 4096).putpixel((0, 0), (0, 0, 0))
    assert picture.tobytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_pixels": 0}, "min_pixels 0"),
        ({"max_pixels": 100}, "max_pixels 100"),
        ({"video_total_pixels": 0}, "total_pixels is 0"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": math.inf}, "fps is inf"),
        ({"max_frames": 1}, "max_frames is 1"),
    ],
)
def test_limits_are_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelLimits(**changes)  # type: ignore[arg-type]
