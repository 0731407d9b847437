"""Other registries than Ollama's: hf.co with its two hops, plain OCI registries that do not redirect, and loops."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pullthrough.registry.grants import PIECE
from tests.e2e.conftest import MB, get, unique
from tests.support.a2 import A2Client, PullError
from tests.support.http1 import ClosedBeforeResponse, Connection, connect
from tests.support.hub import CDN, HF, HUGGING_FACE, OCI, TOKEN, Hub
from tests.support.modern import ModernClient
from tests.support.origin import R2_HOST
from tests.support.proxy import Proxy

NewClient = Callable[..., A2Client]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Proxy]]:
    """The registries, and one cache that intercepts them all."""
    folder = tmp_path_factory.mktemp("registries")
    with (
        Hub(folder / "hub") as hub,
        Proxy(
            folder,
            ollama_cache_registries=f"registry.ollama.ai,{HF},{HUGGING_FACE},{OCI}",
            ollama_cache_upstream=hub.upstream_option,
            ollama_cache_prefetch=False,
            ssl_verify_upstream_trusted_ca=hub.ca_file,
        ) as proxy,
    ):
        yield hub, proxy


@pytest.fixture
def hub(pair: tuple[Hub, Proxy]) -> Hub:
    """The registries, without what other tests have counted."""
    pair[0].restore()
    return pair[0]


@pytest.fixture
def proxy(pair: tuple[Hub, Proxy]) -> Proxy:
    """The cache in front of `hub`."""
    pair[1].forget_lines()
    return pair[1]


def to(proxy: Proxy, host: str) -> Connection:
    return connect(proxy.url, host, 443, proxy.ca_file)


def layer_of(hub: Hub, name: str) -> str:
    """The digest of the first layer."""
    return str(hub.repositories[name].manifest.partition(b'"layers"')[2].partition(b'"sha256:')[2][:64].decode())


def assert_pulled(client: A2Client, hub: Hub, name: str, model: str) -> None:
    assert client.manifest_path(model).read_bytes() == hub.repositories[name].manifest
    for digest in hub.repositories[name].blobs:
        with client.blob_path(digest).open("rb") as file:
            assert f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest


def test_hugging_face(hub: Hub, proxy: Proxy, new_client: NewClient) -> None:
    """Cold, each byte comes once and the way from hop to hop is not gone for each slice; warm, nobody is asked."""
    hub.add_model("user/model", unique(8 * MB))
    client = new_client(proxy)
    report = client.pull(f"{HF}/user/model:latest")
    assert_pulled(client, hub, "user/model", f"{HF}/user/model:latest")
    digest = f"sha256:{layer_of(hub, 'user/model')}"
    assert hub.sent[digest] == 8 * MB
    assert report.retries == report.stalls == 0
    assert len(hub.to(CDN)) > 1
    assert len([asked for asked in hub.to(HUGGING_FACE) if digest in asked.target]) <= 3
    # What the client saw: our own redirect to the canonical address, as from every registry.
    for exchange in report.requests:
        if exchange.status == 307:
            assert dict(exchange.headers)["Location"].startswith(f"https://{R2_HOST}/ollama/docker/registry/v2/blobs/")
    assert not any(HUGGING_FACE in exchange.url or CDN in exchange.url for exchange in report.requests)
    proxy.wait_for_line(f"recorded {digest[7:19]}")
    hub.restore()
    again = new_client(proxy)
    again.pull(f"{HF}/user/model:latest")
    assert_pulled(again, hub, "user/model", f"{HF}/user/model:latest")
    assert hub.asked == []
    # No signature is in what was said.
    assert not any("__sign=" in line or "Signature=" in line for line in proxy.output)


def test_hugging_face_by_a_new_client(hub: Hub, proxy: Proxy, tmp_path: Path) -> None:
    """It is sent to huggingface.co's own address, as without a cache, and its parts are hits when they come back."""
    hub.add_model("user/new", unique(4 * MB))
    digest = f"sha256:{layer_of(hub, 'user/new')}"
    for state in ("cold", "warm"):
        client = ModernClient(proxy.url, proxy.ca_file, tmp_path / state, version="0.40.3", dns={}, min_part=MB)
        report = client.pull(f"{HF}/user/new:latest")
        assert_pulled(client, hub, "user/new", f"{HF}/user/new:latest")
        assert report.retries == report.stalls == 0
        assert any(f"{HUGGING_FACE}/v2/" in exchange.url for exchange in report.requests)
        proxy.wait_for_line(f"recorded {digest[7:19]}")
    # Each probe is a request of its own, which a piece from behind the redirects has to prove right.
    assert 4 * MB <= hub.sent[digest] <= 4 * MB + 4 * PIECE
    assert not any("__sign=" in line for line in proxy.output)


def test_addresses_that_do_not_last(hub: Hub, proxy: Proxy, new_client: NewClient) -> None:
    """Each hop's signature is good for two requests: the recording goes back to the registry, the client sees none
    of it."""
    hub.uses = 2
    hub.add_model("user/brief", unique(48 * MB))
    client = new_client(proxy)
    report = client.pull(f"{HF}/user/brief:latest")
    assert_pulled(client, hub, "user/brief", f"{HF}/user/brief:latest")
    assert report.retries == report.stalls == 0
    digest = f"sha256:{layer_of(hub, 'user/brief')}"
    assert hub.sent[digest] == 48 * MB
    assert len([asked for asked in hub.to(HF) if digest in asked.target]) > 3


def test_gated(hub: Hub, proxy: Proxy) -> None:
    """A gated repository's blob goes to those whose credentials are accepted, also when its addresses have to be
    obtained again; the token is told to hf.co alone."""
    hub.uses = 3
    hub.add_model("user/gated", unique(3 * MB), gated=True)
    digest = layer_of(hub, "user/gated")
    target = f"/v2/user/gated/blobs/sha256:{digest}"
    with to(proxy, HF) as connection:
        status, headers, _ = get(connection, target)
        assert status == 401
        assert headers["www-authenticate"].startswith("Bearer realm=")
        assert connection.request("HEAD", target, []).status == 401
        status, headers, _ = get(connection, target, Authorization=f"Bearer {TOKEN}")
        assert status == 307
    with to(proxy, R2_HOST) as connection:
        assert len(get(connection, headers["location"].removeprefix(f"https://{R2_HOST}"))[2]) == 3 * MB
    proxy.wait_for_line(f"recorded {digest[:12]}")
    with to(proxy, HF) as connection:
        assert get(connection, target)[0] == 401
        assert get(connection, target, Authorization="Bearer wrong")[0] == 401
        assert get(connection, target, Authorization=f"Bearer {TOKEN}")[0] == 307
    for host in (HUGGING_FACE, CDN):
        assert hub.to(host)
        assert not any("authorization" in asked.headers for asked in hub.to(host))


def test_a_redirect_is_no_grant(hub: Hub, proxy: Proxy) -> None:
    """A first hop that lets everybody pass does not make a blob public, held or not, when the next one refuses."""
    data = unique(300_000)
    hub.add_model("user/open", data)
    hub.add_model("user/behind", data, gated_behind=True)
    digest = layer_of(hub, "user/open")
    behind = f"/v2/user/behind/blobs/sha256:{digest}"
    with to(proxy, HF) as connection:
        assert get(connection, behind)[0] == 401
        assert get(connection, f"/v2/user/open/blobs/sha256:{digest}")[0] == 307
    proxy.wait_for_line(f"recorded {digest[:12]}")
    with to(proxy, HF) as connection:
        assert get(connection, behind)[0] == 401


@pytest.mark.parametrize(
    "ranges",
    [pytest.param(True, id="knows Range"), pytest.param(False, id="ignores Range", marks=pytest.mark.long)],
)
def test_a_registry_that_does_not_redirect(
    hub: Hub, proxy: Proxy, new_client: NewClient, tmp_path: Path, ranges: bool
) -> None:
    """Today's Ollama cannot pull from it (no Location), and can through the cache; each byte comes once."""
    hub.ranges = ranges
    name = f"team/plain{ranges}".lower()
    hub.add_model(name, unique(16 * MB))
    direct = A2Client(
        None, hub.ca_file, tmp_path / "direct", probe_deadline_s=1.0, resolve={(OCI, 443): ("127.0.0.1", hub.port(OCI))}
    )
    with pytest.raises(PullError, match="no Location header in response"):
        direct.pull(f"{OCI}/{name}:latest")
    hub.restore()
    hub.ranges = ranges
    client = new_client(proxy)
    report = client.pull(f"{OCI}/{name}:latest")
    assert_pulled(client, hub, name, f"{OCI}/{name}:latest")
    assert report.retries == report.stalls == 0
    digest = layer_of(hub, name)
    # Beyond the blob: what was under way on the answer that another connection's made superfluous. Most of that are
    # the buffers of sockets, which have no more in a blob of the usual size.
    assert hub.sent[f"sha256:{digest}"] < 16 * MB * 1.7
    assert fetched(proxy, digest) < 1.1
    gets = [asked for asked in hub.to(OCI) if digest in asked.target and asked.method == "GET"]
    assert (len([asked for asked in gets if "range" in asked.headers]) > 4) == ranges
    hub.restore()
    new_client(proxy).pull(f"{OCI}/{name}:latest")
    assert hub.asked == []


def fetched(proxy: Proxy, digest: str) -> float:
    """How often the cache has taken each byte of a recorded blob from upstream."""
    line = proxy.wait_for_line(f"recorded {digest[:12]}")
    return float(line.partition("; fetched ")[2].partition(" x;")[0])


def test_a_registry_that_wants_a_token(hub: Hub, proxy: Proxy, new_client: NewClient) -> None:
    """As at ghcr.io: everybody gets a token, nobody gets anything without; the bytes come from upstream once, and
    each client is asked for on its own."""
    hub.add_model("team/token", unique(3 * MB), gated=True)
    digest = layer_of(hub, "team/token")
    for _ in range(2):
        client = new_client(proxy)
        client.pull(f"{OCI}/team/token:latest")
        assert_pulled(client, hub, "team/token", f"{OCI}/team/token:latest")
        proxy.wait_for_line(f"recorded {digest[:12]}")
    assert hub.sent[f"sha256:{digest}"] < 3 * MB * 1.5
    assert len([asked for asked in hub.to(OCI) if asked.target.startswith("/token?")]) >= 2
    with to(proxy, OCI) as connection:
        assert get(connection, f"/v2/team/token/blobs/sha256:{digest}")[0] == 401
        assert get(connection, "/v2/team/token/manifests/latest")[0] == 401


def test_a_request_that_has_been_here(hub: Hub, proxy: Proxy) -> None:
    """Our requests are marked; one that comes back is answered 508, by a text only where no client would store it."""
    hub.add_model("team/loop", b"x" * 1000)
    digest = layer_of(hub, "team/loop")
    manifest, blob = "/v2/team/loop/manifests/latest", f"/v2/team/loop/blobs/sha256:{digest}"
    with to(proxy, OCI) as connection:
        assert get(connection, manifest, CDN_Loop="other; v=1")[0] == 200
        # What the cache then asks of its own, whether these blobs are for everybody, is marked as well.
        deadline = time.monotonic() + 20
        while len(hub.to(OCI)) < 3:
            assert time.monotonic() < deadline, hub.to(OCI)
            time.sleep(0.01)
        other, ours = hub.to(OCI)[0].headers["cdn-loop"].split(", ")
        assert other == "other; v=1"
        assert ours.startswith("ollama-cache-")
        assert get(connection, "/v2/_catalog", CDN_Loop="other")[0] == 404
        assert hub.to(OCI)[-1].headers["cdn-loop"] == f"other, {ours}"
        hub.restore()
        status, headers, body = get(connection, manifest, CDN_Loop=f"other, {ours}")
        assert (status, headers["content-type"]) == (508, "application/json")
        assert b"leads back here" in body
        assert get(connection, blob, CDN_Loop=ours)[::2] == (508, b"")
        assert get(connection, "/v2/", CDN_Loop=ours)[0] == 508
        response = connection.request(
            "POST", "/v2/team/loop/blobs/uploads/", [("CDN-Loop", ours), ("Content-Length", "0")]
        )
        assert response.status == 508
        response.read()
    fields = [("CDN-Loop", ours), ("Content-Length", "3")]
    with to(proxy, OCI) as connection, pytest.raises((ClosedBeforeResponse, ConnectionError)):
        connection.request("PATCH", "/v2/team/loop/blobs/uploads/1", fields, b"abc")
    assert hub.asked == []
