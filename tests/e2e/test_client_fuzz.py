"""Whatever clients send at either port: no traceback, a process that lives and serves others, and bounded memory."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.e2e.conftest import REGISTRY, Model, add_model, get, to_registry, unique
from tests.support.http1 import client_context, connect
from tests.support.origin import R2_HOST, Origin
from tests.support.proxy import Proxy

MEMORY_MIB: Final = 20
PATIENCE_S: Final = 0.3
"""How long an answer is waited for: there may be none."""
CONNECT: Final = f"CONNECT {REGISTRY}:443 HTTP/1.1\r\nHost: {REGISTRY}:443\r\n\r\n".encode()
TRACES: Final = ("Traceback", "Error:", " failed; refused", "request policy failed", "answering ", "crashed")
"""What the log says when something of ours, or of mitmproxy's, has not been thought of."""


@dataclass
class Scene:
    """A cache with one recorded model."""

    origin: Origin
    proxy: Proxy
    model: Model
    before_mib: float = 0.0

    def check(self) -> None:
        """Fail if the process is not what it was."""
        proxy, model = self.proxy, self.model
        assert proxy.is_running
        with connect(None, "127.0.0.1", proxy.front_port, None) as connection:
            assert get(connection, model.manifest_target)[::2] == (200, model.manifest)
            assert len(get(connection, model.blob_target, Range="bytes=0-")[2]) == 200_000
        with to_registry(proxy) as connection:
            assert get(connection, model.manifest_target)[::2] == (200, model.manifest)
        assert [line for line in proxy.output if any(trace in line for trace in TRACES)] == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("fuzz")
    options = {"ollama_cache_tunnel": "none", "ollama_cache_manifest_lifetime": "1h"}
    with Origin(folder / "origin") as origin, Proxy(folder, origin, front=True, **options) as proxy:
        model = add_model(origin, unique(200_000), repository="library/fuzz")
        with to_registry(proxy) as connection:
            assert get(connection, model.blob_target)[0] == 307
        scene = Scene(origin, proxy, model)
        scene.check()
        proxy.wait_for_line(model.recorded)
        yield scene


def dial(proxy: Proxy, door: str) -> socket.socket:
    """A socket to where bytes are to be thrown at."""
    sock = socket.create_connection(("127.0.0.1", proxy.front_port if door == "front" else proxy.port), timeout=20)
    if door in ("tunnel", "TLS"):
        sock.sendall(CONNECT)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    if door == "TLS":
        sock = client_context(proxy.ca_file).wrap_socket(sock, server_hostname=REGISTRY)
    return sock


# --- bytes. No authority names another machine than this one: the proxy would look for it.

_AUTHORITIES = st.sampled_from(
    [
        *(name.encode() for name in (REGISTRY, R2_HOST, REGISTRY.upper(), f"{REGISTRY}.", f"{REGISTRY}:443")),
        *(b"127.0.0.1:1", b"[::1]:22", b"", b"[", b":443", b"@", b"127.0.0.1:99999", b"127.0.0.1:-1", b"127.0.0.1:x"),
    ]
)
_PATHS = st.one_of(
    st.sampled_from(
        [
            *(
                b"/",
                b"/v2/",
                b"*",
                b"",
                b"//",
                b"/\xff\xfe",
                b"/%00%zz",
                b"/../../etc",
                b"/v2/library/fuzz/manifests/a b",
            ),
            *(b"/v2/library/fuzz/manifests/latest", b"/v2/library/fuzz/manifests/latest?x", b"/healthz", b"/metrics"),
            *(b"/" + b"a" * 9000, b"/v2/library/fuzz/blobs/sha256:" + b"0" * 64, b"/v2/library/fuzz/blobs/uploads/"),
            b"/ollama/docker/registry/v2/blobs/sha256/00/" + b"0" * 64 + b"/data?X-Amz-Signature=\xff",
        ]
    ),
    st.binary(max_size=30),
)
_TARGETS = st.one_of(
    _PATHS,
    st.tuples(st.sampled_from([b"http://", b"https://", b"HTTP://", b"ftp://", b"http:/"]), _AUTHORITIES, _PATHS).map(
        b"".join
    ),
    _AUTHORITIES,
)
_METHODS = st.sampled_from(
    [b"GET"] * 6
    + [
        b"HEAD",
        b"POST",
        b"PATCH",
        b"DELETE",
        b"CONNECT",
        b"OPTIONS",
        b"TRACE",
        b"PRI",
        b"get",
        b"",
        b"G\0T",
        b"X" * 5000,
    ]
)
_VERSIONS = st.sampled_from(
    [b" HTTP/1.1"] * 6 + [b" HTTP/1.0", b" HTTP/2.0", b" HTTP/0.9", b" HTTP/9.9", b"", b" http/1.1", b" HTTP/1.1 x"]
)
_NAMES = st.one_of(
    st.sampled_from(
        [
            *(
                b"Content-Length",
                b"Transfer-Encoding",
                b"Connection",
                b"Expect",
                b"Range",
                b"If-Range",
                b"If-None-Match",
            ),
            *(
                b"Authorization",
                b"Accept",
                b"Accept-Encoding",
                b"Upgrade",
                b"TE",
                b"Trailer",
                b"CDN-Loop",
                b"User-Agent",
            ),
            *(
                b"Proxy-Authorization",
                b"Cookie",
                b"Origin",
                b"Sec-Fetch-Site",
                b"",
                b"Bad Name",
                b"\0",
                b"HTTP2-Settings",
            ),
        ]
    ),
    st.binary(max_size=8),
)
_VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                b"0",
                b"5",
                b"-1",
                b"+5",
                b"5, 6",
                b"1e3",
                b"9" * 30,
                b"chunked",
                b"chunked, gzip",
                b"xchunked",
                b"close",
            ),
            *(b"keep-alive", b"upgrade", b"100-continue", b"bytes=0-", b"bytes=-0", b"bytes=9-1", b"bytes=0-,0-,0-"),
            *(b"h2c", b"websocket", b"ollama/\xff", b"x" * 9000, b"a\r\n b", b"\t", b"gzip;q=\xff", b"ollama-cache"),
        ]
    ),
    st.binary(max_size=30),
)
_ENDS = st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r", b"\r\r\n", b""])
_FIELDS = st.lists(
    st.tuples(_NAMES, st.sampled_from([b": "] * 5 + [b":", b" : ", b"", b"\n"]), _VALUES, _ENDS).map(b"".join),
    max_size=6,
)
_HOSTS = st.lists(st.tuples(st.just(b"Host: "), _AUTHORITIES, st.just(b"\r\n")).map(b"".join), max_size=2)
_BODIES = st.one_of(
    st.sampled_from(
        [
            *(
                b"",
                b"abc",
                b"3\r\nabc\r\n0\r\n\r\n",
                b"f" * 17 + b"\r\nabc",
                b'3;x="\r\nabc\r\n0\r\n\r\n',
                b"-3\r\nabc",
            ),
            *(
                b"3\r\nab",
                b"0\r\nX: y\r\n\r\n",
                b"0x3\r\nabc\r\n0\r\n\r\n",
                b"3\nabc\n0\n\n",
                b"0" * 9000 + b"3\r\nabc",
            ),
            *(b"3\r\nabcd\r\n0\r\n\r\n", b"\r\n\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00"),
        ]
    ),
    st.binary(max_size=60),
)


_PARTS = ("method", "space", "target", "version", "host", "fields", "end", "body")
_GOOD = st.sampled_from([b"/v2/library/fuzz/manifests/latest", b"/v2/library/absent/manifests/latest", b"/v2/", b"/"])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request of which one part or two are odd: what is odd altogether comes no further than the first line."""
    odd = draw(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=2))

    def part(name: str, strange: st.SearchStrategy[bytes], usual: bytes) -> bytes:
        return draw(strange) if name in odd else usual

    line = [
        part("method", _METHODS, b"GET"),
        part("space", st.sampled_from([b"  ", b"\t", b""]), b" "),
        part("target", _TARGETS, draw(_GOOD)),
        part("version", _VERSIONS, b" HTTP/1.1"),
        part("end", _ENDS, b"\r\n"),
    ]
    hosts = draw(_HOSTS) if "host" in odd else [f"Host: {REGISTRY}\r\n".encode()]
    fields = draw(st.permutations(hosts + (draw(_FIELDS) if "fields" in odd else [])))
    return b"".join([*line, *fields, part("end", _ENDS, b"\r\n"), part("body", _BODIES, b"")])


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Requests one behind the other, perhaps cut short, in two pieces."""
    data = b"".join(
        draw(st.lists(st.one_of(requests(), requests(), requests(), st.binary(max_size=100)), min_size=1, max_size=4))
    )
    if draw(st.integers(0, 5)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    at = draw(st.integers(0, len(data)))
    return [data[:at], data[at:]]


def throw(proxy: Proxy, door: str, pieces: list[bytes]) -> None:
    """Say it all, and hear what comes for a while."""
    with closing(dial(proxy, door)) as sock, contextlib.suppress(OSError):
        for piece in pieces:
            sock.sendall(piece)
        if not isinstance(sock, ssl.SSLSocket):
            sock.shutdown(socket.SHUT_WR)
        sock.settimeout(PATIENCE_S)
        while sock.recv(65536):
            pass


def walk(scene: Scene, door: str, pieces: list[bytes]) -> None:
    throw(scene.proxy, door, pieces)
    scene.check()
    # What the first connections take is no growth.
    scene.before_mib = scene.before_mib or scene.proxy.rss_mib()
    assert scene.proxy.rss_mib() - scene.before_mib < MEMORY_MIB


@given(door=st.sampled_from(["proxy", "front", "TLS", "tunnel"]), pieces=conversations())
@settings(max_examples=90)
def test_any_bytes(scene: Scene, door: str, pieces: list[bytes]) -> None:
    """The next client is served as ever."""
    walk(scene, door, pieces)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("door", ["proxy", "front", "TLS", "tunnel"])
@given(pieces=conversations())
@settings(max_examples=500)
def test_many_more_bytes(scene: Scene, door: str, pieces: list[bytes]) -> None:
    """The same, for longer."""
    walk(scene, door, pieces)
