"""What a caller may pass as one input, and the form the rest of the package works with.

Nothing here opens a file: a name stays a name until ``media`` or ``video`` reads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import PurePath
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import PIL.Image

from .errors import InputError

ImageSource = str | PurePath | bytes | PIL.Image.Image
"""A path, ``file://``, ``http(s)://`` or ``data:`` URL, the bytes of a picture file, a picture."""

VideoSource = str | PurePath | bytes | tuple[ImageSource, ...]
"""A path or URL of a video file, its bytes, or the video's frames."""

KEYS = ("text", "image", "video", "instruction", "fps", "max_frames")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tiff", ".svg")

_NOTHING = "NULL"  # the text that the reference embeds when an input holds nothing

_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """One parsed input. Its prompt holds the videos, then the images, then the texts.

    ``instruction``, ``fps`` and ``max_frames`` are None where the caller's own defaults hold.
    """

    videos: tuple[VideoSource, ...] = ()
    images: tuple[ImageSource, ...] = ()
    texts: tuple[str, ...] = ()
    instruction: str | None = None
    fps: float | None = None
    max_frames: int | None = None


def parse_item(value: object) -> Item:
    """Turn what a caller passed as one input into an :class:`Item`.

    Args:
        value: a string, a ``PIL.Image``, a numpy picture (uint8 ``[height, width, 3]``), or a
            mapping with any of ``text``, ``image``, ``video``
            (each one value or a list), ``instruction``, ``fps`` and ``max_frames``.

    Raises:
        InputError: the value, a key or a part has the wrong type, a number is out of range, or
            a text cannot be encoded.
    """
    if isinstance(value, str):
        return Item(texts=(check_text(value, "the input"),))
    if isinstance(value, PIL.Image.Image | np.ndarray):
        return Item(images=(_image(value, "the input"),))
    if not isinstance(value, Mapping):
        raise InputError(
            "invalid_type",
            f"the input is {_kind(value)}, expected a string, a PIL image, a numpy picture or a "
            f"dict with any of {', '.join(KEYS)}",
        )
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise InputError(
            "invalid_type",
            f"unknown key {', '.join(shorten(repr(key)) for key in unknown[:5])}; allowed are "
            f"{', '.join(KEYS)}",
        )
    videos = _videos(value.get("video"))
    images = _several(value.get("image"), "`image`", _image)
    texts = _several(value.get("text"), "`text`", check_text)
    instruction = value.get("instruction")
    return Item(
        videos=videos,
        images=images,
        texts=texts if texts or images or videos else (_NOTHING,),
        instruction=None if instruction is None else check_text(instruction, "`instruction`"),
        fps=check_fps(value.get("fps")),
        max_frames=check_max_frames(value.get("max_frames")),
    )


def check_text(value: object, name: str) -> str:
    """Return ``value`` if it is a string that has a UTF-8 form.

    Raises:
        InputError: another type, or lone surrogates.
    """
    if not isinstance(value, str):
        raise InputError("invalid_type", f"{name} is {_kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "invalid_text",
            f"{name} has a lone surrogate (U+{ord(value[error.start]):04X}) at character "
            f"{error.start}: it is not valid Unicode, decode it again with errors='replace'",
        ) from None
    return value


def check_fps(value: object) -> float | None:
    """Return frames a second as a float, or None.

    Raises:
        InputError: not a positive finite number.
    """
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise InputError("invalid_type", f"`fps` is {_kind(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise InputError(
            "invalid_value", f"`fps` is {shorten(str(value))}, expected a finite number above 0"
        )
    return number


def check_max_frames(value: object) -> int | None:
    """Return the largest number of frames, or None.

    Raises:
        InputError: not an integer of at least 2, the number of frames in one patch.
    """
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise InputError("invalid_type", f"`max_frames` is {_kind(value)}, expected an integer")
    if value < 2:
        raise InputError("invalid_value", f"`max_frames` is {int(value)}, expected at least 2")
    return int(value)


def shorten(text: str, limit: int = 80) -> str:
    """Cut a value to what an error message can carry."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def _several(value: object, name: str, parse: Callable[[object, str], _T]) -> tuple[_T, ...]:
    """One value or a list of them; None is none of them."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(parse(part, f"{name}[{i}]") for i, part in enumerate(value))
    return (parse(value, name),)


def _image(value: object, name: str) -> ImageSource:
    if isinstance(value, np.ndarray):
        return _from_array(value, name)
    source = _file(value, name)
    if source is not None:
        return source
    if isinstance(value, PIL.Image.Image):
        return value
    raise InputError(
        "invalid_type",
        f"{name} is {_kind(value)}, expected a path, a URL, bytes, a PIL image or a numpy array",
    )


def _file(value: object, name: str) -> str | PurePath | bytes | None:
    """The part that pictures and videos share: a name of a file, or its bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, os.PathLike) and not isinstance(value, PurePath):
        value = os.fspath(value)
        if isinstance(value, bytes):
            value = os.fsdecode(value)
    if isinstance(value, str | PurePath):
        if not str(value).strip():
            raise InputError("invalid_value", f"{name} is an empty name")
        return value
    return None


def _from_array(value: np.ndarray, name: str) -> PIL.Image.Image:
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or 0 in value.shape:
        raise InputError(
            "invalid_type",
            f"{name} is a numpy array {list(value.shape)} of {value.dtype}, expected "
            "[height, width, 3] of uint8",
        )
    # The copy keeps the picture as it was when it was passed.
    return PIL.Image.fromarray(np.array(value, order="C"))


def _videos(value: object) -> tuple[VideoSource, ...]:
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        if not value:
            return ()
        if not _is_picture(value[0]):
            return tuple(_video(part, f"`video`[{i}]") for i, part in enumerate(value))
    return (_video(value, "`video`"),)


def _video(value: object, name: str) -> VideoSource:
    if isinstance(value, list | tuple):
        if not value:
            raise InputError("invalid_value", f"{name} is a video without frames")
        return tuple(_image(frame, f"{name}[{i}]") for i, frame in enumerate(value))
    source = _file(value, name)
    if source is not None:
        return source
    hint = "; put a single picture under `image` or in a list" if _is_picture(value) else ""
    raise InputError(
        "invalid_type",
        f"{name} is {_kind(value)}, expected a path, a URL, bytes or a list of pictures{hint}",
    )


def _is_picture(value: object) -> bool:
    """Whether a list that begins with ``value`` is one video, by the rule of the reference."""
    if isinstance(value, PIL.Image.Image | np.ndarray):
        return True
    if isinstance(value, PurePath):
        return value.suffix.lower() in PICTURE_SUFFIXES
    if not isinstance(value, str):
        return False
    scheme = value[:8].lower()
    if scheme.startswith("data:"):
        return value[:11].lower() == "data:image/"
    if scheme.startswith(("http://", "https://", "file://")):
        try:
            value = unquote(urlsplit(value).path)
        except ValueError:
            return False
    return value.lower().endswith(PICTURE_SUFFIXES)
