"""What callers pass: inputs and pairs, one or many, which are still the same when their turn comes;
and whole numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, KeysView, Mapping, Set, ValuesView
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image

_ONE = (str, bytes, Mapping, Image.Image)
_HOLDERS = (list, tuple, deque, Set, KeysView, ValuesView)
_DEEPEST = 4  # a pair's document, `video`, a list of videos, the frames of one


def listed(inputs: Any) -> tuple[bool, list[Any]]:
    """Whether it is a single input, and all inputs.

    Raises:
        TypeError: neither an input nor an iterable of them.
    """
    if _is_one(inputs):
        return True, [inputs]
    if not isinstance(inputs, Iterable):
        raise TypeError(
            f"the input is {inputs!r} of type {type(inputs).__name__}: pass a string, a picture, a "
            "dict such as {'image': path}, or a list of those"
        )
    return False, [*many("inputs", inputs)]


def many(name: str, values: Any) -> Iterator[Any]:
    """The inputs of a call that takes a list of them, one by one.

    A generator, or what reads a file, may fill the same array, picture or dict again and again. So
    what comes from anything but a container is copied.

    Raises:
        TypeError: a single input, whose letters, keys or rows nobody meant, or no iterable.
    """
    if _is_one(values) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is one {type(values).__name__}: pass a list of inputs")
    if isinstance(values, np.ndarray):
        values = values.tolist()
    return iter(values) if isinstance(values, _HOLDERS) else map(_copied, values)


def pairs(values: Any) -> tuple[bool, list[Any]]:
    """Whether it is a single pair, a list or tuple of two inputs, and all pairs.

    Raises:
        TypeError: neither a pair nor an iterable of pairs.
    """
    two = isinstance(values, list | tuple) and len(values) == 2
    if two and not isinstance(values[0], list | tuple):
        return True, [values]
    return False, [*many("pairs", values)]


def whole(name: str, value: Any, least: int = 1) -> int:
    """A number that counts something.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}: use a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}: use a whole number from {least} up")
    return int(value)


def _is_one(value: Any) -> bool:
    """Arrays are pictures, unless they are of strings or objects."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "USO"
    return isinstance(value, _ONE)


def _copied(value: Any, depth: int = 0) -> Any:
    """What is nested deeper than an input may be is refused later, and not copied."""
    if depth > _DEEPEST:
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        return _copied_picture(value)
    if isinstance(value, Mapping):
        return {key: _copied(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(part, depth + 1) for part in value]
    return value


def _copied_picture(picture: Image.Image) -> Image.Image:
    """With its format, which says what its values mean. One that cannot be read stays what it is:
    to say so is for whoever reads it next."""
    try:
        copied = picture.copy()
    except Exception:  # damaged data can raise anything
        return picture
    copied.format = picture.format
    return copied
