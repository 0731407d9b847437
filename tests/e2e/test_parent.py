"""A parent proxy as the only way out: names resolve nowhere else, and everything has to go through it."""

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.conftest import MB, REGISTRY, add_model, get, to_registry, unique
from tests.e2e.test_gate import tunnel
from tests.support.a2 import A2Client
from tests.support.connectproxy import ConnectProxy
from tests.support.http1 import ConnectRefused, connect
from tests.support.modern import ModernClient
from tests.support.origin import PUBLIC_ADDRESSES, R2_HOST, Origin
from tests.support.proxy import Proxy

NewClient = Callable[..., A2Client]
PASSWORD = "s3cret/word"
CREDENTIALS = "user:s3cret%2Fword"


class World(NamedTuple):
    """Everything there is, and the way to it."""

    origin: Origin
    parent: ConnectProxy
    proxy: Proxy
    echo: str
    """The authority of a server behind the parent that sends back what it is sent."""


def serve_echo(listening: socket.socket) -> None:
    while True:
        try:
            sock, _ = listening.accept()
        except OSError:
            return
        with closing(sock):
            while data := sock.recv(65536):
                sock.sendall(data)


class Plain(BaseHTTPRequestHandler):
    """A web server without TLS, which tells what it was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.path}\n{self.headers}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The cache gets no address of anything but its parent proxy, by the environment."""
    folder = tmp_path_factory.mktemp("parent")
    listening = socket.create_server(("127.0.0.1", 0))
    plain = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=serve_echo, args=(listening,), daemon=True).start()
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    with Origin(folder / "origin") as origin:
        resolves = {
            (REGISTRY, 443): ("127.0.0.1", origin.registry_port),
            (R2_HOST, 443): ("127.0.0.1", origin.cdn_port),
            ("echo.example", 443): ("127.0.0.1", int(listening.getsockname()[1])),
            ("web.example", 80): ("127.0.0.1", int(plain.server_address[1])),
        }
        with ConnectProxy(resolves, credentials=f"user:{PASSWORD}") as parent:
            way = f"http://{CREDENTIALS}@127.0.0.1:{parent.port}"
            with Proxy(
                folder,
                env={"HTTPS_PROXY": way, "http_proxy": way, "NO_PROXY": "intranet.example"},
                ssl_verify_upstream_trusted_ca=origin.ca_file,
            ) as proxy:
                yield World(origin, parent, proxy, "echo.example:443")
    plain.shutdown()
    plain.server_close()
    listening.close()


@pytest.fixture(autouse=True)
def fresh(world: World) -> Iterator[None]:
    """Each test begins with everything in order."""
    world.parent.restore()
    world.proxy.forget_lines()
    yield
    world.parent.restore()
    world.origin.restore()


def test_a_pull(world: World, new_client: NewClient) -> None:
    """Cold and warm; the password is told to the parent and to nobody else, and our own mark is on every CONNECT."""
    model = add_model(world.origin, unique(12 * MB), b"{{ .Prompt }}")
    client = new_client(world.proxy)
    report = client.pull(model.name)
    assert client.manifest_path(model.name).read_bytes() == model.manifest
    assert report.retries == report.stalls == 0
    assert world.origin.counters.cdn_bytes_by_digest[model.layer] == 12 * MB
    assert world.parent.targets == {f"{REGISTRY}:443", f"{R2_HOST}:443"}
    assert all(asked.headers["cdn-loop"].startswith("ollama-cache-") for asked in world.parent.asked)
    assert not any("proxy-authorization" in request.headers for request in world.origin.counters.requests)
    world.proxy.wait_for_line(model.recorded)
    world.parent.restore()
    new_client(world.proxy).pull(model.name)
    assert world.parent.asked == []
    assert any(f"through the parent proxy http://127.0.0.1:{world.parent.port}" in line for line in world.proxy.output)
    assert not any(secret in line for line in world.proxy.output for secret in (PASSWORD, CREDENTIALS, "dXNlcjpz"))


def test_tokens_and_pushes(world: World, new_client: NewClient) -> None:
    """What mitmproxy passes on by itself takes the same way: a private model's token, and an upload."""
    model = add_model(world.origin, unique(2 * MB), private=True)
    new_client(world.proxy).pull(model.name)
    assert len(world.origin.counters.tokens) == 1
    with to_registry(world.proxy) as connection:
        body = bytes(3 * MB)
        target = f"/v2/{model.repository}/blobs/uploads/1"
        response = connection.request("PATCH", target, [("Content-Length", str(len(body)))], body)
        assert response.status == 202
        response.read()
    assert [upload.size for upload in world.origin.counters.uploads] == [3 * MB]
    assert f"{REGISTRY}:443" in world.parent.targets
    assert not any("proxy-authorization" in request.headers for request in world.origin.counters.requests)


def test_a_tunnel(world: World) -> None:
    """Another host's bytes go through unread; where the CONNECT has been is passed on."""
    with closing(tunnel(world.proxy, world.echo)) as sock:
        sock.sendall(b"no TLS, and no HTTP either")
        assert sock.recv(100) == b"no TLS, and no HTTP either"
    (asked,) = world.parent.asked
    assert (asked.method, asked.target) == ("CONNECT", world.echo)


def test_a_plain_request(world: World) -> None:
    """http:// is asked of the parent in absolute form; web servers see neither its password nor anything missing."""
    with connect(world.proxy.url, "web.example", 80, None) as connection:
        status, _, body = get(connection, "/some/page?x=1")
    assert status == 200
    assert body.startswith(b"/some/page?x=1\n")
    assert b"Host: web.example\n" in body
    assert b"Proxy-Authorization" not in body
    (asked,) = world.parent.asked
    assert (asked.method, asked.target) == ("GET", "http://web.example:80/some/page?x=1")


OTHERS = "Basic b3RoZXI6c2VjcmV0"


def test_a_clients_password_is_not_the_parents(world: World) -> None:
    """The parent gets the cache's own, on every way, and the servers behind it get none."""
    field = f"Proxy-Authorization: {OTHERS}\r\n"
    with closing(socket.create_connection(("127.0.0.1", world.proxy.port), timeout=20)) as sock:
        sock.sendall(f"CONNECT {world.echo} HTTP/1.1\r\nHost: {world.echo}\r\n{field}\r\n".encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
    with connect(world.proxy.url, "web.example", 80, None) as connection:
        assert b"Proxy-Authorization" not in get(connection, "/", Proxy_Authorization=OTHERS)[2]
    model = add_model(world.origin, unique(200_000))
    with to_registry(world.proxy) as connection:
        for target in (model.manifest_target, model.blob_target, "/v2/library/x/tags/list"):
            get(connection, target, Proxy_Authorization=OTHERS)
    # What is asked anew, and not on a connection that was there.
    assert {"CONNECT", "GET"} == {asked.method for asked in world.parent.asked}
    own = f"Basic {base64.b64encode(f'user:{PASSWORD}'.encode()).decode()}"
    assert {asked.headers["proxy-authorization"] for asked in world.parent.asked} == {own}
    assert not any("proxy-authorization" in request.headers for request in world.origin.counters.requests)


def test_a_parent_without_a_password(tmp_path: Path) -> None:
    """It gets none: what a client says to us is not for it."""
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_echo, args=(listening,), daemon=True).start()
    resolves = {("echo.example", 443): ("127.0.0.1", int(listening.getsockname()[1]))}
    with closing(listening), Origin(tmp_path / "origin") as origin, ConnectProxy(resolves) as parent:
        way = f"http://127.0.0.1:{parent.port}"
        parent.resolves[REGISTRY, 443] = ("127.0.0.1", origin.registry_port)
        with Proxy(tmp_path, env={"HTTPS_PROXY": way}, ssl_verify_upstream_trusted_ca=origin.ca_file) as proxy:
            with closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=20)) as sock:
                head = f"CONNECT echo.example:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {OTHERS}\r\n\r\n"
                sock.sendall(head.encode())
                assert sock.recv(4096).startswith(b"HTTP/1.1 200")
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
            with to_registry(proxy) as connection:
                assert get(connection, "/v2/library/x/tags/list", Proxy_Authorization=OTHERS)[0] == 404
            assert parent.targets == {"echo.example:443", f"{REGISTRY}:443"}
            assert all("proxy-authorization" not in asked.headers for asked in parent.asked)
            assert all("proxy-authorization" not in asked.headers for asked in origin.counters.requests)


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "169.254.169.254", "[::ffff:10.0.0.1]", "127.1", "printer", "printer.local", "db.internal"]
)
def test_no_door_into_the_parents_network(world: World, host: str) -> None:
    """What is not public by its spelling is refused here: the parent might well lead there."""
    with pytest.raises(ConnectRefused, match="403"):
        connect(world.proxy.url, host, 443, world.proxy.ca_file)
    with connect(world.proxy.url, host, 80, None) as connection:
        response = connection.request("GET", "/", [("Host", host)])
        assert response.status == 502
        response.read()
    assert world.parent.asked == []


def test_exceptions_go_past_the_parent(world: World) -> None:
    """NO_PROXY and loopback are tried directly, and judged as ever."""
    for host in ("intranet.example", "localhost"):
        with closing(tunnel(world.proxy, f"{host}:443")) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b""
        world.proxy.wait_for_line(f"refused connection to {host}")
    assert world.parent.asked == []


@pytest.mark.parametrize(
    ("status", "said"),
    [(407, "answered 407"), (502, "answered 502"), (0, "answered nothing")],
    ids=["407", "502", "closes"],
)
def test_a_parent_that_refuses(world: World, status: int, said: str) -> None:
    """The client is told in the registry's own shape, and the log says what the parent said."""
    world.parent.disconnect()
    world.parent.status = status
    with to_registry(world.proxy) as connection:
        answer, headers, body = get(connection, "/v2/library/unheard/manifests/latest")
        assert (answer, headers["content-type"]) == (504, "application/json")
        assert said.encode() in body
        response = connection.request("POST", "/v2/library/unheard/blobs/uploads/", [("Content-Length", "0")])
        assert response.status == 502
        response.read()
    world.proxy.wait_for_line(f"{REGISTRY}:443 through the parent proxy: ")
    with closing(tunnel(world.proxy, world.echo)) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b""
    world.proxy.wait_for_line("echo.example:443 through the parent proxy: ")


@pytest.mark.long
def test_ourselves(origin: Origin, tmp_path: Path, new_client: NewClient) -> None:
    """The variables of a machine whose programs are to use the cache: it says so and does not use itself."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    model = add_model(origin, unique(MB))
    way = f"http://127.0.0.1:{port}"
    proxy = Proxy(tmp_path, origin, env={"HTTPS_PROXY": way, "HTTP_PROXY": way})
    proxy.port = port
    with proxy:
        proxy.wait_for_line(f"the environment's proxy {way} is this cache: not used")
        new_client(proxy).pull(model.name)
        with pytest.raises(ConnectRefused, match="403"):
            connect(proxy.url, "example.com", 22, proxy.ca_file)


@pytest.mark.long
def test_a_circle(tmp_path: Path) -> None:
    """Two caches that use each other as parents: a request ends at once, wherever it would have gone."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(int(probe.getsockname()[1]))
    caches = []
    for port, other in (ports, reversed(ports)):
        folder = tmp_path / str(port)
        folder.mkdir()
        cache = Proxy(
            folder,
            env={"HTTPS_PROXY": f"http://127.0.0.1:{other}"},
            ssl_verify_upstream_trusted_ca=tmp_path / "both.pem",
            ollama_cache_certs=tmp_path / "certs",
        )
        cache.port = port
        caches.append(cache)
    first, second = caches
    # Both have one authority, so that each takes the other for the registry.
    with Proxy(tmp_path, ollama_cache_certs=tmp_path / "certs") as maker:
        (tmp_path / "both.pem").write_bytes(maker.ca_file.read_bytes())
    with first, second, to_registry(first) as connection:
        status, _, body = get(connection, "/v2/library/circle/manifests/latest")
        assert status == 508, body
        assert b"leads back here" in body
        status, _, body = get(connection, f"/v2/library/circle/blobs/sha256:{'0' * 64}")
        assert (status, body) == (508, b"")
        # Passed through: the second one finds the way blocked, and says so as any proxy would.
        assert get(connection, "/v2/")[0] == 502
        with closing(tunnel(first, "echo.example:443")) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b""
        second.wait_for_line("echo.example:443 through the parent proxy: ")


@pytest.mark.long
def test_a_cache_behind_a_cache(origin: Origin, tmp_path: Path, new_client: NewClient) -> None:
    """A cache whose parent proxy is another one: each byte comes from upstream once, and once from the parent."""
    folders = [tmp_path / name for name in ("parent", "child")]
    for folder in folders:
        folder.mkdir()
    model = add_model(origin, unique(12 * MB), b"{{ .Prompt }}")
    with (
        Proxy(folders[0], origin) as parent,
        Proxy(folders[1], env={"HTTPS_PROXY": parent.url}, ssl_verify_upstream_trusted_ca=parent.ca_file) as child,
    ):
        for _ in range(2):
            client = new_client(child)
            report = client.pull(model.name)
            assert client.manifest_path(model.name).read_bytes() == model.manifest
            assert report.retries == report.stalls == 0
            child.wait_for_line(model.recorded)
        parent.wait_for_line(model.recorded)
        assert origin.counters.cdn_bytes_by_digest[model.layer] == 12 * MB
        parent.stop()
        origin.stop()
        new_client(child).pull(model.name)


@pytest.mark.long
def test_new_clients_of_a_cache_behind_a_cache(origin: Origin, tmp_path: Path) -> None:
    """The registry's own address passes through both: who uses the proxy hits the nearer, who does not completes."""
    folders = [tmp_path / name for name in ("parent", "child")]
    for folder in folders:
        folder.mkdir()
    model = add_model(origin, unique(4 * MB))
    with (
        Proxy(folders[0], origin) as parent,
        Proxy(folders[1], env={"HTTPS_PROXY": parent.url}, ssl_verify_upstream_trusted_ca=parent.ca_file) as child,
    ):
        trusted = tmp_path / "trusted.pem"
        trusted.write_bytes(child.ca_file.read_bytes() + origin.ca_file.read_bytes())
        options = {"dns": PUBLIC_ADDRESSES, "resolve": origin.resolve, "min_part": MB}
        for state in ("cold", "warm"):
            ModernClient(child.url, trusted, tmp_path / state, version="0.40.3", **options).pull(model.name)
            child.wait_for_line(model.recorded)
        parent.wait_for_line(model.recorded)
        assert origin.counters.cdn_bytes_by_digest[model.layer] == 4 * MB
        ModernClient(child.url, trusted, tmp_path / "past", version="0.40.2", **options).pull(model.name)
        assert origin.counters.cdn_bytes_by_digest[model.layer] == 2 * 4 * MB


@pytest.mark.long
def test_offline(origin: Origin, tmp_path: Path) -> None:
    """Nobody is asked, not even the parent."""
    with (
        ConnectProxy({}) as parent,
        Proxy(tmp_path, env={"HTTPS_PROXY": parent.url}, ollama_cache_offline=True) as proxy,
    ):
        with to_registry(proxy) as connection:
            assert get(connection, "/v2/library/absent/manifests/latest")[0] == 504
        assert parent.asked == []
