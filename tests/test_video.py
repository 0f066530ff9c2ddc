"""Videos from files and from lists of frames."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlfast.config import VisionConfig
from qvlfast.errors import InputError
from qvlfast.inputs import parse_item
from qvlfast.media import MediaPolicy
from qvlfast.pixels import PixelLimits, cut
from qvlfast.video import (
    FRAME_MAX_PIXELS,
    frame_limit,
    item_patches,
    resize_frame,
    sample_count,
    video_patches,
)

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
POLICY = MediaPolicy()
LIMITS = PixelLimits()


def colour(i: int) -> tuple[int, int, int]:
    """What a test video shows in frame ``i``, everywhere."""
    return (i % 256, 255 - i % 256, 7)


def movie(
    frames: int = 30,
    size: tuple[int, int] = (96, 64),
    rate: int = 10,
    format: str = "matroska",
    codec: str = "ffv1",
    pixel_format: str = "bgr0",
    audio_s: float = 0.0,
) -> bytes:
    """A video file; with the default codec, a lossless one."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        sound = container.add_stream("pcm_s16le", rate=8000) if audio_s else None
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), colour(i), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        if sound is not None:
            samples = np.zeros((1, int(8000 * audio_s)), np.int16)
            tone = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            tone.rate = 8000
            container.mux(sound.encode(tone))
            container.mux(sound.encode(None))
    return file.getvalue()


def read(source: Any, limits: PixelLimits = LIMITS, **options: Any) -> Any:
    return video_patches(source, VISION, limits, POLICY, **options)


def refused(source: Any, policy: MediaPolicy = POLICY, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        video_patches(source, VISION, LIMITS, policy, **options)
    return caught.value


def shown(patches: Any) -> list[int]:
    """Which frames of a test video are in the patches."""
    reds = patches.pixels.reshape(patches.grid[0], -1, 3, 2, 256)[:, :, 0]
    assert all((reds[t, :, k] == reds[t, 0, k, 0]).all() for t in range(len(reds)) for k in (0, 1))
    return [int(v) for v in reds[:, 0, :, 0].reshape(-1)]


@pytest.mark.parametrize(
    ("total", "source_fps", "fps", "max_frames", "expected"),
    [
        (30, 10, 1, 64, 4),  # three seconds, but at least four frames
        (300, 30, 1, 64, 10),
        (300, 30, 1.1, 64, 10),
        (300, 30, 1, 7, 6),
        (300, 30, 1, 2, 2),
        (9000, 30, 1, 64, 64),
        (9000, 30, 1, 65, 64),
        (10, 5, 100, 64, 10),
        (11, 5, 100, 64, 10),
        (5, 5, 1, 64, 4),
        (3, 5, 1, 64, 2),
        (2, 5, 1, 64, 2),
        (1, 5, 1, 64, 0),
        (0, 5, 1, 64, 0),
    ],
)
def test_sample_count(
    total: int, source_fps: float, fps: float, max_frames: int, expected: int
) -> None:
    assert sample_count(total, source_fps, fps, max_frames) == expected


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(1e-300, 1e300), st.integers(2, 10**6))
def test_sample_count_is_in_range(
    total: int, source_fps: float, fps: float, max_frames: int
) -> None:
    count = sample_count(total, source_fps, fps, max_frames)
    assert count % 2 == 0 and 0 <= count <= min(total, max_frames)
    assert count >= 2 or total < 2


def test_frame_limit() -> None:
    assert frame_limit(2, 7_864_320) == FRAME_MAX_PIXELS
    assert frame_limit(64, 7_864_320) == 245_760
    assert frame_limit(1000, 7_864_320) == 137_625


def test_a_file() -> None:
    patches = read(movie(30, rate=10), fps=2)
    indices = [0, 6, 12, 17, 23, 29]
    assert shown(patches) == indices
    assert patches.is_video and not patches.reduced
    assert patches.grid == (3, 20, 28)
    assert patches.num_tokens == 3 * 10 * 14
    assert patches.seconds == tuple(
        (a / 10 + b / 10) / 2 for a, b in zip(indices[::2], indices[1::2], strict=True)
    )
    expected = np.stack([np.full((320, 448, 3), colour(i), np.uint8) for i in indices])
    np.testing.assert_array_equal(patches.pixels, cut(expected, VISION, (0.0,)).pixels)


def test_sources_of_files(tmp_path: Path) -> None:
    data = movie(4)
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    uri = f"data:video/x-matroska;base64,{base64.b64encode(data).decode()}"
    for source in (data, path, str(path), f"file://{path}", uri):
        assert shown(read(source)) == [0, 1, 2, 3]


def test_limits_are_defaults_of_the_call() -> None:
    limits = PixelLimits(fps=4, max_frames=6)
    assert len(read(movie(30), limits).seconds) == 3
    assert len(read(movie(30), limits, fps=1).seconds) == 2
    assert len(read(movie(30), limits, max_frames=10).seconds) == 5


@pytest.mark.parametrize(
    ("format", "codec", "pixel_format"),
    [
        ("mp4", "mpeg4", "yuv420p"),
        ("matroska", "mpeg4", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("gif", "gif", "rgb8"),
        ("apng", "apng", "rgb24"),
        ("mpegts", "mpeg2video", "yuv420p"),
        ("mov", "mpeg4", "yuv420p"),
    ],
)
def test_formats(format: str, codec: str, pixel_format: str) -> None:
    data = movie(30, rate=25, format=format, codec=codec, pixel_format=pixel_format)
    patches = read(data, fps=5)
    with av.open(io.BytesIO(data)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    kept = torch.linspace(0, 29, 6).round().long().tolist()
    expected = np.stack([resize_frame(frames[i], 320, 448) for i in kept])
    np.testing.assert_array_equal(patches.pixels, cut(expected, VISION, (0.0,)).pixels)
    assert patches.seconds[0] == pytest.approx(kept[1] / 50)


def test_sound_does_not_count() -> None:
    data = movie(10, audio_s=5.0)
    assert shown(read(data, fps=10)) == list(range(10))


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        (b"hello", "unreadable", "cannot be decoded as a video: Invalid data"),
        (b"\0" * 5000, "unreadable", "cannot be decoded"),
        (b"", "unreadable", "is empty"),
        ("absent.mp4", "not_found", "'absent.mp4' does not exist"),
        ("http://example.org/a.mp4", "not_allowed", "allow_media_domains"),
        (movie(1), "unreadable", "has 1 frame, a video needs at least two"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "unreadable", "cannot be decoded"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "unreadable", "cannot be decoded"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "unreadable", "decoded"),
    ],
)
def test_bad_files(source: Any, code: str, message: str) -> None:
    error = refused(source)
    assert (error.code, message in str(error)) == (code, True), str(error)


def test_pictures_are_no_videos() -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(file, "PNG")
    assert refused(file.getvalue()).code == "unreadable"


def test_sound_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
    assert "has no video in it" in str(refused(file.getvalue()))


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mov"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.8])
def test_cut_files(format: str, part: float) -> None:
    data = movie(60, format=format, codec="mpeg4", pixel_format="yuv420p")
    assert refused(data[: int(len(data) * part)]).code == "unreadable"


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([movie(6), movie(6, format="mp4", codec="mpeg4", pixel_format="yuv420p")]),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_fuzzed_files_never_crash(data: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    try:
        assert read(bytes(changed), token_budget=20_000).is_video
    except InputError as error:
        assert error.code in {"unreadable", "too_large", "too_long", "aspect_ratio"}


def test_hidden_packets_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some codecs have packets that show nothing: more packets than frames.
    from qvlfast import video

    real, calls = video._scan, []

    def scan(*args: Any) -> Any:
        header = real(*args)
        calls.append(header)
        return video._Header(header.frames + 5, header.fps, header.height, header.width)

    monkeypatch.setattr(video, "_scan", scan)
    assert shown(read(movie(10, rate=5), fps=5)) == list(range(10))
    assert len(calls) == 1


def test_policy_limits() -> None:
    data = movie(30)
    error = refused(data, MediaPolicy(max_decoded_frames=29))
    assert error.code == "too_large" and "more than 29 frames" in str(error)
    assert len(read(data).seconds) == 2
    error = refused(data, MediaPolicy(max_image_pixels=96 * 64 - 1))
    assert error.code == "too_large" and "96x64 pixels" in str(error)
    assert refused(data, MediaPolicy(max_bytes=100)).code == "too_large"


SMALL_TOTAL = PixelLimits(video_total_pixels=1_966_080, fps=10)


def test_long_files_are_reduced_to_the_callers_limit() -> None:
    data = movie(16, size=(640, 480), format="mp4", codec="mpeg4", pixel_format="yuv420p")
    free = read(data, SMALL_TOTAL)
    assert free.grid == (8, 30, 40) and not free.reduced and free.num_tokens == 2400
    kept = read(data, SMALL_TOTAL, token_budget=2464)  # eight beside each frame pair
    assert kept.grid == free.grid and not kept.reduced
    small = read(data, SMALL_TOTAL, token_budget=2463)
    assert small.reduced and small.grid == (8, 26, 34) and small.seconds == free.seconds
    with pytest.raises(InputError, match=r"takes 1832 tokens .* than the 1000") as caught:
        read(data, SMALL_TOTAL, token_budget=1000)
    assert caught.value.code == "too_long"


def frames(count: int, size: tuple[int, int] = (96, 64)) -> tuple[PIL.Image.Image, ...]:
    return tuple(PIL.Image.new("RGB", size, colour(i)) for i in range(count))


@pytest.mark.parametrize(
    ("count", "expected", "seconds"),
    [
        (1, [0, 0], (0.25,)),
        (2, [0, 1], (0.25,)),
        (3, [0, 1, 2, 2], (0.25, 1.25)),
        (4, [0, 1, 2, 3], (0.25, 1.25)),
    ],
)
def test_lists(count: int, expected: list[int], seconds: tuple[float, ...]) -> None:
    patches = read(frames(count), fps=9.0, max_frames=2)  # a list takes neither from its item
    assert shown(patches) == expected
    assert patches.seconds == seconds


def test_long_lists_are_sampled() -> None:
    patches = read(frames(11), PixelLimits(max_frames=4))
    assert shown(patches) == [0, 3, 6, 10]
    assert patches.seconds == (0.25, 1.25)
    odd = read(frames(11), PixelLimits(max_frames=5))
    assert shown(odd) == [0, 2, 5, 7, 10, 10]


def test_only_sampled_frames_are_read() -> None:
    sources = tuple("absent.png" if i % 2 else frames(i + 1)[i] for i in range(9))
    assert shown(read(sources, PixelLimits(max_frames=5)))[:5] == [0, 2, 4, 6, 8]


def test_frames_go_through_the_path_for_pictures_first() -> None:
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (100, 150, 3), dtype=np.uint8))
    patches = read((picture, picture))
    first = picture.resize((128, 128))  # multiples of 64
    expected = resize_frame(np.asarray(first), 384, 384)
    assert patches.grid == (1, 24, 24)
    np.testing.assert_array_equal(
        patches.pixels, cut(np.stack([expected, expected]), VISION, (0.0,)).pixels
    )


def test_lists_have_a_cap_in_common() -> None:
    assert read(frames(16, (640, 480)), SMALL_TOTAL).grid == (8, 26, 34)
    assert read(frames(2, (1920, 1088))).grid == (1, 40, 72)


def test_frames_of_different_sizes_are_refused() -> None:
    error = refused((*frames(1), *frames(1, (200, 64))))
    assert error.code == "invalid_value"
    assert "frame 1 of a video is 256x128" in str(error) and "frame 0 is 192x128" in str(error)
    # Sizes that the first resize makes equal are one size.
    assert read((*frames(1, (128, 128)), *frames(1, (130, 126)))).grid == (1, 24, 24)


def test_resize_frame_rounds_like_the_definition() -> None:
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    resized = resize_frame(frame, 32, 96)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].double()
    exact = torch.nn.functional.interpolate(
        pixels, size=(32, 96), mode="bicubic", antialias=True
    ).clamp(0, 255)[0]
    assert resized.dtype == np.uint8 and resized.flags.c_contiguous
    assert np.abs(resized - exact.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-3
    assert resize_frame(frame, 50, 70) is frame


def test_item_patches() -> None:
    item = parse_item(
        {"video": [list(frames(3)), movie(4)], "image": list(frames(2, (40, 40))), "fps": 10}
    )
    media = item_patches(item, VISION, LIMITS, POLICY)
    assert [m.is_video for m in media] == [True, True, False, False]
    assert [m.grid for m in media] == [(2, 20, 28), (2, 20, 28), (1, 4, 4), (1, 4, 4)]
    assert item_patches(parse_item("text"), VISION, LIMITS, POLICY, 10) == []


def test_reading_stops_where_the_budget_ends(tmp_path: Path) -> None:
    # Sixteen tokens each; the fourth would pass, and the fifth is never opened.
    pictures = [*frames(4, (128, 128)), tmp_path / "absent.png"]
    with pytest.raises(
        InputError, match=r"first 4 of 5 pictures take 64 tokens, .* 63 that"
    ) as caught:
        item_patches(parse_item({"image": pictures}), VISION, LIMITS, POLICY, 63)
    assert caught.value.code == "too_long"
    assert len(item_patches(parse_item({"image": pictures[:4]}), VISION, LIMITS, POLICY, 64)) == 4
    videos = parse_item({"video": [list(frames(2)), list(frames(2)), tmp_path / "absent.mp4"]})
    with pytest.raises(InputError, match=r"first 2 of 3 pictures and videos take 280 tokens"):
        item_patches(videos, VISION, LIMITS, POLICY, 279)


def test_the_budget_is_shared_by_the_media_of_an_item() -> None:
    data = movie(16, size=(640, 480), format="mp4", codec="mpeg4", pixel_format="yuv420p")
    item = parse_item({"video": data, "image": frames(1, (640, 480))[0]})
    video, image = item_patches(item, VISION, SMALL_TOTAL, POLICY, 2766)
    assert not video.reduced and image.num_tokens == 300
    video, _ = item_patches(item, VISION, SMALL_TOTAL, POLICY, 2765)
    assert video.reduced
    assert math.prod(video.grid) // 4 == video.num_tokens
