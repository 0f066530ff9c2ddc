"""From a video file, or a list of frames, to packed patches.

Which frames are read, and how they are resized, follows ``qwen_vl_utils`` 0.0.14 to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import av
import av.error
import numpy as np
import torch

from .config import VisionConfig
from .errors import InputError
from .inputs import ImageSource, Item, VideoSource, shorten
from .media import MediaPolicy, check_pixels, describe, load_image, open_media
from .pixels import Patches, PixelLimits, cut, image_patches, resize_image, target_size

# Numbers of the reference. Pixels are counted per frame.
MIN_FRAMES = 4
FRAME_MIN_PIXELS = 128 * 32 * 32
FRAME_MAX_PIXELS = 768 * 32 * 32
FILE_TOTAL_PIXELS = 128_000 * 32 * 32 * 0.9
LIST_MIN_PIXELS = 4 * 64 * 64
LIST_MAX_PIXELS = 16384 * 64 * 64
LIST_FPS = 2.0

# Containers of media proper. The rest of FFmpeg's demuxers include playlists, which name other
# files and addresses to open, and pictures, which are no videos.
_FORMATS = "mov,matroska,avi,gif,apng,mpegts,mpeg,flv,asf,ogg,mxf,h264,hevc,obu,ivf,m4v"
_OPTIONS = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}

# Headers round, and some count a last frame that has no length: a file that is this much shorter
# than promised is taken as whole.
_WHOLE = 0.98
_WHOLE_SLACK_S = 0.25


@dataclass(frozen=True)
class _Plan:
    """The frames of a file to keep, by index, and the size to give them."""

    indices: tuple[int, ...]
    height: int
    width: int
    reduced: bool


@dataclass(frozen=True)
class _Header:
    frames: int
    fps: float
    height: int
    width: int


def item_patches(
    item: Item,
    vision: VisionConfig,
    limits: PixelLimits,
    policy: MediaPolicy,
    token_budget: int | None = None,
) -> list[Patches]:
    """Read everything that one input names: the patches of its videos, then of its images.

    Args:
        token_budget: the most tokens of the prompt; video files are made smaller for it, see
            :func:`video_patches`. Nothing is read past it.

    Raises:
        InputError: see :func:`video_patches` and ``load_image``; ``too_long`` where the pictures
            and videos pass the budget, whatever the text.
    """
    images: list[Patches] = []
    for source in item.images:
        images.append(image_patches(load_image(source, policy), vision, limits))
        _check_budget(images, len(item.images), "pictures", token_budget)
    left = token_budget
    videos: list[Patches] = []
    for video in item.videos:
        if token_budget is not None:
            left = token_budget - sum(m.num_tokens + 2 for m in (*images, *videos))
        videos.append(video_patches(video, vision, limits, policy, item.fps, item.max_frames, left))
        count = len(item.images) + len(item.videos)
        _check_budget([*images, *videos], count, "pictures and videos", token_budget)
    return [*videos, *images]


def _check_budget(media: Sequence[Patches], count: int, kind: str, budget: int | None) -> None:
    """Stop at the first of ``count`` media that cannot be in a prompt any more."""
    tokens = sum(m.num_tokens for m in media)
    if budget is not None and tokens > budget:
        first = f"the first {len(media)} of " if len(media) < count else ""
        raise InputError(
            "too_long",
            f"{first}{count} {kind} take{'s' * (count == 1)} {tokens} tokens, more than the "
            f"{budget} that are left of the length limit: use fewer or smaller ones, or raise the "
            "limit",
        )


def video_patches(
    source: VideoSource,
    vision: VisionConfig,
    limits: PixelLimits,
    policy: MediaPolicy,
    fps: float | None = None,
    max_frames: int | None = None,
    token_budget: int | None = None,
) -> Patches:
    """Read a video and cut it into patches.

    Args:
        source: a file, or the frames themselves.
        fps, max_frames: of a file, where they differ from ``limits``. A list has no rate of its
            own, and the reference lets its caller choose no other maximum either.
        token_budget: the tokens that the video may take, those of the times and markers of
            its frames included. A file that would take more gets ``limits.video_total_pixels``
            too, which holds for lists always, and the result says ``reduced``.

    Raises:
        InputError: the file cannot be read or decoded, has fewer than two frames or too many of
            them, frames of a list differ in size, or ``too_long`` where it cannot be reduced
            to the budget.
    """
    if isinstance(source, tuple):
        return _list_patches(source, vision, limits, policy)
    if fps is not None or max_frames is not None:
        limits = replace(limits, fps=fps or limits.fps, max_frames=max_frames or limits.max_frames)
    with open_media(source, policy) as file:
        header = _scan(file, source, policy)
        plan = _plan(header, source, vision, limits, token_budget)
        frames, decoded = _decode(file, source, policy, plan)
        if len(frames) < len(plan.indices):
            # Fewer frames came out than packets went in: hidden ones, which show nothing.
            header = _Header(decoded, header.fps, header.height, header.width)
            plan = _plan(header, source, vision, limits, token_budget)
            frames, _ = _decode(file, source, policy, plan)
            if len(frames) < len(plan.indices):
                raise InputError("unreadable", f"{describe(source)} decodes differently each time")
    seconds = _pair_seconds(plan.indices, header.fps)
    return cut(np.stack(frames), vision, seconds, plan.reduced)


def sample_count(total: int, source_fps: float, fps: float, max_frames: int) -> int:
    """How many of ``total`` frames are used: an even number, 0 if there is no pair."""
    wanted = max(total / source_fps * fps, MIN_FRAMES)
    return int(min(wanted, max_frames // 2 * 2, total) // 2 * 2)


def frame_limit(count: int, total_pixels: float) -> float:
    """The most pixels for each of ``count`` frames."""
    return max(min(FRAME_MAX_PIXELS, total_pixels / count * 2), int(FRAME_MIN_PIXELS * 1.05))


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to uint8 [height, width, 3] as torchvision does.

    That is bicubic with antialias in float32, clamped and rounded. Torch's own arithmetic on
    uint8 differs by up to 19 levels.
    """
    if frame.shape[:2] == (height, width):
        return frame
    channels = torch.tensor(frame).permute(2, 0, 1)[None]  # [1, 3, H, W]
    pixels = channels.to(torch.float32, memory_format=torch.contiguous_format)
    resized = torch.nn.functional.interpolate(
        pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    rounded = resized.clamp_(0, 255).round_().to(torch.uint8)
    return rounded[0].permute(1, 2, 0).contiguous().numpy()


def _pair_seconds(indices: Sequence[int], fps: float) -> tuple[float, ...]:
    """The time of each pair of frames: the mean of the two."""
    times = [index / fps for index in indices]
    return tuple((a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True))


def _list_patches(
    sources: tuple[ImageSource, ...],
    vision: VisionConfig,
    limits: PixelLimits,
    policy: MediaPolicy,
) -> Patches:
    if len(sources) > limits.max_frames:
        kept = np.linspace(0, len(sources) - 1, limits.max_frames).astype(np.int64)
        sources = tuple(sources[i] for i in kept)
    factor = vision.patch_size * vision.spatial_merge_size
    count = len(sources) + len(sources) % 2
    limit = frame_limit(count, limits.video_total_pixels)
    frames: list[np.ndarray] = []
    first = (0, 0)
    size = (0, 0)
    for i, source in enumerate(sources):
        # The reference sends frames through its path for pictures first, at twice the factor.
        image = resize_image(
            load_image(source, policy), 2 * factor, LIST_MIN_PIXELS, LIST_MAX_PIXELS
        )
        if i == 0:
            first = image.size
            size = target_size(image.height, image.width, factor, FRAME_MIN_PIXELS, limit)
        elif image.size != first:
            raise InputError(
                "invalid_value",
                f"frame {i} of a video is {image.width}x{image.height} pixels after resizing and "
                f"frame 0 is {first[0]}x{first[1]}: all frames must have one size",
            )
        frames.append(resize_frame(np.asarray(image), *size))
    if len(frames) % 2:
        frames.append(frames[-1])
    return cut(np.stack(frames), vision, _pair_seconds(range(count), LIST_FPS))


def _plan(
    header: _Header,
    source: VideoSource,
    vision: VisionConfig,
    limits: PixelLimits,
    token_budget: int | None,
) -> _Plan:
    count = sample_count(header.frames, header.fps, limits.fps, limits.max_frames)
    if count < 2:
        raise InputError(
            "unreadable",
            f"{describe(source)} has {header.frames} frame{'s' * (header.frames != 1)}, a video "
            "needs at least two: pass a picture under `image`",
        )
    factor = vision.patch_size * vision.spatial_merge_size

    def size(total_pixels: float) -> tuple[int, int]:
        limit = frame_limit(count, total_pixels)
        return target_size(header.height, header.width, factor, FRAME_MIN_PIXELS, limit)

    # torch's float32 arithmetic decides which way halves are rounded.
    indices = torch.linspace(0, header.frames - 1, count).round().long().tolist()
    # `<12.5 seconds>` takes a token a character but for the word; two markers follow it.
    beside = sum(len(f"<{s:.1f}>") + 3 for s in _pair_seconds(indices, header.fps))

    def tokens(height: int, width: int) -> int:
        return count // 2 * (height * width // factor**2) + beside

    height, width = size(FILE_TOTAL_PIXELS)
    reduced = False
    if token_budget is not None and tokens(height, width) > token_budget:
        smaller = size(min(FILE_TOTAL_PIXELS, limits.video_total_pixels))
        reduced = smaller != (height, width)
        height, width = smaller
        if tokens(height, width) > token_budget:
            raise InputError(
                "too_long",
                f"{describe(source)} takes {tokens(height, width)} tokens ({count} frames of "
                f"{width}x{height} pixels), more than the {token_budget} that are left of the "
                "length limit: lower `fps` or `max_frames`, or raise the limit",
            )
    return _Plan(tuple(indices), height, width, reduced)


def _scan(file: BinaryIO, source: VideoSource, policy: MediaPolicy) -> _Header:
    """Count the frames by their packets, without decoding: headers may not say or be wrong."""
    try:
        with av.open(file, mode="r", options=_OPTIONS) as container:
            stream = _stream(container, source)
            context = stream.codec_context
            if context.width < 1 or context.height < 1:
                raise InputError("unreadable", f"{describe(source)} has frames of no size")
            check_pixels(context.width, context.height, policy, source)
            count = 0
            end = 0.0  # seconds
            for packet in container.demux():
                if packet.is_corrupt:
                    raise InputError("unreadable", f"{describe(source)} is cut short or damaged")
                if packet.pts is not None and packet.time_base:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is stream:
                    count += packet.size > 0 and not packet.is_discard
                if count > policy.max_decoded_frames:
                    raise _too_many_frames(source, policy)
            _check_whole(container, end, source)
            rate = stream.average_rate or stream.guessed_rate or stream.base_rate
            if not rate or rate <= 0:
                raise InputError("unreadable", f"{describe(source)} does not say its frame rate")
            return _Header(count, float(rate), context.height, context.width)
    except InputError:
        raise
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise _unreadable(source, error) from error


def _decode(
    file: BinaryIO, source: VideoSource, policy: MediaPolicy, plan: _Plan
) -> tuple[list[np.ndarray], int]:
    """Decode up to the last frame of the plan.

    Returns:
        the frames that are there, uint8 [height, width, 3] each, and how many were decoded.
    """
    file.seek(0)
    kept: list[np.ndarray] = []
    decoded = 0
    try:
        with av.open(file, mode="r", options=_OPTIONS) as container:
            stream = _stream(container, source)
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if decoded == policy.max_decoded_frames:
                    raise _too_many_frames(source, policy)
                if plan.indices[len(kept)] == decoded:
                    check_pixels(frame.width, frame.height, policy, source)
                    pixels = frame.to_ndarray(format="rgb24")
                    kept.append(resize_frame(pixels, plan.height, plan.width))
                decoded += 1
                if len(kept) == len(plan.indices):
                    break
    except InputError:
        raise
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise _unreadable(source, error) from error
    return kept, decoded


def _stream(container: av.container.InputContainer, source: VideoSource) -> av.VideoStream:
    if not container.streams.video:
        raise InputError("unreadable", f"{describe(source)} has no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise InputError("unreadable", f"{describe(source)} is in a format without a decoder")
    return stream


def _check_whole(container: av.container.InputContainer, end: float, source: VideoSource) -> None:
    """Refuse a file whose data ends well before the duration that its header promises."""
    if container.duration is None:
        return
    promised = ((container.start_time or 0) + container.duration) / av.time_base
    if end < _WHOLE * promised - _WHOLE_SLACK_S:
        raise InputError(
            "unreadable",
            f"{describe(source)} is cut short: its header says {promised:.1f} seconds, its data "
            f"ends at {end:.1f}",
        )


def _too_many_frames(source: VideoSource, policy: MediaPolicy) -> InputError:
    return InputError(
        "too_large",
        f"{describe(source)} has more than {policy.max_decoded_frames} frames: cut it into "
        "shorter videos",
    )


def _unreadable(source: VideoSource, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InputError(
        "unreadable", f"{describe(source)} cannot be decoded as a video: {shorten(reason, 120)}"
    )
