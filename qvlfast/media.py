"""From what names a picture or a video to an open file, and from a file to a decoded picture."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO, cast
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import PIL.Image

from .errors import InputError
from .fetch import fetch, without_secrets
from .inputs import ImageSource, shorten

# Pillow opens 16-bit grey of these as mode I, scaled so that 65535 is white.
_DEEP_FORMATS = frozenset({"PNG", "PPM"})

# Reading these runs another program (Ghostscript).
_REFUSED_FORMATS = frozenset({"EPS"})

# How far a resize goes beyond 0 to 255, at most; Pillow clips that.
_LEAST, _MOST = -256, 511

# Rows of 16-bit grey that are scaled at once: what that needs beside the picture stays small.
_STRIP = 256

# Two threads that load one lazily opened picture share its file position. Locks are taken by
# address: pictures cannot be hashed and take no weak reference as a key.
_load_locks = tuple(threading.Lock() for _ in range(64))


# A name, IPv4 or bracketed IPv6 address, and perhaps a port.
_DOMAIN = re.compile(
    r"(\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.I | re.A
)


@dataclass(frozen=True)
class MediaPolicy:
    """What may be read, and how much of it.

    Attributes:
        allow_media_domains: hosts that http(s) URLs may name. ``example.org`` is that host,
            ``.example.org`` its subdomains too, ``example.org:8080`` that port only; without a
            port, 80 and 443. Empty: nothing is fetched.
        allow_private_hosts: also fetch from loopback and private addresses of listed hosts.
        allow_files: paths and ``file://`` URLs may be read; off where callers are strangers.
        max_bytes: of one file, download or data URI.
        max_image_pixels: of one picture or video frame before resizing.
        max_decoded_frames: of one video file, whether they are used or not.
        timeout_s: for one download, redirects included.
    """

    allow_media_domains: tuple[str, ...] = ()
    allow_private_hosts: bool = False
    allow_files: bool = True
    max_bytes: int = 1 << 30
    max_image_pixels: int = 178_956_970
    max_decoded_frames: int = 250_000
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for entry in self.allow_media_domains:
            if not isinstance(entry, str) or not _DOMAIN.fullmatch(entry):
                raise ValueError(
                    f"allow_media_domains has {shorten(repr(entry))}: use a host such as "
                    "'example.org', '.example.org' for its subdomains too, or 'example.org:8080'; "
                    "no scheme, path or wildcard, and international names as xn--…"
                )


def describe(source: object) -> str:
    """A short name of a media source for messages: never its content, nor secrets in a URL."""
    if isinstance(source, bytes):
        return f"a file of {len(source)} bytes"
    if isinstance(source, PIL.Image.Image):
        return f"a PIL image ({source.mode}, {source.width}x{source.height})"
    if isinstance(source, tuple):
        return f"a list of {len(source)} frames"
    text = str(source)
    lower = text[:8].lower()
    if lower.startswith("data:"):
        return f"a data URI of {len(text)} characters"
    if lower.startswith(("http://", "https://")):
        text = without_secrets(text)
    return repr(shorten(text, 120))


@contextlib.contextmanager
def open_media(source: str | PurePath | bytes, policy: MediaPolicy) -> Iterator[BinaryIO]:
    """Open a path, URL, data URI or bytes as a seekable binary file.

    Raises:
        InputError: ``not_found``, ``unreadable``, ``too_large``, ``not_allowed`` or
            ``fetch_failed``; the message names the source shortly.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(_checked(source, policy, source))
        return
    text = str(source)
    scheme = text[:8].lower() if isinstance(source, str) else ""
    if scheme.startswith("data:"):
        yield io.BytesIO(_checked(_data_uri(text, policy), policy, source))
    elif scheme.startswith(("http://", "https://")):
        data = fetch(
            text,
            domains=policy.allow_media_domains,
            allow_private=policy.allow_private_hosts,
            max_bytes=policy.max_bytes,
            timeout_s=policy.timeout_s,
        )
        yield io.BytesIO(_checked(data, policy, source))
    else:
        if not policy.allow_files:
            raise InputError(
                "not_allowed",
                f"{describe(source)} is a local file, which this service does not read: send a "
                "data URI",
            )
        path = _file_url(text) if scheme.startswith("file://") else text
        with _open_file(path, policy, source) as file:
            yield file


def load_image(source: ImageSource, policy: MediaPolicy) -> PIL.Image.Image:
    """Read and decode one picture.

    Returns:
        A picture of mode RGB, at its own size, its EXIF orientation not applied. Animated
        pictures give their first frame. A caller's own RGB picture is returned itself.

    Raises:
        InputError: as :func:`open_media`; ``unreadable`` where it cannot be decoded, or its
            values have no known scale: floats up to 1, and what is far beyond 0 to 255 but for
            16-bit grey.
    """
    if isinstance(source, PIL.Image.Image):
        with _load_locks[id(source) // 16 % len(_load_locks)]:
            return _decode(source, policy, source)
    with open_media(source, policy) as file, _opened(file, source) as image:
        return _decode(image, policy, source)


def check_pixels(width: int, height: int, policy: MediaPolicy, source: object) -> None:
    """Refuse a picture or frame that is too large to decode, by what its header says.

    Raises:
        InputError: ``too_large``.
    """
    if width * height > policy.max_image_pixels:
        raise InputError(
            "too_large",
            f"{describe(source)} is {width}x{height} pixels, more than the limit of "
            f"{policy.max_image_pixels}: make it smaller",
        )


def _opened(file: BinaryIO, source: object) -> PIL.Image.Image:
    PIL.Image.init()
    formats = [name for name in PIL.Image.ID if name not in _REFUSED_FORMATS]
    try:
        return PIL.Image.open(file, formats=formats)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise _bomb(source, error) from None
    except PIL.UnidentifiedImageError:
        raise InputError(
            "unreadable", f"{describe(source)} is not a picture of a known format"
        ) from None
    except Exception as error:  # a broken header can raise anything in one of 40 decoders
        raise _undecodable(source, error) from error


def _decode(image: PIL.Image.Image, policy: MediaPolicy, source: object) -> PIL.Image.Image:
    check_pixels(image.width, image.height, policy, source)
    try:
        image.load()
        return _to_rgb(image, source)
    except InputError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise _bomb(source, error) from None
    except Exception as error:  # damaged data can raise anything in one of 40 decoders
        raise _undecodable(source, error) from error


def _to_rgb(image: PIL.Image.Image, source: object) -> PIL.Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "RGBA":
        white = PIL.Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_FORMATS):
        return _from_deep(image)
    if image.mode in ("F", "I"):
        _check_scale(image, source)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours; the direct way warns about the alpha that it drops.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _from_deep(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey as RGB; convert("RGB") would clip it to white."""
    scaled = PIL.Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        box = (0, top, image.width, min(top + _STRIP, image.height))
        deep = np.asarray(image.crop(box)).astype(np.uint32)
        grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
        scaled.paste(PIL.Image.fromarray(grey).convert("RGB"), box)
    return scaled


def _check_scale(image: PIL.Image.Image, source: object) -> None:
    """0 is black and 255 white, as Pillow has it; what looks like another scale is refused."""
    low, high = cast(tuple[float, float], image.getextrema())
    fractions = image.mode == "F" and 0 < high <= 1
    if fractions or not (low >= _LEAST and high <= _MOST):
        raise InputError(
            "unreadable",
            f"{describe(source)} has values from {low:g} to {high:g}, and what is white is not "
            "known: scale them to 0 to 255",
        )


def _bomb(source: object, error: Exception | Warning) -> InputError:
    return InputError(
        "too_large", f"{describe(source)} has too many pixels to be decoded safely ({error})"
    )


def _undecodable(source: object, error: Exception) -> InputError:
    reason = shorten(str(error), 120) or type(error).__name__
    return InputError("unreadable", f"{describe(source)} cannot be decoded: {reason}")


def _checked(data: bytes, policy: MediaPolicy, source: object) -> bytes:
    if not data:
        raise InputError("unreadable", f"{describe(source)} is empty")
    if len(data) > policy.max_bytes:
        raise _too_many_bytes(len(data), policy, source)
    return data


def _too_many_bytes(count: int, policy: MediaPolicy, source: object) -> InputError:
    return InputError(
        "too_large",
        f"{describe(source)} has {count} bytes, more than the limit of {policy.max_bytes}",
    )


def _data_uri(uri: str, policy: MediaPolicy) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError("unreadable", f"{describe(uri)} has no comma before its data")
    if len(payload) > 3 * policy.max_bytes:  # each byte takes at most three characters
        raise _too_many_bytes(len(payload) // 3, policy, uri)
    try:
        if not header.lower().endswith(";base64"):
            return unquote_to_bytes(payload)
        encoded = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        return base64.b64decode(encoded.translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("unreadable", f"{describe(uri)} is not valid base64: {error}") from None


def _file_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.netloc.lower()
    except ValueError:
        raise InputError("invalid_value", f"{describe(url)} is not a valid URL") from None
    if host not in ("", "localhost"):
        raise InputError(
            "invalid_value", f"{describe(url)} names the host {shorten(host)!r}: use file:///path"
        )
    # A name may hold `?` and `#`: what follows them is not dropped.
    path = url[len("file://") :]
    return url2pathname(path[len(host) :]) if os.name == "nt" else unquote(path[len(host) :])


def _open_file(path: str, policy: MediaPolicy, source: object) -> BinaryIO:
    try:
        # Opening a pipe or a terminal would wait for a writer.
        file = open(path, "rb", opener=lambda p, flags: os.open(p, flags | _NO_WAIT))  # noqa: SIM115
    except FileNotFoundError:
        raise InputError("not_found", f"{describe(source)} does not exist") from None
    except IsADirectoryError:
        raise InputError("unreadable", f"{describe(source)} is a directory") from None
    except (OSError, ValueError) as error:
        long = len(path) > 255
        hint = "; base64 needs a `data:image/…;base64,` in front" if long else ""
        reason = error.strerror if isinstance(error, OSError) else str(error)
        code = "not_found" if long else "unreadable"
        raise InputError(code, f"{describe(source)} cannot be opened: {reason}{hint}") from None
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError("unreadable", f"{describe(source)} is not a regular file")
        if status.st_size == 0:
            raise InputError("unreadable", f"{describe(source)} is empty")
        if status.st_size > policy.max_bytes:
            raise _too_many_bytes(status.st_size, policy, source)
    except BaseException:
        file.close()
        raise
    return file


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
