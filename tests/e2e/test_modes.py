"""Clients that do not know of the cache: as their gateway (transparent mode), and by a hosts entry (reverse mode).

What is played in a `World` is a function of its own, because it runs in a process of its own.
"""

import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MB, Model, add_model, canonical, get, to_cdn, unique
from tests.e2e.test_gate import handshake
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.goclient import PullClient, PullError
from tests.support.http1 import connect
from tests.support.legacy import A0Client, A1Client
from tests.support.modern import ModernClient
from tests.support.origin import R2_HOST, REGISTRY_HOST, Origin
from tests.support.proxy import Proxy
from tests.support.transfer import TENSOR_TYPE, TransferClient
from tests.support.world import CACHE, CDN, CLIENT, OTHER, REGISTRY, World, play

GATEWAY = "transparent@0.0.0.0:8081"
HOSTS_ENTRY = f"reverse:https://{REGISTRY_HOST}@0.0.0.0:443"
PARTS: dict[str, Any] = {"min_part": MB, "max_part": 10 * MB, "backoff_unit_s": 0.05}
WATCHFUL: dict[str, Any] = {"stall_s": 1.0, "slow_s": 0.5, "dns": {R2_HOST: [CDN]}}
"""x/transfer with a tenth of its patience; since v0.34.2 it looks where the blob host's name leads."""
SMALLEST_COUNTED = 100 << 10
"""Smaller blobs tell x/transfer nothing about the speed of a line."""

_numbers = itertools.count(1)


def add_tensors(origin: Origin, layers: list[str]) -> Model:
    """Publish a model of these layers as tensors, which is what makes Ollama use x/transfer."""
    config = origin.add_blob(b'{"model_format":"safetensors"}')
    repository = f"library/tensors{next(_numbers)}"
    manifest = origin.add_model(repository, "latest", layers=[(TENSOR_TYPE, layer) for layer in layers], config=config)
    return Model(repository, tuple(layers), config, manifest)


def pull(client: PullClient, model: Model) -> None:
    """A pull that neither stalls nor has to ask twice."""
    report = client.pull(model.name)
    assert report.retries == report.stalls == 0, report
    for digest in model.blobs:
        assert client.blob_path(digest).exists(), digest


def assert_fetched_once(origin: Origin, *models: Model) -> None:
    for digest in {digest for model in models for digest in model.blobs}:
        assert origin.counters.cdn_bytes_by_digest[digest] == origin.blob(digest).size, digest


# --- the cache is the gateway


def gateway(world: World) -> None:
    world.redirect()
    origin = world.origin
    model = add_model(origin, unique(4 * MB))
    tensors = add_tensors(origin, [origin.add_blob(unique(size)) for size in (*[SMALLEST_COUNTED] * 24, 2 * MB)])
    with world.cache(GATEWAY) as proxy:
        for state in ("cold", "warm"):
            pull(A2Client(None, proxy.ca_file, world.folder / f"a2 {state}", **PARTS), model)
            pull(TransferClient(None, proxy.ca_file, world.folder / f"transfer {state}", **WATCHFUL), tensors)
    assert_fetched_once(origin, model, tensors)


def modern_gateway(world: World) -> None:
    world.redirect()
    origin = world.origin
    with world.cache(GATEWAY) as proxy:
        for version in ("0.35.1", "0.40.2", "0.40.3"):
            model, tensors = add_model(origin, unique(4 * MB)), add_tensors(origin, [origin.add_blob(unique(MB))])
            for state in ("cold", "warm"):
                for subject in (model, tensors):
                    folder = world.folder / f"{version} {subject.name} {state}"
                    options = {**PARTS, "version": version, "dns": {R2_HOST: [CDN], REGISTRY_HOST: [REGISTRY]}}
                    pull(ModernClient(None, proxy.ca_file, folder, **options), subject)
            assert_fetched_once(origin, model, tensors)
        assert not any("registry-address" in line for line in proxy.output)


def test_gateway_for_clients_that_bypass_proxies(tmp_path: Path) -> None:
    """What fetches past every proxy is cached by its gateway: parts, tensors, cold and warm."""
    play(modern_gateway, tmp_path)


@pytest.mark.long
def test_gateway(tmp_path: Path) -> None:
    """A2 and x/transfer pull through their gateway without knowing, and each byte crosses the line once."""
    play(gateway, tmp_path)


def slow_line(world: World) -> None:
    world.redirect()
    origin = world.origin
    small = [origin.add_blob(unique(SMALLEST_COUNTED)) for _ in range(20)]
    with world.cache(GATEWAY) as proxy:

        def new(folder: str, **options: Any) -> TransferClient:
            return TransferClient(None, proxy.ca_file, world.folder / folder, streams=4, **WATCHFUL, **options)

        pull(new("before"), add_tensors(origin, small))
        origin.rate_total = 20_000
        for version in ("current", "0.20.5", "0.14.0"):
            mixed = add_tensors(origin, [*small, origin.add_blob(unique(150_000))])
            began = time.monotonic()
            pull(new(version, version=version), mixed)
            assert time.monotonic() - began > 5, "expected a slow line"
            assert_fetched_once(origin, mixed)


@pytest.mark.long
def test_slow_line(tmp_path: Path) -> None:
    """Twenty hits and a blob of a slow line: x/transfer of any time finds it neither slow nor silent."""
    play(slow_line, tmp_path)


def strangers(world: World) -> None:
    world.redirect()
    origin = world.origin
    model = add_model(origin, unique(MB))
    with world.cache(GATEWAY) as proxy, plain_server(world) as asked:
        ours = {handshake(dial(address), REGISTRY_HOST).issuer for address in (REGISTRY, OTHER, "10.0.0.1")}
        assert len(ours) == 1, "expected the name to decide, whatever was dialled"
        assert "fake origin" not in str(ours)
        assert handshake(dial(REGISTRY), "localhost").subject.rfc4514_string() == "CN=fake origin"

        for address in ("10.0.0.1", CACHE, "198.51.100.1", "169.254.169.254"):
            proxy.forget_lines()
            with closing(dial(address)) as sock:
                assert is_ended(sock, b"SSH-2.0-x\r\n")
            proxy.wait_for_line(f"refused connection to {address}")

        # Plain HTTP is ours where Host is, whatever was dialled (--insecure); another name behind it is not.
        with connect(None, OTHER, 80, None) as connection:
            status, headers, _ = get(connection, model.blob_target, Host=REGISTRY_HOST)
            assert (status, headers["location"].partition("?")[0][:7]) == (307, "http://")
            for name in ("other.example", R2_HOST, CLIENT):
                response = connection.request("GET", model.blob_target, [("Host", name)])
                assert response.status == 421, name
                response.read()
            response = connection.request("GET", "http://other.example/", [("Host", REGISTRY_HOST)])
            assert response.status == 421
            response.read()
        assert not asked
        with connect(None, OTHER, 80, None) as connection:
            assert get(connection, "/", Host="other.example") == (200, {"content-length": "2"}, b"hi")
            # Passed on unread: so is what follows.
            assert get(connection, model.blob_target, Host=REGISTRY_HOST)[2] == b"hi"
        assert asked == ["/", model.blob_target]
        client = A2Client(None, proxy.ca_file, world.folder / "insecure", **PARTS)
        pull_insecurely = client.pull(f"http://{REGISTRY_HOST}/{model.repository}")
        assert pull_insecurely.retries == 0

    with world.cache(GATEWAY, ollama_cache_tunnel="none") as proxy:
        with closing(dial(REGISTRY)) as sock:
            assert is_ended(sock, b"SSH-2.0-x\r\n")
        proxy.wait_for_line("switched off")
        pull(A2Client(None, proxy.ca_file, world.folder / "no tunnels", **PARTS), model)


@pytest.mark.long
def test_strangers_behind_the_gateway(tmp_path: Path) -> None:
    """What is not ours is passed on unread to public addresses only, and no name or address leads elsewhere."""
    play(strangers, tmp_path)


def dial(address: str) -> socket.socket:
    return socket.create_connection((address, 443), timeout=20)


def is_ended(sock: socket.socket, greeting: bytes) -> bool:
    """Whether the peer ends the connection without a word."""
    try:
        sock.sendall(greeting)
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@contextmanager
def plain_server(world: World) -> Iterator[list[str]]:
    """Somebody else's web server at port 80; what it is asked for."""
    asked: list[str] = []
    with world.at("internet"):
        listening = socket.create_server((OTHER, 80))

    def serve() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as lines:
                for line in lines:
                    if line.startswith(b"GET "):
                        asked.append(line.split()[1].decode())
                    if line == b"\r\n":
                        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    threading.Thread(target=serve, daemon=True).start()
    with closing(listening):
        yield asked


# --- the registry's name leads to the cache


def hosts_entry(world: World) -> None:
    origin = world.origin
    model, secret = add_model(origin, unique(3 * MB)), add_model(origin, unique(2 * MB), private=True)
    tensors = add_tensors(origin, [origin.add_blob(unique(size)) for size in (*[SMALLEST_COUNTED] * 8, MB)])
    world.client_hosts({REGISTRY_HOST: CACHE})
    with world.cache(HOSTS_ENTRY) as proxy:
        pull(A2Client(None, proxy.ca_file, world.folder / "a2", **PARTS), model)
        A2Client(None, proxy.ca_file, world.folder / "private", **PARTS).pull(secret.name)
        pull(TransferClient(None, proxy.ca_file, world.folder / "transfer", **WATCHFUL), tensors)
        assert_fetched_once(origin, model, secret, tensors)
        with connect(None, REGISTRY_HOST, 443, proxy.ca_file) as connection:
            assert get(connection, secret.blob_target)[0] == 401
            status, headers, body = get(connection, model.blob_target, Range="bytes=5-7")
            assert (status, body) == (206, origin.blob(model.layer).read(5, 8))
            assert headers["location"].startswith("/ollama/docker/")
            assert get(connection, model.blob_target, Host=R2_HOST)[0] == 421
        with closing(dial(CACHE)) as sock, pytest.raises((ssl.SSLEOFError, ConnectionError)):
            handshake(sock, "other.example")
        proxy.wait_for_line(f"refused client {CLIENT}: expected one of {REGISTRY_HOST}")


def modern_hosts_entry(world: World) -> None:
    origin = world.origin
    world.client_hosts({REGISTRY_HOST: CACHE})
    with world.cache(HOSTS_ENTRY) as proxy:
        for version in ("0.35.1", "0.40.2", "0.40.3"):
            model, tensors = add_model(origin, unique(MB)), add_tensors(origin, [origin.add_blob(unique(MB))])
            options = {**PARTS, "version": version, "dns": {R2_HOST: [CDN], REGISTRY_HOST: [CACHE]}}
            with pytest.raises(PullError, match=f"{REGISTRY_HOST} resolves to non-public {CACHE}"):
                pull(ModernClient(None, proxy.ca_file, world.folder / f"{version} model", **options), model)
            pull(ModernClient(None, proxy.ca_file, world.folder / f"{version} tensors", **options), tensors)
            assert_fetched_once(origin, tensors)


def test_hosts_entry_for_clients_since_035(tmp_path: Path) -> None:
    """They take a blob's parts from public addresses only: safetensors models come, others say why they do not."""
    play(modern_hosts_entry, tmp_path)


def test_hosts_entry(tmp_path: Path) -> None:
    """Where the registry's name leads to the cache, A2 and x/transfer pull from it, private layers too."""
    play(hosts_entry, tmp_path)


def every_generation(world: World) -> None:
    origin = world.origin
    world.client_hosts({REGISTRY_HOST: CACHE})
    kinds: list[tuple[Callable[..., PullClient], dict[str, Any]]] = [
        (A0Client, {}),
        (A1Client, {**PARTS, "version": "0.1.30"}),
        (A1Client, {**PARTS, "version": "0.3.0"}),
        (A2Client, {**PARTS, "version": "0.5.7"}),
        (A2Client, {**PARTS, "version": "0.34.2"}),
        (Client2, {"threshold": MB}),
        (Client2, {"threshold": MB, "version": "0.6.0"}),
        (TransferClient, {**WATCHFUL, "version": "0.14.0"}),
        (TransferClient, {**WATCHFUL, "version": "0.20.5"}),
        (TransferClient, {**WATCHFUL, "resume_threshold": MB}),
    ]
    with world.cache(HOSTS_ENTRY) as proxy:
        for number, (kind, options) in enumerate(kinds):
            model = add_model(origin, unique(3 * MB))
            for state in ("cold", "warm"):
                pull(kind(None, proxy.ca_file, world.folder / f"{number} {state}", **options), model)
            assert_fetched_once(origin, model)
        with pytest.raises(PullError, match="unexpected status code 200"):
            A2Client(None, proxy.ca_file, world.folder / "0.3.9", version="0.3.9", **PARTS).pull(model.name)


@pytest.mark.long
def test_hosts_entry_for_every_generation(tmp_path: Path) -> None:
    """Cold and warm, all but A2 before v0.3.10, which takes nothing but a redirect to another host."""
    play(every_generation, tmp_path)


def loop(world: World) -> None:
    model = add_model(world.origin, unique(MB))
    world.client_hosts({REGISTRY_HOST: CACHE})
    with world.cache(HOSTS_ENTRY, hosts={REGISTRY_HOST: CACHE}) as proxy:
        with connect(None, REGISTRY_HOST, 443, proxy.ca_file) as connection:
            status, _, body = get(connection, model.manifest_target)
            assert status == 504
            assert b"expected registry.ollama.ai on another machine, got our own 10.77.0.1" in body
            assert get(connection, model.blob_target)[::2] == (508, b"")
            assert get(connection, "/v2/_catalog")[0] == 502
        proxy.wait_for_line(f"refused connection to {REGISTRY_HOST}: expected {REGISTRY_HOST} on another machine")
    assert not world.origin.counters.requests


@pytest.mark.long
def test_hosts_entry_on_the_wrong_machine(tmp_path: Path) -> None:
    """The cache's own machine has the clients' hosts entry: an error that names it, at once, and no loop."""
    play(loop, tmp_path)


# --- x/transfer, however it comes here


def test_a_head_is_held_until_the_blob_is_complete(origin: Origin, proxy: Proxy) -> None:
    """x/transfer counts a blob's speed from the head: it gets that when the last byte is there, and not before."""
    model = add_model(origin, unique(2 * MB))
    address = canonical(proxy, model)
    origin.rate_total = 200_000

    def fetch() -> tuple[float, bytes]:
        with to_cdn(proxy) as connection:
            response = connection.request("GET", address, [("User-Agent", "ollama-transfer/1.0")])
            return time.monotonic(), response.read()

    def has_bytes() -> bool:
        with to_cdn(proxy) as connection:
            return len(get(connection, address, Range="bytes=0-99999")[2]) == 100_000

    with ThreadPoolExecutor(1) as pool, to_cdn(proxy) as leaving:
        transfer = pool.submit(fetch)
        leaving.send(f"GET {address} HTTP/1.1\r\nHost: {R2_HOST}\r\nUser-Agent: ollama-transfer/1.0\r\n\r\n".encode())
        assert has_bytes()
        leaving.abort()
        proxy.wait_for_line("-> 200, 0 bytes")
        assert not transfer.done()
        released = time.monotonic()
        origin.rate_total = None
        head, body = transfer.result(30)
    assert head > released
    assert body == origin.blob(model.layer).read(0, 2 * MB)
