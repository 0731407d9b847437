"""An Ollama client pulls: cold, warm, offline, after restarts of either side, and beside others."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.e2e import conftest
from tests.e2e.conftest import MB, Model, unique
from tests.support.a2 import A2Client, Aborted
from tests.support.origin import Origin
from tests.support.proxy import ADDON, Proxy

NewClient = Callable[..., A2Client]


def add_model(origin: Origin, size: int) -> Model:
    """A model with one large layer and a small one."""
    return conftest.add_model(origin, unique(size), b"{{ .Prompt }}")


def assert_complete(client: A2Client, model: Model) -> None:
    assert client.manifest_path(model.name).read_bytes() == model.manifest
    for layer in model.layers:
        with client.blob_path(layer).open("rb") as file:
            assert "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() == layer


def test_cold_warm_offline_restarted(origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient) -> None:
    """The first pull costs each byte once; later ones none, with the registry down, and after a restart."""
    proxy = start_proxy()
    size = 40 * MB
    model = add_model(origin, size)

    cold = new_client(proxy)
    report = cold.pull(model.name)
    assert_complete(cold, model)
    assert report.retries == report.stalls == 0
    assert origin.counters.cdn_bytes_by_digest[model.layer] == size
    proxy.wait_for_line(model.recorded)

    origin.reset_counters()
    warm = new_client(proxy)
    report = warm.pull(model.name)
    assert_complete(warm, model)
    assert report.retries == 0
    assert origin.counters.cdn_bytes == 0
    assert not origin.counters.requests

    origin.stop()
    offline = new_client(proxy)
    offline.pull(model.name)
    assert_complete(offline, model)

    proxy.restart()
    restarted = new_client(proxy)
    restarted.pull(model.name)
    assert_complete(restarted, model)


@pytest.mark.long
def test_stale_manifest_is_served_while_upstream_is_down(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient
) -> None:
    """However old the manifest: no upstream, the stored one."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="0")
    model = add_model(origin, 2 * MB)
    new_client(proxy).pull(model.name)
    proxy.wait_for_line(model.recorded)
    origin.stop()
    client = new_client(proxy)
    client.pull(model.name)
    assert_complete(client, model)
    proxy.wait_for_line("serving the stored manifest")


@pytest.mark.parametrize("state", ["cold", "half", "warm"])
def test_resumed_client(origin: Origin, proxy: Proxy, new_client: NewClient, state: str) -> None:
    """A client that was killed asks without HEAD for parts at odd offsets; the cache has nothing, half or all."""
    size = 30 * MB
    model = add_model(origin, size)
    client = new_client(proxy)
    if state == "cold":
        # The first half of the client's pull went past the cache.
        direct = A2Client(
            None,
            origin.ca_file,
            client.directory,
            min_part=MB,
            max_part=10 * MB,
            resolve=origin.resolve,
        )
        direct.abort_after = 11 * MB + 7
        with pytest.raises(Aborted):
            direct.pull(model.name)
    else:
        client.abort_after = 11 * MB + 7
        with pytest.raises(Aborted):
            client.pull(model.name)
    if state == "warm":
        new_client(proxy).pull(model.name)
        proxy.wait_for_line(model.recorded)
    origin.reset_counters()
    again = new_client(proxy, directory=client.directory)
    report = again.pull(model.name)
    assert_complete(again, model)
    assert report.retries == 0
    assert not any(exchange.method == "HEAD" and model.layer in exchange.url for exchange in report.requests)
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= (0 if state == "warm" else size)


def test_a_leaving_client_changes_nothing_for_others(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """The client that came first goes away in the middle; the one that joined it never notices."""
    model = add_model(origin, 30 * MB)
    origin.rate_per_connection = 2 * MB
    first, second = new_client(proxy), new_client(proxy)
    first.abort_after = 8 * MB

    def leave() -> None:
        with pytest.raises(Aborted):
            first.pull(model.name)

    with ThreadPoolExecutor(2) as pool:
        leaving = pool.submit(leave)
        report = pool.submit(second.pull, model.name).result()
        leaving.result()
    assert_complete(second, model)
    assert report.retries == 0
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= 30 * MB * 1.01


def test_eight_cold_clients_cost_one(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """Eight machines at once: one transfer from upstream, and no client waits long for a byte."""
    size = 64 << 20
    model = add_model(origin, size)
    origin.rate_per_connection = 5 * MB
    clients = [new_client(proxy, min_part=25 * MB) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(lambda client: client.pull(model.name), clients))
    for client in clients:
        assert_complete(client, model)
    assert sum(report.retries + report.stalls for report in reports) == 0
    # Below 3 s on an idle machine, which test_long demands; here other tests run beside.
    assert max(report.max_gap_s for report in reports) < 10
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= size * 1.01


@pytest.mark.long
def test_touching_the_script_breaks_nothing(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient
) -> None:
    """mitmproxy would reload a changed script half-way; the cache forbids it and goes on."""
    proxy = start_proxy()
    model = add_model(origin, 2 * MB)
    new_client(proxy).pull(model.name)
    ADDON.touch()
    # Longer than mitmproxy's poll of the file: its next look would come within a second.
    threading.Event().wait(2.2)
    client = new_client(proxy)
    client.pull(model.name)
    assert_complete(client, model)
    assert sum("Loading script" in line for line in proxy.output) == 1


@pytest.mark.long
def test_upstream_rate(origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient) -> None:
    """What comes in is limited; what is stored is not, and nobody has to try twice."""
    proxy = start_proxy(ollama_cache_upstream_rate="2MB")
    model = add_model(origin, 4 * MB)
    client = new_client(proxy)
    report = client.pull(model.name)
    assert_complete(client, model)
    assert report.retries == report.stalls == 0
    # The burst is half a megabyte, and each connection may have a batch under way.
    assert report.transfer_s > (4 - 0.5 - 1.5) / 2
    proxy.wait_for_line(model.recorded)
    assert new_client(proxy).pull(model.name).transfer_s < report.transfer_s


@pytest.mark.parametrize("prefetch", [True, pytest.param(False, marks=pytest.mark.long)])
def test_layers_behind_are_recorded_ahead(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, prefetch: bool
) -> None:
    """While a client pulls the first layer the next ones come in; neither HEAD, redirect nor a first look does that."""
    proxy = start_proxy(ollama_cache_prefetch=prefetch)
    model = conftest.add_model(origin, unique(4 * MB), unique(3 * MB), unique(2 * MB))
    with conftest.to_registry(proxy) as connection:
        conftest.get(connection, model.manifest_target)
        connection.request("HEAD", model.blob_target, []).read()
        assert origin.counters.cdn_requests == 0
    address = conftest.canonical(proxy, model)
    with conftest.to_cdn(proxy) as connection:
        conftest.get(connection, address, Range="bytes=0-999999")
        assert origin.counters.cdn_bytes < 2 * MB
        conftest.get(connection, address)
    if prefetch:
        for layer in (*model.layers[1:], model.config):
            proxy.wait_for_line(f"recorded {layer[7:19]}")
    client = new_client(proxy)
    client.pull(model.name)
    assert_complete(client, model)
    proxy.wait_for_line(model.recorded)
    for layer in model.layers:
        assert origin.counters.cdn_bytes_by_digest[layer] == origin.blob(layer).size


def test_a_small_blob_of_a_transfer_is_asked_for_once(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """x/transfer fetches all of what it has resolved; so does the cache, once it knows how fast the source is."""
    proxy = start_proxy()
    size = 800_000
    model = conftest.add_model(origin, *(unique(size) for _ in range(4)))
    requests = []
    with conftest.to_registry(proxy) as registry, conftest.to_cdn(proxy) as cdn:
        for layer in model.layers:
            target = f"/v2/{model.repository}/blobs/{layer}"
            status, headers, _ = conftest.get(registry, target, User_Agent="ollama-transfer/1.0")
            assert status == 307
            parts = urlsplit(headers["location"])
            _, _, body = conftest.get(cdn, f"{parts.path}?{parts.query}", User_Agent="ollama-transfer/1.0")
            assert len(body) == size
            requests.append(origin.counters.cdn_requests)
    first, last = requests[0], requests[-1]
    assert last - first == len(model.layers) - 1
