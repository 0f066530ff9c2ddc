"""Opening and decoding of pictures."""

from __future__ import annotations

import base64
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlfast.errors import InputError
from qvlfast.media import MediaPolicy, describe, load_image, open_media

POLICY = MediaPolicy()
COLOUR = (200, 100, 50)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return picture.convert(mode)


PNG = encoded(noise())


def same(a: PIL.Image.Image, b: PIL.Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def refused(source: Any, policy: MediaPolicy = POLICY) -> InputError:
    with pytest.raises(InputError) as caught:
        load_image(source, policy)
    return caught.value


def test_every_kind_of_source(tmp_path: Path) -> None:
    path = tmp_path / "a picture %41 #1?.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    sources: list[Any] = [
        PNG,
        path,
        str(path),
        f"file://{path}",  # spaces, '%41', '#' and '?' as they are
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=x;BASE64,{text[:100]}\n {text[100:]}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png,{quote(PNG)}",
        f"data:,{quote(PNG)}",
        noise(),
    ]
    path.with_name("a picture A #1?.png").write_bytes(PNG)  # '%41' is 'A' in a URL
    for source in sources:
        assert same(load_image(source, POLICY), noise()), describe(source)
    assert same(load_image(f"file://localhost{quote(str(path))}", POLICY), noise())


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG", "PPM", "ICO"])
def test_formats(format: str) -> None:
    decoded = load_image(encoded(noise(), format), POLICY)
    assert decoded.mode == "RGB"
    assert same(decoded, PIL.Image.open(io.BytesIO(encoded(noise(), format))).convert("RGB"))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "F", "I"]
)
def test_other_modes_are_converted_as_pillow_does(mode: str) -> None:
    picture = noise("L").convert(mode) if mode in {"LA", "PA"} else noise().convert(mode)
    assert same(load_image(picture, POLICY), picture.convert("RGB"))


def test_transparency_lies_on_white() -> None:
    picture = PIL.Image.new("RGBA", (3, 1), (*COLOUR, 255))
    picture.putpixel((1, 0), (*COLOUR, 0))
    picture.putpixel((2, 0), (0, 0, 0, 128))
    pixels = [load_image(picture, POLICY).getpixel((x, 0)) for x in range(3)]
    assert pixels == [COLOUR, (255, 255, 255), (127, 127, 127)]


def test_palette_with_transparency_keeps_its_colours_without_a_warning() -> None:
    data = encoded(noise("P"), transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = load_image(data, POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(decoded, PIL.Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_deep_grey_is_scaled(format: str) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    decoded = load_image(encoded(PIL.Image.fromarray(levels), format), POLICY)
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_deep_grey_of_many_rows_and_both_byte_orders() -> None:
    levels = np.random.default_rng(0).integers(0, 1 << 16, (700, 3), dtype=np.uint16)
    expected = np.round(levels / 65535 * 255)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        picture = PIL.Image.frombytes(mode, (3, 700), levels.astype(order).tobytes())
        decoded = np.asarray(load_image(picture, POLICY))
        assert (decoded == expected[:, :, None]).all()


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.linspace(0, 1, 12, dtype=np.float32), "values from 0 to 1,"),
        (np.linspace(-1, 1, 12, dtype=np.float32), "values from -1 to 1,"),
        (np.linspace(0, 1000, 12, dtype=np.float32), "values from 0 to 1000,"),
        (np.full(12, np.nan, dtype=np.float32), "values from"),
        (np.linspace(0, 65535, 12).astype(np.int32), "values from 0 to 65535,"),
        (np.linspace(-1000, 11, 12).astype(np.int32), "values from -1000 to 11,"),
    ],
)
def test_values_of_no_known_scale_are_refused(values: np.ndarray, what: str) -> None:
    picture = PIL.Image.fromarray(values.reshape(3, 4))
    for source in (picture, encoded(picture, "TIFF")):
        error = refused(source)
        assert error.code == "unreadable" and what in str(error)


@pytest.mark.parametrize(
    "domain", ["example.org", ".example.org", "Example.org:8080", "127.0.0.1", "[::1]:80", "a_b"]
)
def test_domains(domain: str) -> None:
    assert MediaPolicy(allow_media_domains=(domain,)).allow_media_domains == (domain,)


@pytest.mark.parametrize(
    "domain",
    [
        "https://x.org/",
        "x.org/",
        "*.x.org",
        "",
        " x.org",
        "x.org:",
        "u@x.org",
        "bücher.de",
        5,
        "::1",
    ],
)
def test_domains_that_would_never_match(domain: Any) -> None:
    with pytest.raises(ValueError, match=r"allow_media_domains has .*use a host such as"):
        MediaPolicy(allow_media_domains=("a.org", domain))


def test_first_frame_of_an_animation() -> None:
    frames = [PIL.Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data, POLICY).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_is_not_applied() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert load_image(encoded(noise(), "JPEG", exif=exif), POLICY).size == (40, 30)


def test_the_callers_picture_is_not_changed() -> None:
    for mode in ("RGB", "RGBA", "P", "L"):
        picture = noise(mode)
        before = (picture.mode, picture.tobytes(), dict(picture.info))
        load_image(picture, POLICY)
        assert (picture.mode, picture.tobytes(), dict(picture.info)) == before


def test_one_lazy_picture_in_many_threads() -> None:
    expected = noise("RGB", (300, 300))
    data = encoded(expected)
    for _ in range(5):
        lazy = PIL.Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as pool:
            decoded = list(pool.map(lambda _, lazy=lazy: load_image(lazy, POLICY), range(16)))
        assert all(same(picture, expected) for picture in decoded)


def test_missing_and_odd_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    table = [
        (str(tmp_path / "absent.png"), "not_found", "does not exist"),
        (str(tmp_path), "unreadable", "is a directory"),
        (str(tmp_path / "empty.png"), "unreadable", "is empty"),
        (str(tmp_path / "pipe"), "unreadable", "is not a regular file"),
        ("/dev/zero", "unreadable", "is not a regular file"),
        (tmp_path / "absent", "not_found", "does not exist"),
        (f"file://{tmp_path}/absent", "not_found", "does not exist"),
        ("file://elsewhere/a.png", "invalid_value", "names the host 'elsewhere'"),
        ("file://[/a.png", "invalid_value", "not a valid URL"),
        ("a\0b", "unreadable", "null"),
        ("A" * 50_000, "not_found", "base64 needs a `data:image"),
        ("ftp://host/a.png", "not_found", "does not exist"),
        (b"", "unreadable", "is empty"),
        (b"hello", "unreadable", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n", "unreadable", "known format"),
        ("data:image/png;base64", "unreadable", "has no comma"),
        ("data:image/png;base64,%%%", "unreadable", "not valid base64"),
        ("data:image/png;base64,aGk", "unreadable", "not valid base64"),
        ("data:image/png;base64,é", "unreadable", "not valid base64"),
        ("data:image/png;base64,", "unreadable", "is empty"),
        ("http://example.org/a.png", "not_allowed", "allow_media_domains"),
    ]
    for source, code, message in table:
        error = refused(source)
        assert (error.code, message in str(error)) == (code, True), (code, str(error))
        assert len(str(error)) < 400


def test_data_is_never_printed() -> None:
    secret = base64.b64encode(b"not a picture, but private").decode()
    error = refused(f"data:image/png;base64,{secret}")
    assert secret not in str(error) and "a data URI of" in str(error)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files(format: str) -> None:
    data = encoded(noise(), format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
        for size in (len(data) // 2, len(data) // 8, 20):
            assert refused(data[:size]).code == "unreadable"


@settings(max_examples=200)
@given(
    st.sampled_from([encoded(noise(), f) for f in ("PNG", "GIF", "TIFF", "WEBP", "BMP")]),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=8),
)
def test_fuzzed_files_never_crash(data: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(bytes(changed), POLICY).mode == "RGB"
        except InputError as error:
            assert error.code in {"unreadable", "too_large"}


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    small = MediaPolicy(max_bytes=len(PNG) - 1)
    data = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    sources: tuple[Any, ...] = (PNG, path, data, f"data:,{'a' * 4 * len(PNG)}")
    for source in sources:
        assert refused(source, small).code == "too_large"
    few = MediaPolicy(max_image_pixels=40 * 30 - 1)
    for source in (PNG, path, noise()):
        error = refused(source, few)
        assert error.code == "too_large" and "40x30 pixels" in str(error)
    assert load_image(PNG, MediaPolicy(max_image_pixels=1200)).size == (40, 30)


@pytest.mark.parametrize("side", [14_000, 30_000])  # Pillow warns about the one, refuses the other
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_bombs_are_refused_by_their_header(side: int, action: Any) -> None:
    header = bytearray(encoded(PIL.Image.new("1", (8, 8)), "BMP"))
    header[18:26] = side.to_bytes(4, "little") * 2
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert refused(bytes(header)).code == "too_large"


def test_local_files_can_be_forbidden(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    policy = MediaPolicy(allow_files=False)
    for source in (path, str(path), f"file://{path}"):
        error = refused(source, policy)
        assert error.code == "not_allowed" and "local file" in str(error)
    assert same(load_image(PNG, policy), noise())


def test_open_media_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with open_media(str(path), POLICY) as file:
        assert file.read() == PNG
    assert file.closed


def test_closed_pictures_are_an_error() -> None:
    lazy = PIL.Image.open(io.BytesIO(PNG))
    lazy.close()
    assert refused(lazy).code == "unreadable"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (b"abc", "a file of 3 bytes"),
        (noise(), "a PIL image (RGB, 40x30)"),
        (("a", "b"), "a list of 2 frames"),
        ("data:image/png;base64,xx", "a data URI of 24 characters"),
        ("https://user:word@host/a.png?token=1#f", "'https://host/a.png'"),
        ("x" * 500, f"'{'x' * 119}…'"),
    ],
)
def test_describe(source: object, shown: str) -> None:
    assert describe(source) == shown
