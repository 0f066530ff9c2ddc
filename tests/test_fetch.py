"""Downloads, against a server on this machine."""

from __future__ import annotations

import http.server
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest

from qvlfast import fetch as module
from qvlfast.errors import InputError
from qvlfast.fetch import fetch, is_listed, is_public, without_secrets
from qvlfast.media import MediaPolicy, load_image

_FILE = io.BytesIO()
PIL.Image.new("RGB", (4, 4), (1, 2, 3)).save(_FILE, "PNG")
PNG = _FILE.getvalue()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int = 200, body: bytes = PNG, **headers: str) -> None:
        self.send_response(status)
        whole = {"Content_Type": "image/png", "Content_Length": str(len(body)), **headers}
        for name, value in whole.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        name = self.path.partition("?")[0].strip("/")
        port = self.server.port
        if name.startswith("hop"):
            left = int(name[3:])
            location = f"/hop{left - 1}" if left else "/picture"
            self.answer(302, b"", Location=location)
        elif name == "elsewhere":
            self.answer(301, b"", Location="http://elsewhere.example/a.png")
        elif name == "metadata":
            self.answer(307, b"", Location=f"http://169.254.169.254:{port}/latest")
        elif name == "file":
            self.answer(302, b"", Location="file:///etc/passwd")
        elif name == "nowhere":
            self.answer(302, b"")
        elif name == "html":
            self.answer(Content_Type="text/html; charset=utf-8")
        elif name == "octets":
            self.answer(Content_Type="application/octet-stream")
        elif name == "untyped":
            self.answer(Content_Type="")
        elif name == "compressed":
            self.answer(Content_Encoding="gzip")
        elif name == "missing":
            self.answer(404)
        elif name == "short":
            self.answer(Content_Length=str(len(PNG) + 10))
        elif name == "endless":
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.end_headers()
            self.drip(b"x" * 65536, 0.0)
        elif name == "slow":
            self.answer(body=b"", Content_Length="1000")
            self.drip(b"x", 0.05)
        elif name == "slow-headers":
            self.drip(b"H", 0.05)
        else:
            self.answer()

    def drip(self, data: bytes, pause: float) -> None:
        try:
            for _ in range(1000):
                self.wfile.write(data)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            self.server.hung_up.set()
        self.close_connection = True


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    seen: list[tuple[str, str]]
    hung_up: threading.Event  # a client closed its side before all was sent

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as running:
        running.seen = []
        running.hung_up = threading.Event()
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: _Server, name: str, host: str = "127.0.0.1", **changes: Any) -> bytes:
    port = server.port
    options: dict[str, Any] = {
        "domains": (f"{host}:{port}",),
        "allow_private": True,
        "max_bytes": 1 << 20,
        "timeout_s": 5.0,
        **changes,
    }
    return fetch(f"http://{host}:{port}/{name}", **options)


@pytest.mark.parametrize("name", ["picture", "octets", "untyped", "hop4", "a b%20c/ü?q=1 2&r=%33"])
def test_downloads(server: _Server, name: str) -> None:
    assert get(server, name) == PNG


def test_load_image(server: _Server) -> None:
    host = f"127.0.0.1:{server.port}"
    policy = MediaPolicy(allow_media_domains=(host,), allow_private_hosts=True)
    assert load_image(f"http://{host}/picture", policy).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("hop5", "fetch_failed", "more than 5 redirects"),
        ("elsewhere", "not_allowed", "list 'elsewhere.example'"),
        ("metadata", "not_allowed", "list '169.254.169.254'"),
        ("file", "fetch_failed", "expected http:// or https://"),
        ("nowhere", "fetch_failed", "status 302 without a location"),
        ("html", "fetch_failed", "it is 'text/html', expected a picture or a video"),
        ("compressed", "fetch_failed", "compressed"),
        ("missing", "fetch_failed", "status 404"),
        ("short", "fetch_failed", "ended 10 bytes early"),
        ("endless", "too_large", "more than the limit of 1048576"),
    ],
)
def test_refusals(server: _Server, name: str, code: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        get(server, name)
    assert caught.value.code == code


def test_a_long_answer_is_refused_before_it_is_read(server: _Server) -> None:
    with pytest.raises(InputError, match=f"has {len(PNG)} bytes, more than the limit of 10"):
        get(server, "picture", max_bytes=10)


@pytest.mark.parametrize("name", ["slow", "slow-headers"])
def test_dripping_servers_are_cut_off(server: _Server, name: str) -> None:
    with pytest.raises(InputError, match=r"no answer within 0\.3 seconds"):
        get(server, name, timeout_s=0.3)
    assert server.hung_up.wait(60)  # not set where the answer was heard to its end


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match="could not be fetched") as caught:
            fetch(
                f"http://{host}/a?token=secret",
                domains=(host,),
                allow_private=True,
                max_bytes=10,
                timeout_s=2,
            )
    assert caught.value.code == "fetch_failed" and "secret" not in str(caught.value)


def test_private_addresses_are_refused(server: _Server) -> None:
    with pytest.raises(
        InputError, match=r"has the address 127\.0\.0\.1, which is not public"
    ) as caught:
        get(server, "picture", allow_private=False)
    assert caught.value.code == "not_allowed" and not server.seen


def _names(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> list[str]:
    """Let names stand for addresses; returns the list of the look-ups to come."""
    real, asked = socket.getaddrinfo, []

    def look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = str(host).removesuffix(".example")
        if name not in names:
            return real(host, port, *args, **options)
        asked.append(host)
        found = []
        for address in names[name]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            found.append((family, socket.SOCK_STREAM, 6, "", (address, port)))
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    _names(monkeypatch, mixed=["93.184.215.14", "10.0.0.1"])
    with pytest.raises(InputError, match=r"10\.0\.0\.1, which is not public"):
        fetch(
            "http://mixed.example/a.png",
            domains=("mixed.example",),
            allow_private=False,
            max_bytes=10,
            timeout_s=1,
        )


def test_the_checked_address_is_the_one_connected_to(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _names(monkeypatch, pictures=["127.0.0.1"])
    assert get(server, "picture", host="pictures.example") == PNG
    assert asked == ["pictures.example"]  # a second look-up could answer differently
    port = server.port
    assert server.seen == [("/picture", f"pictures.example:{port}")]


def test_secure_connections_name_the_server(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _names(monkeypatch, pictures=["127.0.0.1"])
    wrapped: list[str] = []

    class Secure:
        def __init__(self, plain: socket.socket) -> None:
            self.plain = plain

        def do_handshake(self) -> None:
            wrapped.append("handshake")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.plain, name)

    class Context:
        def wrap_socket(self, plain: socket.socket, server_hostname: str, **_: Any) -> Secure:
            wrapped.append(server_hostname)
            return Secure(plain)

    monkeypatch.setattr(ssl, "create_default_context", Context)
    host = f"pictures.example:{server.port}"
    options: dict[str, Any] = {"allow_private": True, "max_bytes": 1 << 20, "timeout_s": 5}
    assert fetch(f"https://{host}/picture", domains=(host,), **options) == PNG
    assert wrapped == ["pictures.example", "handshake"]
    with pytest.raises(InputError, match="redirects from https to something else"):
        fetch(f"https://{host}/elsewhere", domains=(host, "elsewhere.example"), **options)


def test_a_real_certificate_is_demanded(server: _Server) -> None:
    host = f"127.0.0.1:{server.port}"
    with pytest.raises(InputError, match="could not be fetched"):
        fetch(
            f"https://{host}/picture",
            domains=(host,),
            allow_private=True,
            max_bytes=10,
            timeout_s=2,
        )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "and a host"),
        ("http:///a.png", "and a host"),
        ("http://[", "not a valid URL"),
        ("http://host:99999/", "not a valid URL"),
        ("http://host:port/", "not a valid URL"),
        (f"http://{'ü' * 100}.example/", "not a valid URL"),
        ("http://user@host/a.png", "user names and passwords"),
        ("http://user:word@host/a.png", "user names and passwords"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        fetch(url, domains=("host",), allow_private=True, max_bytes=10, timeout_s=1)
    assert caught.value.code == "fetch_failed" and "word" not in str(caught.value).split(":")[0]


@pytest.mark.parametrize(
    ("host", "port", "entry", "expected"),
    [
        ("example.org", 443, "example.org", True),
        ("example.org", 80, "Example.ORG", True),
        ("example.org", 8080, "example.org", False),
        ("example.org", 8080, "example.org:8080", True),
        ("example.org", 443, "example.org:8080", False),
        ("a.example.org", 443, "example.org", False),
        ("a.example.org", 443, ".example.org", True),
        ("a.b.example.org", 443, ".example.org", True),
        ("example.org", 443, ".example.org", True),
        ("badexample.org", 443, ".example.org", False),
        ("badexample.org", 443, "example.org", False),
        ("example.org.evil.net", 443, ".example.org", False),
        ("::1", 8080, "[::1]:8080", True),
    ],
)
def test_is_listed(host: str, port: int, entry: str, expected: bool) -> None:
    assert is_listed(host, port, ("other.net", entry)) is expected
    assert not is_listed(host, port, ())


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d70e", True),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_is_public(address: str, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected


def test_without_secrets() -> None:
    assert without_secrets("https://u:p@host:1/a?b=c#d") == "https://host:1/a"
    assert without_secrets("http://[?secret") == "http://["
    assert len(without_secrets("http://host/" + "a" * 1000)) == 120


def test_no_proxy_is_used(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert get(server, "picture") == PNG
    assert module.MAX_REDIRECTS == 5
