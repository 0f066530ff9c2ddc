"""Parsing of what callers pass."""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlfast.errors import InputError
from qvlfast.inputs import Item, check_text, parse_item, shorten

PICTURE = PIL.Image.new("RGB", (4, 3), (1, 2, 3))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hello", Item(texts=("hello",))),
        ("", Item(texts=("",))),
        ("a.jpg", Item(texts=("a.jpg",))),  # a bare string is a text, whatever it looks like
        (PICTURE, Item(images=(PICTURE,))),
        ({}, Item(texts=("NULL",))),
        ({"text": None, "image": None, "video": None}, Item(texts=("NULL",))),
        ({"text": [], "image": (), "video": []}, Item(texts=("NULL",))),
        ({"instruction": "Find it"}, Item(texts=("NULL",), instruction="Find it")),
        ({"text": ""}, Item(texts=("",))),
        ({"text": ["a", "b"]}, Item(texts=("a", "b"))),
        ({"text": ("a",)}, Item(texts=("a",))),
        ({"image": "a.png"}, Item(images=("a.png",))),
        ({"image": [b"x", PICTURE]}, Item(images=(b"x", PICTURE))),
        ({"image": bytearray(b"x")}, Item(images=(b"x",))),
        ({"image": Path("a.png")}, Item(images=(Path("a.png"),))),
        ({"image": "a.png", "text": []}, Item(images=("a.png",))),
        (
            {"text": "t", "image": "i", "video": "v", "fps": 2, "max_frames": 8},
            Item(("v",), ("i",), ("t",), None, 2.0, 8),
        ),
        ({"text": "t", "fps": None, "max_frames": None}, Item(texts=("t",))),
        ({"text": "t", "fps": np.float32(0.5)}, Item(texts=("t",), fps=0.5)),
        ({"text": "t", "max_frames": np.int64(4)}, Item(texts=("t",), max_frames=4)),
    ],
)
def test_accepts(value: Any, expected: Item) -> None:
    assert parse_item(value) == expected


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("a.mp4", ("a.mp4",)),
        (b"bytes", (b"bytes",)),
        (["a.mp4", "b.mp4"], ("a.mp4", "b.mp4")),
        ([b"bytes", "b.jpg"], (b"bytes", "b.jpg")),
        (["1.jpg", "2.jpg"], (("1.jpg", "2.jpg"),)),
        (["1.JPEG", "odd"], (("1.JPEG", "odd"),)),  # the first one decides
        (["a.mp4", "2.jpg"], ("a.mp4", "2.jpg")),
        ([PurePosixPath("1.png")], ((PurePosixPath("1.png"),),)),
        ([PICTURE, b"x"], ((PICTURE, b"x"),)),
        (["http://h/1.webp?size=2#x"], (("http://h/1.webp?size=2#x",),)),
        (["http://h/clip.mp4?cover=1.webp"], ("http://h/clip.mp4?cover=1.webp",)),
        (["file:///a%20b/1%2Egif"], (("file:///a%20b/1%2Egif",),)),
        (["data:image/png;base64,xx"], (("data:image/png;base64,xx",),)),
        (["data:video/mp4;base64,xx"], ("data:video/mp4;base64,xx",)),
        (["1.svg"], (("1.svg",),)),
        (["1.tif"], ("1.tif",)),  # not in the reference's list
        ([["1.jpg", "2.jpg"], "a.mp4"], (("1.jpg", "2.jpg"), "a.mp4")),
        ([[b"1", b"2"]], ((b"1", b"2"),)),
        (["http://[/1.jpg"], ("http://[/1.jpg",)),
    ],
)
def test_videos(video: Any, expected: tuple[Any, ...]) -> None:
    assert parse_item({"video": video}).videos == expected


def test_numpy_pictures_are_copied() -> None:
    array = np.zeros((3, 5, 3), np.uint8)
    (image,) = parse_item({"image": array}).images
    (frames,) = parse_item({"video": [array, array]}).videos
    (transposed,) = parse_item(array.transpose(1, 0, 2)).images
    array[:] = 255
    assert isinstance(image, PIL.Image.Image) and isinstance(transposed, PIL.Image.Image)
    assert image.size == (5, 3) and image.getextrema() == ((0, 0),) * 3
    assert transposed.size == (3, 5)
    assert isinstance(frames, tuple) and len(frames) == 2


class _Odd:
    def __fspath__(self) -> bytes:
        return b"name"


def test_other_path_types() -> None:
    assert parse_item({"image": _Odd()}).images == ("name",)


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        (None, "invalid_type", "the input is a NoneType, expected a string, a PIL image, a numpy"),
        (5, "invalid_type", "the input is an int"),
        (b"x", "invalid_type", "the input is a bytes"),
        (["a"], "invalid_type", "the input is a list"),
        ({"txet": "a"}, "invalid_type", "unknown key 'txet'; allowed are text, image, video"),
        ({1: "a", "text": "b"}, "invalid_type", "unknown key 1;"),
        ({"text": 5}, "invalid_type", "`text` is an int, expected a string"),
        ({"text": ["a", None]}, "invalid_type", r"`text`\[1\] is a NoneType"),
        ({"text": [["a"]]}, "invalid_type", r"`text`\[0\] is a list"),
        ({"text": b"a"}, "invalid_type", "`text` is a bytes"),
        ({"image": 5}, "invalid_type", "`image` is an int, expected a path, a URL"),
        ({"image": [None]}, "invalid_type", r"`image`\[0\] is a NoneType"),
        ({"image": [["a"]]}, "invalid_type", r"`image`\[0\] is a list"),
        ({"image": {"url": "a"}}, "invalid_type", "`image` is a dict"),
        ({"image": ""}, "invalid_value", "`image` is an empty name"),
        ({"image": "  "}, "invalid_value", "`image` is an empty name"),
        ({"image": np.zeros((3, 3), np.uint8)}, "invalid_type", r"\[3, 3\] of uint8, expected"),
        ({"image": np.zeros((3, 3, 3))}, "invalid_type", "of float64"),
        ({"image": np.zeros((0, 3, 3), np.uint8)}, "invalid_type", r"\[0, 3, 3\]"),
        ({"video": 5}, "invalid_type", "`video` is an int, expected a path"),
        ({"video": PICTURE}, "invalid_type", "put a single picture under `image` or in a list"),
        ({"video": [[]]}, "invalid_value", r"`video`\[0\] is a video without frames"),
        ({"video": [None]}, "invalid_type", r"`video`\[0\] is a NoneType"),
        ({"video": ["a.jpg", 5]}, "invalid_type", r"`video`\[1\] is an int"),
        ({"video": [[["a"]]]}, "invalid_type", r"`video`\[0\]\[0\] is a list"),
        ({"video": ["a.mp4", PICTURE]}, "invalid_type", r"`video`\[1\] is an Image"),
        ({"instruction": 5}, "invalid_type", "`instruction` is an int"),
        ({"instruction": ["a"]}, "invalid_type", "`instruction` is a list"),
        ({"text": "\ud800"}, "invalid_text", "`text` has a lone surrogate .U.D800. at character 0"),
        ("ab\udfff", "invalid_text", "the input has a lone surrogate .U.DFFF. at character 2"),
        ({"instruction": "\ud800"}, "invalid_text", "`instruction`"),
        ({"fps": 0}, "invalid_value", "`fps` is 0, expected a finite number above 0"),
        ({"fps": -1.5}, "invalid_value", "-1.5"),
        ({"fps": math.nan}, "invalid_value", "nan"),
        ({"fps": math.inf}, "invalid_value", "inf"),
        ({"fps": 10**400}, "invalid_value", "finite"),
        ({"fps": True}, "invalid_type", "`fps` is a bool"),
        ({"fps": "2"}, "invalid_type", "`fps` is a str"),
        ({"max_frames": 1}, "invalid_value", "`max_frames` is 1, expected at least 2"),
        ({"max_frames": 2.0}, "invalid_type", "`max_frames` is a float"),
        ({"max_frames": True}, "invalid_type", "`max_frames` is a bool"),
    ],
)
def test_refuses(value: Any, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_item(value)
    assert caught.value.code == code


def test_messages_stay_short() -> None:
    with pytest.raises(InputError) as caught:
        parse_item({"k" * 10_000: 1})
    assert len(str(caught.value)) < 300
    assert shorten("x" * 100, 10) == "x" * 9 + "…"


def test_check_text_returns_the_text() -> None:
    assert check_text("\U0001f600 ok", "text") == "\U0001f600 ok"


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),  # lone surrogates included
    st.binary(max_size=4),
    st.sampled_from(["a.jpg", "http://[", "http://h:x/1.png", "data:", "file://", PICTURE]),
    st.builds(np.zeros, st.sampled_from([(2, 2, 3), (1,), (0, 1, 3)]), st.just(np.uint8)),
)
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
_KEYS = st.sampled_from(["text", "image", "video", "instruction", "fps", "max_frames"])


@given(st.one_of(_VALUES, st.dictionaries(st.one_of(_KEYS, st.text(max_size=3)), _VALUES)))
def test_never_raises_anything_else(value: Any) -> None:
    try:
        item = parse_item(value)
    except InputError as error:
        assert error.code in {"invalid_type", "invalid_value", "invalid_text"}
        assert re.search(r"\w", str(error))
    else:
        assert item.videos or item.images or item.texts
