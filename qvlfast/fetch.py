"""Downloads of media that callers name by URL.

The caller of a service chooses the URL, so the address behind it is checked: a listed host
must resolve to public addresses only, and the connection goes to the very address that was
checked, after every redirect anew. Proxies from the environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import NoReturn
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from .errors import InputError

MAX_REDIRECTS = 5

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_TYPES = ("image/", "video/")
_BINARY_TYPES = frozenset({"application/octet-stream", "binary/octet-stream"})
_CHUNK = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(
    url: str, *, domains: tuple[str, ...], allow_private: bool, max_bytes: int, timeout_s: float
) -> bytes:
    """Download a picture or a video.

    Args:
        domains: hosts that may be asked; the notation is that of ``MediaPolicy``.
        allow_private: whether a listed host may have a loopback or private address.
        max_bytes: limit on the body.
        timeout_s: limit on the whole download.

    Raises:
        InputError: ``not_allowed``, ``too_large`` or ``fetch_failed``.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        parts, host, port = _target(url)
        if not is_listed(host, port, domains):
            raise InputError(
                "not_allowed",
                f"{without_secrets(url)!r} is not fetched: list {host!r} in allow_media_domains, "
                "or pass the file itself",
            )
        try:
            addresses = _resolve(host, port, url, allow_private)
            answer = _request(parts, host, port, addresses, max_bytes, deadline)
        except InputError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= deadline
            reason = f"no answer within {timeout_s:g} seconds" if late else str(error)
            _fail(url, reason or type(error).__name__)
        if isinstance(answer, bytes):
            return answer
        url = _redirected(url, answer)
    _fail(url, f"more than {MAX_REDIRECTS} redirects")


def is_listed(host: str, port: int, domains: tuple[str, ...]) -> bool:
    """Whether a list of domains allows a host (lower case, ASCII) and port."""
    for entry in domains:
        name, colon, number = entry.lower().rpartition(":")
        if colon and number.isdigit():
            ports: tuple[int, ...] = (int(number),)
        else:
            name, ports = entry.lower(), tuple(_PORTS.values())
        inside = name.startswith(".") and host.endswith(name)
        if port in ports and (inside or host == name.lstrip(".").strip("[]")):
            return True
    return False


def is_public(address: Address) -> bool:
    """Whether an address is on the open internet, whichever way it is written."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        tunnelled = [address.sixtofour, *(address.teredo or ())]
        if any(part is not None and not is_public(part) for part in tunnelled):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or address.is_loopback
        or address.is_link_local
        or address.is_private
        or address.is_unspecified
    )


def without_secrets(url: str) -> str:
    """A URL as a message may show it: no user, password, query or fragment."""
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        shown = url.partition("?")[0].partition("@")[0]
    return shown if len(shown) <= 120 else f"{shown[:119]}…"


def _fail(url: str, reason: str) -> NoReturn:
    raise InputError("fetch_failed", f"{without_secrets(url)!r} could not be fetched: {reason}")


def _target(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except (ValueError, UnicodeError):
        _fail(url, "it is not a valid URL")
    if parts.scheme not in _PORTS or not host:
        _fail(url, "expected http:// or https:// and a host")
    if parts.username is not None or parts.password is not None:
        _fail(url, "user names and passwords in URLs are not supported")
    return parts, host, port


def _redirected(url: str, location: str) -> str:
    try:
        target = urljoin(url, location)
    except ValueError:
        _fail(url, "it redirects to something that is not a URL")
    if urlsplit(url).scheme == "https" and not target.lower().startswith("https://"):
        _fail(url, "it redirects from https to something else")
    return target


def _resolve(host: str, port: int, url: str, allow_private: bool) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A zone (`fe80::1%eth0`) is dropped: link-local addresses are refused below.
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    hidden = [address for address in addresses if not is_public(address)]
    if not addresses:
        _fail(url, "the host has no address")
    if hidden and not allow_private:
        raise InputError(
            "not_allowed",
            f"{without_secrets(url)!r} is not fetched: {host!r} has the address {hidden[0]}, "
            "which is not public",
        )
    return addresses


class _Connection(http.client.HTTPConnection):
    """Connects to addresses that were checked, not to what the name means by then."""

    def __init__(self, host: str, port: int, addresses: list[Address], secure: bool) -> None:
        super().__init__(host, port)
        self.default_port = _PORTS["https" if secure else "http"]
        self.wire: socket.socket | None = None  # `sock`, which goes once the answer has begun
        self._addresses = addresses
        self._secure = secure

    def connect(self) -> None:
        error: OSError | None = None
        for address in self._addresses:
            try:
                plain = socket.create_connection((str(address), self.port), self.timeout)
            except OSError as failed:
                error = failed
                continue
            self.sock = self.wire = plain
            if self._secure:
                context = ssl.create_default_context()
                secure = context.wrap_socket(
                    plain, server_hostname=self.host, do_handshake_on_connect=False
                )
                # The handshake comes after `wire` is set, so that the deadline can end it.
                self.sock = self.wire = secure
                secure.do_handshake()
            return
        raise error or OSError("no address to connect to")


@contextlib.contextmanager
def _cut_off(connection: _Connection, deadline: float) -> Iterator[None]:
    """Shut the connection at the deadline: a timeout of the socket alone starts anew with
    every byte that a slow server drips."""

    def shut() -> None:
        if connection.wire is not None:
            with contextlib.suppress(OSError):
                connection.wire.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()


def _request(
    parts: SplitResult,
    host: str,
    port: int,
    addresses: list[Address],
    max_bytes: int,
    deadline: float,
) -> bytes | str:
    """The body, or the location that the server redirects to."""
    url = parts.geturl()
    connection = _Connection(host, port, addresses, parts.scheme == "https")
    connection.timeout = max(0.001, deadline - time.monotonic())
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    with _cut_off(connection, deadline):
        headers = {"Accept": "image/*, video/*", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers={**headers, "User-Agent": "qvlfast"})
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            location = response.getheader("Location")
            if not location:
                _fail(url, f"status {response.status} without a location")
            return location
        _check_answer(response, url, max_bytes)
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > max_bytes:
                _refuse_size(url, f"over {max_bytes}", max_bytes)
        if time.monotonic() >= deadline:
            raise TimeoutError  # an answer that was shut off looks like one that ended
        if response.length:
            _fail(url, f"the answer ended {response.length} bytes early")
    return bytes(body)


def _check_answer(response: http.client.HTTPResponse, url: str, max_bytes: int) -> None:
    if response.status != http.HTTPStatus.OK:
        _fail(url, f"the server answered with status {response.status}")
    kind = response.headers.get("Content-Type", "application/octet-stream")
    kind = kind.partition(";")[0].strip().lower()
    if not kind.startswith(_TYPES) and kind not in _BINARY_TYPES:
        _fail(url, f"it is {kind[:60]!r}, expected a picture or a video")
    if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        _fail(url, "the server sent it compressed although asked not to")
    if response.length is not None and response.length > max_bytes:
        _refuse_size(url, str(response.length), max_bytes)


def _refuse_size(url: str, count: str, max_bytes: int) -> NoReturn:
    raise InputError(
        "too_large",
        f"{without_secrets(url)!r} has {count} bytes, more than the limit of {max_bytes}",
    )
