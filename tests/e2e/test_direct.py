"""Direct mode: large parts leave TLS for the blob server, where the client reaches it, and nothing else does."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.conftest import MB, Model, add_model, canonical, get, to_cdn, to_registry, unique
from tests.e2e.test_start import refused
from tests.support import foreign
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.foreign import Order, gguf
from tests.support.goclient import PullClient, PullReport
from tests.support.http1 import connect
from tests.support.legacy import A0Client, A1Client
from tests.support.origin import GOOD_TOKEN, R2_HOST, Origin
from tests.support.proxy import Proxy, free_port

ADDRESS: Final = "127.0.0.1"
LARGE: Final = 9 * MB
"""A part that is worth sending on."""
SMALL: Final = 8 * MB
"""One that is not."""
SIZE: Final = 3 * LARGE
PARTS: Final[dict[str, Any]] = {"min_part": LARGE, "max_part": LARGE, "backoff_unit_s": 0.05}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """An origin, and a cache that advertises where its blob server is: in a container it would not try otherwise."""
    folder = tmp_path_factory.mktemp("direct")
    with (
        Origin(folder / "origin") as origin,
        Proxy(folder, origin, front=True, ollama_cache_advertise=ADDRESS) as proxy,
    ):
        yield origin, proxy


@pytest.fixture
def settled(proxy: Proxy, origin: Origin) -> Proxy:
    """The cache, which knows that this client reaches its blob server."""
    address = canonical(proxy, add_model(origin, unique(LARGE)))
    deadline = time.monotonic() + 30
    # A trial may be out that the test before has left.
    while (status_at(proxy, address, follow=True)) != 307:
        assert time.monotonic() < deadline
    proxy.forget_lines()
    return proxy


def status_at(proxy: Proxy, address: str, *, follow: bool = False, **headers: str) -> int:
    """The status of a GET at the canonical address; a redirect is followed to the head of its answer."""
    with to_cdn(proxy) as connection:
        response = connection.request("GET", address, [(k.replace("_", "-"), v) for k, v in headers.items()])
        location = response.header("Location")
        if response.status != 307:
            assert location is None
            return response.status
        assert response.content_length == 0
        assert (response.header("Cache-Status") or "").endswith("; detail=direct")
    assert location == f"http://{ADDRESS}:{proxy.front_port}{address}"
    if follow:
        with connect(None, ADDRESS, proxy.front_port, None) as connection:
            assert connection.request("GET", address).status == 200
    return 307


def record(proxy: Proxy, model: Model) -> str:
    """Let the cache record the first layer; its canonical address."""
    address = canonical(proxy, model)
    with to_cdn(proxy) as connection:
        for start in range(0, SIZE, SMALL):
            get(connection, address, Range=f"bytes={start}-{start + SMALL - 1}")
    proxy.wait_for_line(model.recorded)
    return address


def is_direct(proxy: Proxy, url: str) -> bool:
    return url.startswith(f"http://{ADDRESS}:{proxy.front_port}/")


# --- every client

CLIENTS: Final[dict[str, tuple[Callable[..., PullClient], dict[str, Any]]]] = {
    "A0 0.1.1": (A0Client, {"version": "0.1.1"}),
    "A1 0.1.10": (A1Client, {"version": "0.1.10", **PARTS}),
    "A1 0.3.0": (A1Client, {"version": "0.3.0", **PARTS}),
    "A2 0.3.9": (A2Client, {"version": "0.3.9", **PARTS}),
    "A2 0.5.7": (A2Client, {"version": "0.5.7", **PARTS}),
    "A2 0.34.2": (A2Client, {"version": "0.34.2", **PARTS}),
    "A2 current": (A2Client, {"version": "current", **PARTS}),
    "client2 0.6.0": (Client2, {"version": "0.6.0", "threshold": 2 * MB, "chunk": LARGE}),
    "client2 chunksums": (Client2, {"version": "chunksums", "threshold": 2 * MB}),
}
QUICK: Final = {"A2 current"}


def pull(proxy: Proxy, kind: Callable[..., PullClient], model: Model, folder: Path, **options: Any) -> PullReport:
    """What `ollama pull` does behind HTTPS_PROXY; the blob is the right one, which the client has verified."""
    client = kind(proxy.url, proxy.ca_file, folder, **options)
    report = client.pull(model.name)
    assert client.blob_path(model.layer).stat().st_size == SIZE
    return report


@pytest.mark.parametrize(
    "client", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in CLIENTS]
)
def test_every_client(origin: Origin, settled: Proxy, tmp_path: Path, client: str) -> None:
    """Cold and warm, the bytes come from the blob server at once, and once from upstream."""
    kind, options = CLIENTS[client]
    origin.chunk_size = LARGE
    model = add_model(origin, unique(SIZE))
    for state in ("cold", "warm"):
        report = pull(settled, kind, model, tmp_path / state, **options)
        assert report.retries == report.stalls == 0
        large = [each for each in report.requests if model.layer[7:] in each.url and each.status in (200, 206)]
        direct = [each for each in large if is_direct(settled, each.url)]
        assert sum(int(dict(each.headers)["Content-Length"]) for each in direct) == SIZE, report.requests
        settled.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == SIZE


@pytest.mark.long
@pytest.mark.parametrize("client", foreign.CLIENTS, ids=lambda client: client.name)
def test_other_programs(origin: Origin, settled: Proxy, tmp_path: Path, client: foreign.Foreign) -> None:
    """They follow, each with the library that it has."""
    data = gguf(unique(SIZE - 24).read(0, SIZE - 24))
    model = add_model(origin, data)
    client.fetch(settled, Order(model.name, model.layer, tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == SIZE]
    assert any(path.read_bytes() == data for path in files)
    settled.wait_for_line("detail=direct")
    assert origin.counters.cdn_bytes_by_digest[model.layer] == SIZE


def test_tensors_and_other_caches_stay(origin: Origin, settled: Proxy) -> None:
    """x/transfer takes a second redirect for an error, and another cache would not follow it to a LAN."""
    address = record(settled, add_model(origin, unique(SIZE)))
    assert status_at(settled, address, User_Agent="ollama-transfer/1.0") == 200
    assert status_at(settled, address, CDN_Loop="ollama-cache-0123456789abcdef") == 200


# --- what leaves


def test_only_large_requests_leave(origin: Origin, settled: Proxy) -> None:
    """What the Range selects counts; conditions and bad ranges are answered where they are asked."""
    address = record(settled, model := add_model(origin, unique(SIZE)))
    tag = f'"{model.layer}"'
    least = 8 << 20
    for fields, expected in [
        ({}, 307),
        ({"Range": f"bytes=1-{least}"}, 307),
        ({"Range": f"bytes=1-{least - 1}"}, 206),
        ({"Range": f"bytes=-{least}"}, 307),
        ({"Range": f"bytes={SIZE - 5}-"}, 206),
        ({"Range": f"bytes={SIZE}-"}, 416),
        ({"If_None_Match": tag}, 304),
        ({"If_Match": '"other"'}, 412),
        ({"Range": "bytes=0-0", "If_Range": '"other"'}, 307),
    ]:
        assert status_at(settled, address, follow=expected == 307, **fields) == expected, fields
    with to_cdn(settled) as connection:
        assert connection.request("HEAD", address).status == 200


def test_private_blobs_stay_in_tls(origin: Origin, settled: Proxy) -> None:
    """What upstream gives to this caller alone does not cross the network in clear."""
    model = add_model(origin, blob := unique(LARGE), private=True)
    with to_registry(settled) as connection:
        status, headers, _ = get(connection, model.blob_target, Authorization=f"Bearer {GOOD_TOKEN}")
    assert status == 307
    with to_cdn(settled) as connection:
        status, _, body = get(connection, headers["location"].removeprefix(f"https://{R2_HOST}"))
    assert (status, body) == (200, blob.read(0, LARGE))


def test_what_comes_by_http_proxy_is_answered(origin: Origin, settled: Proxy) -> None:
    """A client that has the cache for HTTP_PROXY too brings the redirected request back: neither loop nor refusal."""
    address = record(settled, add_model(origin, blob := unique(LARGE)))
    for host, port in ((ADDRESS, settled.front_port), ("cache.lan", 80)):
        with connect(settled.url, host, port, None) as connection:
            assert get(connection, address)[::2] == (200, blob.read(0, LARGE))
            status, _, body = get(connection, address, Range=f"bytes=5-{LARGE - 1}")
            assert (status, body) == (206, blob.read(5, LARGE))
    # An address that was not handed out is anybody's, and refused like any other in here.
    with connect(settled.url, ADDRESS, settled.front_port, None) as connection:
        assert connection.request("GET", address[:-1] + ("0" if address[-1] != "0" else "1")).status == 502


# --- who leaves


@pytest.mark.long
def test_trial(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """One request is out on trial, the others are answered meanwhile; once it has come, all are sent on."""
    proxy = start_proxy(front=True, ollama_cache_advertise=ADDRESS)
    address = record(proxy, add_model(origin, unique(LARGE)))
    assert [status_at(proxy, address) for _ in range(3)] == [307, 200, 200]
    with connect(None, ADDRESS, proxy.front_port, None) as connection:
        assert connection.request("GET", address).status == 200
    proxy.wait_for_line(f"client {ADDRESS} reaches the blob server")
    assert [status_at(proxy, address, follow=True) for _ in range(3)] == [307, 307, 307]


def test_a_port_out_of_reach(origin: Origin, start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """A wrong guess costs one retry of one part, and is not repeated."""
    proxy = start_proxy(front=True, ollama_cache_advertise=f"{ADDRESS}:{free_port()}")
    model = add_model(origin, unique(SIZE))
    assert pull(proxy, A2Client, model, tmp_path / "cold", **PARTS).retries == 1
    assert pull(proxy, A2Client, model, tmp_path / "warm", **PARTS).retries == 0
    address = canonical(proxy, model)
    deadline = time.monotonic() + 20
    while not any("did not reach the blob server" in line for line in proxy.output):
        assert time.monotonic() < deadline
        assert status_at(proxy, address) == 200
    assert pull(proxy, A2Client, model, tmp_path / "later", **PARTS).retries == 0
    assert sum("detail=direct" in line for line in proxy.output) == 1


@pytest.mark.long
def test_on(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """No trial; without `advertise` at the address that the client reached, in a container too."""
    proxy = start_proxy(front=True, ollama_cache_direct="on")
    address = record(proxy, add_model(origin, unique(LARGE)))
    assert [status_at(proxy, address) for _ in range(3)] == [307, 307, 307]


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"ollama_cache_direct": "off", "front": True}, {"ollama_cache_advertise": ADDRESS}]
)
def test_off(origin: Origin, start_proxy: Callable[..., Proxy], options: dict[str, Any]) -> None:
    """By its own option, and where there is no blob server."""
    proxy = start_proxy(**options)
    assert status_at(proxy, record(proxy, add_model(origin, unique(LARGE)))) == 200


@pytest.mark.long
def test_on_needs_a_port(tmp_path: Path) -> None:
    """The start stops where nothing listens."""
    line = refused(tmp_path, ollama_cache_direct="on", ollama_cache_listen="off")
    assert "option ollama_cache_direct: expected auto or off where ollama_cache_listen is off" in line
