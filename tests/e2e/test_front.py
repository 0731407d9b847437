"""The port without a proxy: `ollama pull --insecure http://cache:9200/library/...`, by name and by address."""

import contextlib
import http.client
import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final

import pytest
from typer.testing import CliRunner

from pullthrough.cli import app as cli
from pullthrough.core.ranges import ByteRange, Unsatisfiable, parse_range
from pullthrough.runtime import platform
from tests.e2e.conftest import MB, Model, add_model, canonical, get, to_cdn, unique
from tests.e2e.test_start import refused
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.goclient import PullClient, PullError
from tests.support.http1 import ClosedBeforeResponse, Connection, connect
from tests.support.legacy import A0Client, A1Client
from tests.support.modern import ModernClient
from tests.support.origin import R2_HOST, Fault, Mode, Origin
from tests.support.proxy import Proxy, free_port
from tests.support.transfer import TransferClient

NAME: Final = "cache.lan"
ADDRESS: Final = "127.0.0.1"
SIZE: Final = 3 * MB
PARTS: Final[dict[str, Any]] = {"min_part": MB, "max_part": 10 * MB, "backoff_unit_s": 0.05}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """An origin, and a cache with its port without a proxy."""
    folder = tmp_path_factory.mktemp("front")
    with Origin(folder / "origin") as origin, Proxy(folder, origin, front=True) as proxy:
        yield origin, proxy


def to_front(proxy: Proxy, host: str = ADDRESS) -> Connection:
    """A connection to the port, asked for by `host`."""
    resolve = {(NAME, proxy.front_port): (ADDRESS, proxy.front_port)}
    return connect(None, host, proxy.front_port, None, resolve=resolve)


def address_of(proxy: Proxy, model: Model) -> str:
    """The canonical address (path and query) of the first layer at the port."""
    with to_front(proxy, NAME) as connection:
        status, headers, body = get(connection, model.blob_target)
    assert (status, headers["content-length"], body) == (307, "0", b"")
    base = f"http://{ADDRESS}:{proxy.front_port}"
    assert headers["location"].startswith(f"{base}/ollama/docker/registry/v2/blobs/sha256/{model.layer[7:9]}/")
    return headers["location"].removeprefix(base)


# --- every client

CLIENTS: Final[dict[str, tuple[Callable[..., PullClient], dict[str, Any]]]] = {
    "A0 0.1.1": (A0Client, {"version": "0.1.1"}),
    "A1 0.1.10": (A1Client, {"version": "0.1.10", "min_part": MB, "max_part": 4 * MB}),
    "A1 0.3.0": (A1Client, {"version": "0.3.0", **PARTS}),
    "A2 0.3.9": (A2Client, {"version": "0.3.9", **PARTS}),
    "A2 0.5.7": (A2Client, {"version": "0.5.7", **PARTS}),
    "A2 0.34.2": (A2Client, {"version": "0.34.2", **PARTS}),
    "A2 current": (A2Client, {"version": "current", **PARTS}),
    "M1 0.35.1": (ModernClient, {"version": "0.35.1", **PARTS}),
    "M2 0.40.2": (ModernClient, {"version": "0.40.2", **PARTS}),
    "M3 0.40.3": (ModernClient, {"version": "0.40.3", **PARTS}),
    "client2 0.6.0": (Client2, {"version": "0.6.0", "threshold": 2 * MB, "chunk": MB}),
    "client2 chunksums": (Client2, {"version": "chunksums", "threshold": 2 * MB}),
    "x/transfer 0.14.0": (TransferClient, {"version": "0.14.0"}),
    "x/transfer 0.20.5": (TransferClient, {"version": "0.20.5"}),
    "x/transfer current": (TransferClient, {"version": "current"}),
}
ONLY_BY_NAME: Final = {"A2 0.3.9"}
QUICK: Final = {"A2 0.3.9", "A2 current", "M1 0.35.1", "M2 0.40.2", "client2 chunksums", "x/transfer current"}


def pull(proxy: Proxy, client: str, model: Model, folder: Path, host: str) -> PullClient:
    """What `ollama pull --insecure http://host:port/library/model` does."""
    kind, options = CLIENTS[client]
    resolve = {(NAME, proxy.front_port): (ADDRESS, proxy.front_port)}
    puller = kind(None, proxy.ca_file, folder, resolve=resolve, **options)
    report = puller.pull(f"http://{host}:{proxy.front_port}/{model.repository}")
    assert report.retries == report.stalls == 0
    return puller


@pytest.mark.parametrize("host", [NAME, ADDRESS], ids=["by name", "by address"])
@pytest.mark.parametrize(
    "client", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in CLIENTS]
)
def test_every_client(origin: Origin, proxy: Proxy, tmp_path: Path, client: str, host: str) -> None:
    """Cold, warm and with the registry gone; each byte comes from upstream once."""
    if host == ADDRESS and client in ONLY_BY_NAME:
        with pytest.raises(PullError, match="unexpected status code 200"):
            pull(proxy, client, add_model(origin, unique(SIZE)), tmp_path, host)
        return
    model = add_model(origin, blob := unique(SIZE))
    for state in ("cold", "warm", "offline"):
        if state == "offline":
            origin.stop()
        puller = pull(proxy, client, model, tmp_path / state, host)
        assert puller.blob_path(model.layer).read_bytes() == blob.read(0, SIZE)
        if state == "cold":
            proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == SIZE


@pytest.mark.parametrize("client", ["A0 0.1.1", "A2 current", "M1 0.35.1", "M2 0.40.2", "x/transfer current"])
def test_insecure_needs_no_scheme(origin: Origin, proxy: Proxy, tmp_path: Path, client: str) -> None:
    """`ollama pull --insecure host:port/library/model`: the flag alone makes it http, which client2 ignores."""
    model = add_model(origin, blob := unique(SIZE))
    kind, options = CLIENTS[client]
    puller = kind(None, proxy.ca_file, tmp_path, **options)
    puller.insecure = True
    puller.pull(f"{ADDRESS}:{proxy.front_port}/{model.repository}")
    assert puller.blob_path(model.layer).read_bytes() == blob.read(0, SIZE)
    client2 = Client2(None, proxy.ca_file, tmp_path, version="chunksums")
    client2.insecure = True
    with pytest.raises(PullError):
        client2.pull(f"{ADDRESS}:{proxy.front_port}/{model.repository}")


# --- what is answered


def test_a_blob_by_name_and_by_address(origin: Origin, proxy: Proxy) -> None:
    """By name 307 to the address, by address the bytes with a Location; the Host field never gets into either."""
    model = add_model(origin, data := unique(1000).read(0, 1000))
    address = address_of(proxy, model)
    with to_front(proxy) as connection:
        status, headers, body = get(connection, model.blob_target)
        assert (status, body) == (200, data)
        assert headers["location"].partition("?")[0] == address.partition("?")[0]
        assert get(connection, headers["location"])[::2] == (200, data)
        for host in ("evil.example", "evil.example:80", "localhost", "127.1", "[bad", "a@b"):
            status, headers, body = get(connection, model.blob_target, Host=host)
            assert status in (200, 307)
            assert "evil" not in str(headers)
            assert headers["location"].partition("/ollama/")[0] in ("", f"http://{ADDRESS}:{proxy.front_port}")
        # Ollama before v0.3.1 asks for its parts here.
        status, headers, body = get(connection, model.blob_target, Host=NAME, Range="bytes=10-19")
        assert (status, headers["content-range"], body) == (206, "bytes 10-19/1000", data[10:20])
        response = connection.request("HEAD", model.blob_target, [("Host", NAME)])
        assert (response.status, response.header("content-length"), response.read()) == (200, "1000", b"")
        assert response.header("location") is None
    assert not any("access=" in line for line in proxy.output)


def test_ipv6(origin: Origin, proxy: Proxy) -> None:
    """An IPv6 address is handed out in brackets, and works."""
    model = add_model(origin, data := unique(1000).read(0, 1000))
    try:
        connection = to_front(proxy, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with connection:
        assert get(connection, model.blob_target, Host=f"[::1]:{proxy.front_port}")[::2] == (200, data)
        status, headers, _ = get(connection, model.blob_target, Host=NAME)
        origin_part, slash, rest = headers["location"].partition("/ollama/")
        assert (status, origin_part) == (307, f"http://[::1]:{proxy.front_port}")
        assert get(connection, slash + rest, Host=f"[::1]:{proxy.front_port}")[::2] == (200, data)


def test_manifest(origin: Origin, proxy: Proxy) -> None:
    """Byte for byte, GET and HEAD, and upstream's refusals as it says them."""
    model = add_model(origin, unique(10))
    with to_front(proxy, NAME) as connection:
        status, headers, body = get(connection, model.manifest_target)
        assert (status, body) == (200, model.manifest)
        assert headers["cache-status"] == "ollama-cache; fwd=miss; fwd-status=200; stored"
        response = connection.request("HEAD", model.manifest_target)
        assert (response.status, response.header("content-length")) == (200, str(len(model.manifest)))
        assert response.read() == b""
        assert get(connection, "/v2/library/no-such-model/manifests/latest")[0] == 404
        assert connection.is_reusable


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("PUT", "/v2/library/x/manifests/latest", 405),
        ("POST", "/v2/library/x/blobs/uploads/", 405),
        ("PATCH", "/v2/library/x/blobs/uploads/1", 405),
        ("DELETE", "/v2/library/x/manifests/latest", 405),
        ("OPTIONS", "*", 405),
        ("GET", "/status", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v2/_catalog", 404),
        ("GET", "/v2/library/x/tags/list", 404),
        ("GET", "/v2/library/x/manifests/latest?a=b", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/token?service=ollama", 404),
        ("GET", "http://registry.ollama.ai/v2/library/x/manifests/latest", 404),
    ],
)
def test_nothing_else_is_served_or_forwarded(
    origin: Origin, proxy: Proxy, method: str, target: str, expected: int
) -> None:
    """Pushes, other paths, and requests as to a proxy: an error in the registry's own shape."""
    origin.reset_counters()
    with to_front(proxy, NAME) as connection:
        response = connection.request(method, target, [("Content-Length", "3")] if expected == 405 else [], b"")
        body = b"abc" if expected == 405 else b""
        connection.send(body)
        assert response.status == expected
        assert response.header("content-type") == "application/json"
        (error,) = json.loads(response.read())["errors"]
        assert error["code"] == "UNSUPPORTED"
        assert response.header("allow") == ("GET, HEAD" if expected == 405 else None)
    assert not origin.counters.requests


@pytest.mark.parametrize(
    "fields",
    [
        {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "https://evil.example"},
        {"User_Agent": "Mozilla/5.0"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_page_of_another_site_gets_no_models(origin: Origin, proxy: Proxy, fields: dict[str, str]) -> None:
    """Nothing is asked of upstream for it, nothing recorded, and what is stored is not told."""
    stored, other = add_model(origin, unique(SIZE)), add_model(origin, unique(SIZE))
    address = address_of(proxy, stored)
    origin.reset_counters()
    with to_front(proxy) as connection:
        for target in (other.manifest_target, other.blob_target, stored.manifest_target, stored.blob_target):
            status, _, body = get(connection, target, **fields)
            assert (status, b"web pages may not load models from here" in body) == (403, True), target
        assert get(connection, address, **fields)[::2] == (403, b"")
        assert get(connection, "/", **fields)[0] == 200
    assert not origin.counters.requests


def test_what_is_no_http_is_one_line(origin: Origin, proxy: Proxy) -> None:
    """A malformed request is 400, and neither a traceback nor what it asked for gets into the log."""
    for request in (
        b"GET /data?access=secret HTTP/9.9\r\n\r\n",
        b"GET /\xff?access=secret HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with socket.create_connection((ADDRESS, proxy.front_port), timeout=20) as sock:
            sock.sendall(request)
            assert sock.recv(100).startswith(b"HTTP/1.0 400 ")
    proxy.wait_for_line("Error handling request from 127.0.0.1", count=2)
    assert not any("secret" in line or "Traceback" in line for line in proxy.output)


def test_capabilities(origin: Origin, proxy: Proxy) -> None:
    """Without one, with an altered one, or with that of another blob: 403 without text."""
    model, other = add_model(origin, unique(10)), add_model(origin, unique(10))
    path, _, query = address_of(proxy, model).partition("?")
    altered = query[:-1] + ("0" if query[-1] != "0" else "1")
    stranger = address_of(proxy, other).partition("?")[2]
    with to_front(proxy) as connection:
        for target in (path, f"{path}?{altered}", f"{path}?{stranger}"):
            status, headers, body = get(connection, target)
            assert (status, headers["content-length"], body) == (403, "0", b"")
        assert get(connection, f"{path}?{query}")[0] == 200


def test_a_private_model_stays_private(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """It is in the store, and the caller's token is good: nothing of it is given on this port, and no challenge."""
    model = add_model(origin, unique(2 * MB), private=True)
    client = A2Client(proxy.url, proxy.ca_file, tmp_path / "client", **PARTS)
    client.pull(model.name)
    proxy.wait_for_line(model.recorded)
    token = next(
        request.headers["authorization"]
        for request in origin.counters.requests
        if request.headers.get("authorization", "").startswith("Bearer ")
    )
    origin.reset_counters()
    digest = model.layer
    with to_front(proxy) as connection:
        for target in (model.manifest_target, model.blob_target, f"/v2/{model.repository}/chunksums/{digest}"):
            for fields in ({}, {"Authorization": token}, {"Authorization": token, "Range": "bytes=0-9"}):
                status, headers, body = get(connection, target, **fields)
                assert status == 403
                assert "www-authenticate" not in headers
                assert (b"is private" in body) is (target == model.manifest_target)
                assert len(body) < 1000
    assert not any("authorization" in request.headers for request in origin.counters.requests)


FIELDS: Final = (
    *("bytes=0-0", "bytes=0-", "bytes=7-", "bytes=-1", "bytes=-5", "bytes=-2000", "bytes=999-", "bytes=999-5000"),
    *("bytes=1000-", "bytes=-0", "bytes=5-4", "bytes=0-1,3-4", "items=0-1", "bytes", "bytes=a-b", "BYTES=3-9"),
)


def test_range_grammar(origin: Origin, proxy: Proxy) -> None:
    """Each form of Range, at the canonical address and at the registry's own."""
    model = add_model(origin, data := unique(1000).read(0, 1000))
    with to_front(proxy) as connection:
        for target in (address_of(proxy, model), model.blob_target):
            for field in FIELDS:
                status, headers, body = get(connection, target, Range=field)
                match parse_range(field, 1000):
                    case ByteRange() as selected:
                        expected = data[selected.start : selected.stop]
                        assert (status, body, headers["content-range"]) == (206, expected, selected.content_range)
                    case Unsatisfiable() as selected:
                        assert (status, body, headers["content-range"]) == (416, b"", selected.content_range)
                    case None:
                        assert (status, body) == (200, data)
                assert headers["content-length"] == str(len(body))
                assert headers["etag"] == f'"{model.layer}"'


CONDITIONS: Final = [
    ({"If_None_Match": "{tag}"}, 304),
    ({"If_None_Match": "W/{tag}"}, 304),
    ({"If_None_Match": '"other", {tag}'}, 304),
    ({"If_None_Match": "*"}, 304),
    ({"If_None_Match": '"other"'}, 200),
    ({"If_None_Match": "{tag}", "Range": "bytes=0-9"}, 304),
    ({"If_None_Match": '"other"', "Range": "bytes=0-9"}, 206),
    ({"If_Match": "{tag}"}, 200),
    ({"If_Match": "*"}, 200),
    ({"If_Match": "W/{tag}"}, 412),
    ({"If_Match": '"other"'}, 412),
    ({"If_Match": "{tag}", "If_None_Match": "{tag}"}, 304),
    ({"If_Match": '"other"', "If_None_Match": "{tag}"}, 412),
    ({"If_Match": '"other"', "Range": "bytes=0-9"}, 412),
    ({"If_Range": "{tag}", "Range": "bytes=0-9"}, 206),
    ({"If_Range": '"other"', "Range": "bytes=0-9"}, 200),
    ({"If_Range": "W/{tag}", "Range": "bytes=0-9"}, 200),
    ({"If_Range": "Sat, 21 Nov 2026 00:00:00 GMT", "Range": "bytes=0-9"}, 200),
    ({"If_Modified_Since": "Sat, 21 Nov 2026 00:00:00 GMT"}, 200),
    ({"If_Unmodified_Since": "Mon, 21 Nov 2005 00:00:00 GMT"}, 200),
]


@pytest.mark.parametrize("mouth", ["without a proxy", "through the proxy"])
def test_conditional_requests(origin: Origin, proxy: Proxy, mouth: str) -> None:
    """RFC 9110 section 13, the same on both mouths, and the connection goes on after each answer."""
    model = add_model(origin, data := unique(1000).read(0, 1000))
    address = address_of(proxy, model)
    with to_front(proxy) if mouth == "without a proxy" else to_cdn(proxy) as connection:
        for conditions, expected in CONDITIONS:
            fields = {name: value.format(tag=f'"{model.layer}"') for name, value in conditions.items()}
            status, headers, body = get(connection, address, **fields)
            assert (status, body) == (expected, {200: data, 206: data[:10]}.get(expected, b"")), fields
            assert headers["etag"] == f'"{model.layer}"'
            response = connection.request("HEAD", address, [(k.replace("_", "-"), v) for k, v in fields.items()])
            assert response.status == (200 if expected == 206 else expected)
            assert response.read() == b""
        assert connection.is_reusable


# --- how bytes leave


def test_a_recording_is_sent_while_it_runs(origin: Origin, proxy: Proxy) -> None:
    """Bytes arrive while most of the blob is still upstream, from any offset, and are the right ones."""
    size = 12 * MB
    model = add_model(origin, blob := unique(size))
    address = address_of(proxy, model)
    origin.rate_per_connection = MB // 4
    with to_front(proxy) as first, to_front(proxy) as middle:
        responses = [first.request("GET", address), middle.request("GET", address, [("Range", f"bytes={size // 2}-")])]
        assert responses[0].read(100_000) == blob.read(0, 100_000)
        assert responses[1].read(100_000) == blob.read(size // 2, size // 2 + 100_000)
        assert origin.counters.cdn_bytes_by_digest[model.layer] < size
        origin.rate_per_connection = None
        assert responses[0].read() == blob.read(100_000, size)
        assert responses[1].read() == blob.read(size // 2 + 100_000, size)
        assert [response.ended for response in responses] == ["complete", "complete"]
    # What was on its way over a connection that had become the slow one may come twice.
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= 1.05 * size


def test_a_slow_tensor_after_fast_ones(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """x/transfer gives up what has not a tenth of the pace of earlier blobs: it gets a cold one at the pace of hits."""
    fast = [unique(200_000) for _ in range(8)]
    with to_front(proxy) as connection:
        for layer in add_model(origin, *fast, repository="library/tensors").blobs:
            assert get(connection, f"/v2/library/tensors/blobs/{layer}")[0] == 200
    model = add_model(origin, *fast, slow := unique(MB // 3), repository="library/tensors")
    origin.rate_total = MB // 4
    resolve = {(NAME, proxy.front_port): (ADDRESS, proxy.front_port)}
    client = TransferClient(None, proxy.ca_file, tmp_path, streams=1, slow_s=0.3, resolve=resolve)
    report = client.pull(f"http://{NAME}:{proxy.front_port}/{model.repository}")
    # To learn the address, and for the bytes; slow ones are asked for anew, at first uncounted.
    assert sum(model.layers[-1][7:] in request.url for request in report.requests) == 2
    assert client.blob_path(model.layers[-1]).read_bytes() == slow.read(0, slow.size)
    assert origin.counters.cdn_bytes_by_digest[model.layers[-1]] == slow.size


GO: Final = "Go-http-client/1.1"
"""What Ollama calls itself when it asks for a part."""


@pytest.mark.parametrize(
    ("agent", "ending"),
    [
        pytest.param(GO, "fin", marks=pytest.mark.long),
        pytest.param("ollama/0.41.0 (amd64 linux) Go/go1.27", "fin", marks=pytest.mark.long),
        pytest.param("Python-urllib/3.12", "rst", marks=pytest.mark.long),
        ("", "rst"),
    ],
)
def test_a_hopeless_recording_ends_short(origin: Origin, proxy: Proxy, agent: str, ending: str) -> None:
    """The source lies for good: the client gets what is right, never text, and then what it takes for an error.

    Ollama keeps what came before a FIN, and nothing that came before a reset. Python and Java take a FIN for the end.
    """
    model = add_model(origin, blob := unique(5 * MB))
    address = address_of(proxy, model)
    origin.faults.append(Fault(Mode.CONTENT_RANGE, digest=model.layer, times=None))
    with to_front(proxy) as connection:
        response = connection.request("GET", address, [("User-Agent", agent)] if agent else [])
        assert (response.status, response.content_length) == (200, 5 * MB)
        body = response.read()
        assert response.ended == ending
    assert 0 < len(body) < 5 * MB
    assert body == blob.read(0, len(body))
    # x/transfer waits for its whole blob, and has had no byte yet: it can be told.
    with to_front(proxy) as connection:
        status, headers, body = get(connection, address, User_Agent="ollama-transfer/1.0")
        assert (status, headers["content-length"], body) == (502, "0", b"")


def test_urllib_notices_a_short_body(origin: Origin, proxy: Proxy) -> None:
    """Read in pieces, as to a file; the connection of one that has its whole body ends in order."""
    model, other = add_model(origin, unique(5 * MB)), add_model(origin, unique(MB))
    base = f"http://{ADDRESS}:{proxy.front_port}"
    short = base + address_of(proxy, model)
    origin.faults.append(Fault(Mode.CONTENT_RANGE, digest=model.layer, times=None))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(short, timeout=60) as response, pytest.raises(ConnectionResetError):
        read_in_pieces(response)
    with opener.open(base + address_of(proxy, other), timeout=60) as response:
        assert read_in_pieces(response) == MB


def read_in_pieces(response: IO[bytes]) -> int:
    """How many bytes there are until nothing more comes."""
    return sum(len(data) for data in iter(lambda: response.read(65536), b""))


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_cache_that_ends_in_mid_body(origin: Origin, start_proxy: Callable[..., Proxy], kill: bool) -> None:
    """Whatever ends it: a reset."""
    proxy = start_proxy(front=True)
    model = add_model(origin, unique(8 * MB))
    address = address_of(proxy, model)
    origin.rate_per_connection = MB // 4
    with to_front(proxy) as connection:
        response = connection.request("GET", address)
        assert response.read(1)
        proxy.kill() if kill else proxy.stop()
        response.read()
        assert response.ended == "rst"


def test_a_small_blob_begins_when_it_is_complete(origin: Origin, proxy: Proxy) -> None:
    """Up to 64 KiB there is no head before there is a whole: what is wrong is told by a status."""
    model = add_model(origin, unique(64 << 10))
    stall = Fault(Mode.STALL, digest=model.layer, after=1000)
    origin.faults += [stall, Fault(Mode.FLIP, digest=model.layer, after=0, times=None)]
    address = address_of(proxy, model)
    with to_front(proxy) as connection:
        connection.set_timeout(60)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(connection.request, "GET", address)
            origin.counters.wait_for(lambda counters: stall.hits and counters.cdn_bytes_by_digest[model.layer] >= 1000)
            assert not asked.done()
            stall.gate.open()
            response = asked.result()
        assert response.status >= 500
        assert response.read() == b""


@pytest.mark.parametrize("farewell", ["reset", pytest.param("close", marks=pytest.mark.long)])
def test_a_client_that_vanishes(origin: Origin, proxy: Proxy, farewell: str) -> None:
    """A client that resets or closes in mid-body is noticed, and the file is let go."""
    model = add_model(origin, unique(40 * MB))
    address = address_of(proxy, model)
    with to_front(proxy) as connection:
        assert len(get(connection, address)[2]) == 40 * MB
    proxy.wait_for_line(model.recorded)
    connection = to_front(proxy)
    response = connection.request("GET", address)
    assert len(response.read(100_000)) == 100_000
    file = f"/{model.layer.replace(':', '-')}"
    assert holds(proxy, file)
    connection.reset() if farewell == "reset" else connection.close()
    proxy.wait_for_line("short: client disconnected")
    # The recording lets go of its own descriptor a little after its line.
    deadline = time.monotonic() + 10
    while holds(proxy, file):
        assert time.monotonic() < deadline


def holds(proxy: Proxy, ending: str) -> bool:
    """The process has a file open whose path ends so."""
    folder = Path(f"/proc/{proxy.pid}/fd")
    if not folder.is_dir():
        pytest.skip("no /proc to see open files in")
    for link in folder.iterdir():
        # Others come and go while we look.
        with contextlib.suppress(FileNotFoundError):
            if str(link.readlink()).endswith(ending):
                return True
    return False


@pytest.mark.long
def test_many_idle_connections(origin: Origin, proxy: Proxy) -> None:
    """Three thousand connections that ask for nothing are in nobody's way, and cost about 10 KiB each."""
    count = 3000
    platform.allow_descriptors(2 * count)
    model = add_model(origin, data := unique(1000).read(0, 1000))
    before = proxy.rss_mib()
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(count):
                stack.enter_context(socket.create_connection((ADDRESS, proxy.front_port)))
        except OSError as error:
            pytest.skip(f"this process may not open {count} files: {error}")
        with to_front(proxy) as connection:
            assert get(connection, model.blob_target)[::2] == (200, data)
            assert proxy.rss_mib() - before < 100


# --- life


@pytest.mark.long
@pytest.mark.long
def test_it_ends_soon_and_frees_the_port(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """A body under way and an idle connection hold up the end for two seconds at most, and end with FIN."""
    proxy = start_proxy(front=True)
    model = add_model(origin, unique(40 * MB))
    address = address_of(proxy, model)
    with to_front(proxy) as idle, to_front(proxy) as connection:
        assert get(idle, model.manifest_target)[0] == 200
        response = connection.request("GET", address, [("User-Agent", GO)])
        assert len(response.read(1000)) == 1000
        began = time.monotonic()
        assert proxy.stop() == 0
        # Beside the two seconds: the end of the process, on a busy machine.
        assert time.monotonic() - began < 10
        assert 0 < len(response.read()) < 40 * MB - 1000
        assert response.ended == "fin"
    proxy.start()
    with to_front(proxy) as connection:
        assert get(connection, model.manifest_target)[0] == 200


@pytest.mark.long
def test_strangers_are_refused(start_proxy: Callable[..., Proxy]) -> None:
    """`clients` counts on this port too: the connection is closed before anything is answered."""
    proxy = start_proxy(front=True, ollama_cache_clients="192.0.2.0/24")
    with to_front(proxy) as connection, pytest.raises((ClosedBeforeResponse, ConnectionError)):
        connection.request("GET", "/v2/library/x/manifests/latest")
    proxy.wait_for_line("refused client 127.0.0.1: not in ollama_cache_clients")


def test_ready_line_names_the_port(proxy: Proxy) -> None:
    """A user sees where the page is and what to do next; before it, whom the port speaks for."""
    assert any(f", plain HTTP {ADDRESS}:{proxy.front_port} (registry.ollama.ai)" in line for line in proxy.output)
    line = next(line for line in proxy.output if "ollama-cache ready" in line)
    assert f"ollama-cache ready: http://{ADDRESS}:{proxy.front_port}/ shows it; " in line
    assert line.endswith("ollama-cache connect sets up a client")


@pytest.mark.long
def test_a_port_in_use_stops_the_start(tmp_path: Path) -> None:
    """One line that names it, before anybody is served."""
    with socket.create_server((ADDRESS, 0)) as other:
        taken = f"{ADDRESS}:{other.getsockname()[1]}"
        line = refused(tmp_path, expected=1, ollama_cache_listen=taken, ollama_cache_front="")
    assert f"option ollama_cache_listen: expected a free address of this machine, got {taken}: it is taken by " in line


@pytest.mark.long
def test_an_address_of_another_machine_stops_the_start(tmp_path: Path) -> None:
    """An address that this machine has not."""
    line = refused(tmp_path, expected=1, ollama_cache_listen=f"192.0.2.1:{free_port()}", ollama_cache_front="")
    assert "expected a free address of this machine, got 192.0.2.1:" in line


# --- what sets up a client


def test_documents_for_clients(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served is what `connect` vouches for, whatever Host says; a stranger's name gets nothing."""
    monkeypatch.setenv("COLUMNS", "300")
    env = {"OLLAMA_CACHE_DIR": str(proxy.store)}
    with to_front(proxy) as connection:
        status, headers, certificate = get(connection, "/ca.crt")
        assert (status, certificate) == (200, proxy.ca_file.read_bytes())
        assert headers["content-type"] == "application/pem-certificate-chain"
        assert get(connection, "/ca.cer")[2] == proxy.ca_file.with_suffix(".cer").read_bytes()
        for kind, name in {"linux": "linux.sh", "macos": "macos.sh", "windows": "windows.ps1"}.items():
            printed = CliRunner().invoke(cli.app, ["connect", "--for", kind, "--address", "10.0.0.1"], env=env)
            assert f"http://10.0.0.1:{proxy.front_port}/connect/{name}" in printed.stdout
            for host in (ADDRESS, "localhost", "192.168.7.7:9200"):
                status, _, body = get(connection, f"/connect/{name}", Host=host)
                assert status == 200 and sha256(body).hexdigest() in printed.stdout
        for kind in ("compose", "kubernetes"):
            served = get(connection, f"/connect/{kind}.yaml")[2].decode()
            printed = CliRunner().invoke(cli.app, ["connect", "--for", kind, "--address", "cache.lan:3128"], env=env)
            assert printed.stdout.splitlines() == [
                re.sub(r'"http://[^"]*"', '"http://cache.lan:3128"', line) for line in served.splitlines()
            ]
        for path in ("/ca.crt", "/connect/linux.sh", "/connect/compose.yaml"):
            status, _, body = get(connection, path, Host="evil.example")
            assert status == 421 and b"CERTIFICATE" not in body


@pytest.mark.parametrize("way", ["tunnel", "plain proxy", "port"])
def test_a_client_that_leaves_with_the_last_byte(origin: Origin, proxy: Proxy, way: str) -> None:
    """A body that was sent whole is logged as that, and nothing is said to have failed."""
    size = 1000
    model = add_model(origin, unique(size))
    target = address_of(proxy, model) if way == "port" else canonical(proxy, model)
    opening = {
        "tunnel": lambda: to_cdn(proxy),
        "plain proxy": lambda: connect(proxy.url, R2_HOST, 80, None),
        "port": lambda: to_front(proxy),
    }[way]

    def pull(_: int) -> None:
        for _ in range(10):
            with opening() as connection:
                response = connection.request("GET", target, [("User-Agent", "Python-urllib/3.12")])
                left = size
                while left:
                    left -= len(response.read(left))
                connection.reset()

    proxy.forget_lines()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pull, range(4)))
    proxy.wait_for_line(f"{size} bytes in", count=40)
    with to_front(proxy) as connection:
        assert get(connection, "/v2/library/nobody/manifests/latest")[0] == 404
    proxy.wait_for_line("/v2/library/nobody/manifests/latest")
    since = proxy.output[proxy.output.index(proxy.wait_for_line(f"{size} bytes in")) :]
    assert not [line for line in since if "short:" in line or "rror" in line or "xception" in line]


# --- pages


def test_pages_of_the_daemon(origin: Origin, proxy: Proxy) -> None:
    """Beside the models: health, metrics, and what a Prometheus and a Grafana want; by our names only."""
    told = {"/healthz": "text/plain", "/readyz": "text/plain", "/metrics": "text/plain"}
    files = {"/alerts.yml": "text/yaml", "/dashboard.json": "application/json"}
    with to_front(proxy) as connection:
        for path, kind in {**told, **files}.items():
            status, headers, body = get(connection, path)
            assert (status, headers["content-type"].partition(";")[0], bool(body)) == (200, kind, True)
            assert headers["x-content-type-options"] == "nosniff"
            status, headers, _ = get(connection, path, Host="evil.example")
            assert (status, "etag" in headers) == (421, False)
        ready = get(connection, "/readyz", Host=f"{socket.gethostname()}:9200")[2].decode().splitlines()
        assert ready[:2] == ["serving: yes", "fetching: yes"]
        assert [line.partition(": up since ")[0] for line in ready[2:]] == [
            "registry registry.ollama.ai", f"blob host {R2_HOST}",
        ]  # fmt: skip
    proxy.store.rename(away := proxy.store.with_name("away"))
    try:
        with to_front(proxy) as connection:
            deadline = time.monotonic() + 20
            gone = "serving: no, store: No such file or directory"
            while (told_now := get(connection, "/readyz"))[0] != 503 or told_now[2].decode().partition("\n")[0] != gone:
                assert time.monotonic() < deadline, told_now
            assert get(connection, "/healthz")[0] == 200
    finally:
        away.rename(proxy.store)


def test_a_browser_at_the_proxy_s_port(shared: tuple[Origin, Proxy]) -> None:
    """It is led to the front page; a program that asks for the same is told what this is, and where the page is."""
    _, proxy = shared
    page = f"http://{ADDRESS}:{proxy.front_port}/"
    got = []
    for accept in ("text/html,*/*;q=0.8", "*/*"):
        connection = http.client.HTTPConnection(ADDRESS, proxy.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/", headers={"Accept": accept})
            response = connection.getresponse()
            got.append((response.status, response.headers["Location"], len(response.read()) > 0))
            reason = response.reason
    assert got == [(307, page, False), (421, None, True)]
    assert reason.endswith(f"pages are at {page}")
    # One with a body is no browser's: it would be held, whatever its size.
    with contextlib.closing(http.client.HTTPConnection(ADDRESS, proxy.port, timeout=20)) as connection:
        connection.request("GET", "/", body=b"x" * 100, headers={"Accept": "text/html"})
        with pytest.raises(ConnectionError):
            connection.getresponse()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(page, timeout=20) as response:
        assert b"<title>ollama-cache</title>" in response.read()


def test_who_pulled_what(shared: tuple[Origin, Proxy], tmp_path: Path) -> None:
    """Clients and a model's page tell of a pull: by which way, with which Ollama, how much; no private name."""
    origin, proxy = shared
    public = add_model(origin, unique(SIZE), repository="library/pulled")
    private = add_model(origin, unique(SIZE), repository="library/hidden", private=True)
    A2Client(proxy.url, proxy.ca_file, tmp_path / "client", version="current").pull(public.name)
    A2Client(proxy.url, proxy.ca_file, tmp_path / "other", version="current").pull(private.name)

    def page(path: str) -> tuple[int, str]:
        with to_front(proxy) as connection:
            status, _, body = get(connection, path)
        return status, " ".join(re.sub("<[^>]*>", " ", body.decode()).split())

    status, clients = page("/clients")
    assert status == 200
    assert re.search(rf"{ADDRESS} pulled:latest .* ago|{ADDRESS} pulled:latest just now", clients), clients
    assert "hidden" not in clients + page("/models")[1]
    assert re.search(r"HTTPS_PROXY .* MB", clients), clients
    status, model = page("/model?name=pulled")
    assert status == 200 and f"Pulled by Client When {ADDRESS} " in model
    assert page("/model?name=hidden")[0] == 404
