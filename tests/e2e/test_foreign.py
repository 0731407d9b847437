"""What other clients than Ollama send: odd Accept fields, a range behind the end, a password for their proxy."""

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Final

import pytest

from tests.e2e.conftest import MB, PROXYING, REGISTRY, add_model, get, to_registry, unique
from tests.support.http1 import Connection, client_context, connect
from tests.support.origin import R2_HOST, Origin
from tests.support.proxy import Proxy

ACCEPTS: Final = {
    "empty": b"",
    "blank": b" \t ",
    "commas": b",;,=;q",
    "no type": b'"/*;q=\\',
    "10 kB": b"a/b;q=0.5, " * 910,
    "one long word": b"x" * 10_000,
    "not ASCII": "application/vnd.ollama.manifest.list.v2+json€".encode(),
    "not UTF-8": b"\xff\xfe\x80",
    "list, refused": b"application/vnd.ollama.manifest.list.v2+json;q=0",
    "something else": b"text/html",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """An origin, and a cache with its port without a proxy."""
    folder = tmp_path_factory.mktemp("foreign")
    with Origin(folder / "origin") as origin, Proxy(folder, origin, front=True) as proxy:
        yield origin, proxy


def to_front(proxy: Proxy) -> Connection:
    return connect(None, "127.0.0.1", proxy.front_port, None)


def ask(sock: socket.socket, target: str, host: str, *lines: bytes) -> tuple[int, dict[str, str], bytes]:
    """One GET with these lines in its head."""
    head = [f"GET {target} HTTP/1.1".encode(), f"Host: {host}".encode(), *lines, b"Connection: close", b"", b""]
    sock.sendall(b"\r\n".join(head))
    data = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in fields]
    return int(status.split(" ")[1]), {name.lower(): value for name, value in pairs}, body


def dial(proxy: Proxy, door: str) -> socket.socket:
    """A socket to the registry, through the proxy or at the port without one."""
    port = proxy.port if door == "proxy" else proxy.front_port
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    if door == "front":
        return sock
    sock.sendall(f"CONNECT {REGISTRY}:443 HTTP/1.1\r\nHost: {REGISTRY}:443\r\n\r\n".encode())
    assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    return client_context(proxy.ca_file).wrap_socket(sock, server_hostname=REGISTRY)


@pytest.mark.parametrize("door", ["proxy", "front"])
@pytest.mark.parametrize("accept", ACCEPTS)
def test_a_malformed_accept(origin: Origin, proxy: Proxy, door: str, accept: str) -> None:
    """A manifest is answered as if there were none, cold and stored, and upstream is asked in our own words."""
    host = REGISTRY if door == "proxy" else f"127.0.0.1:{proxy.front_port}"
    plain, odd = add_model(origin, b"x"), add_model(origin, b"x")
    for model, lines in ((plain, ()), (odd, (b"Accept: " + ACCEPTS[accept],))):
        for _ in ("cold", "stored"):
            with closing(dial(proxy, door)) as sock:
                status, fields, body = ask(sock, model.manifest_target, host, *lines)
            assert (status, body) == (200, model.manifest)
            assert fields["content-type"] == "text/plain"
    sent = {
        asked.headers["accept"]
        for asked in origin.counters.requests
        if asked.path in (plain.manifest_target, odd.manifest_target)
    }
    assert sent == {"application/vnd.docker.distribution.manifest.v2+json"}


@pytest.mark.parametrize("door", ["proxy", "front"])
@pytest.mark.parametrize("beyond", [0, 1, 1 << 40])
def test_a_range_behind_the_end(origin: Origin, proxy: Proxy, door: str, beyond: int) -> None:
    """ramalama goes on from the size of what it has, which may be all: 416 with the length, and no harm done."""
    size = 2 * MB
    model = add_model(origin, blob := unique(size))
    ranged = {"Range": f"bytes={size + beyond}-", "User_Agent": PROXYING}
    if door == "front":
        with to_front(proxy) as connection:
            answers = [get(connection, model.blob_target, **ranged) for _ in range(2)]
            whole = get(connection, model.blob_target, Range=f"bytes=0-{size - 1}")
    else:
        with to_registry(proxy) as connection:
            status, headers, _ = get(connection, model.blob_target, **ranged)
        assert status == 307
        address = headers["location"].removeprefix(f"https://{R2_HOST}")
        with connect(proxy.url, R2_HOST, 443, proxy.ca_file) as connection:
            answers = [get(connection, address, **ranged) for _ in range(2)]
            whole = get(connection, address)
    for status, headers, body in answers:
        assert (status, headers["content-range"], body) == (416, f"bytes */{size}", b"")
    assert whole[2] == blob.read(0, size)
    proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == size


SECRET: Final = "Basic Y2xpZW50OnBhc3N3b3Jk"


def test_the_proxys_password_stays_here(origin: Origin, proxy: Proxy) -> None:
    """What a client needs to use a proxy is told to nobody behind it: on no way, and by no line of the log."""
    model = add_model(origin, unique(200_000))
    field = (f"Proxy-Authorization: {SECRET}").encode()
    # CONNECT, and within the tunnel: a manifest, a blob, and what is passed on.
    targets = [model.manifest_target, model.blob_target, "/v2/library/x/tags/list", "/token?service=x"]
    with closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=20)) as raw:
        raw.sendall(f"CONNECT {REGISTRY}:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {SECRET}\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
    for target in targets:
        with closing(dial(proxy, "proxy")) as sock:
            ask(sock, target, REGISTRY, field)
        with closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=20)) as sock:
            ask(sock, f"http://{REGISTRY}{target}", REGISTRY, field)
        with closing(dial(proxy, "front")) as sock:
            ask(sock, target, f"127.0.0.1:{proxy.front_port}", field)
    with to_registry(proxy) as connection:
        fields = [("Proxy-Authorization", SECRET), ("Content-Length", "3")]
        response = connection.request("PATCH", f"/v2/{model.repository}/blobs/uploads/1", fields, b"abc")
        response.read()
        assert response.status == 202
    paths = {asked.path for asked in origin.counters.requests}
    assert {target.partition("?")[0] for target in targets} <= paths
    assert all("proxy-authorization" not in asked.headers for asked in origin.counters.requests)
    assert not any(SECRET in f"{asked.fields}" for asked in origin.counters.requests)
    assert not any("Y2xpZW50" in line or "Proxy-Authorization" in line for line in proxy.output)
