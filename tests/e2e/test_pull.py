"""An Ollama client pulls: cold, warm, offline, after restarts of either side, and beside others."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import MB, MODEL
from tests.support.a2 import A2Client, Aborted
from tests.support.origin import Origin, Synthetic
from tests.support.proxy import ADDON, Proxy

NewClient = Callable[..., A2Client]


def add_model(origin: Origin, size: int, *, seed: int = 1, name: str = "library/tiny") -> tuple[str, bytes]:
    """A model with one large layer, a template and a config; (digest of the layer, manifest)."""
    layer = origin.add_blob(Synthetic(size, seed))
    template = origin.add_blob(b"{{ .Prompt }}")
    config = origin.add_blob(b'{"model_format":"gguf"}')
    layers = [(MODEL, layer), ("application/vnd.ollama.image.template", template)]
    return layer, origin.add_model(name, "latest", layers=layers, config=config)


def assert_complete(client: A2Client, layer: str, manifest: bytes) -> None:
    assert client.manifest_path("tiny").read_bytes() == manifest
    with client.blob_path(layer).open("rb") as file:
        assert "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() == layer


def test_cold_warm_offline_restarted(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """The first pull costs each byte once; later ones none, with the registry down, and after a restart."""
    size = 40 * MB
    layer, manifest = add_model(origin, size)

    cold = new_client(proxy)
    report = cold.pull("tiny")
    assert_complete(cold, layer, manifest)
    assert report.retries == report.stalls == 0
    assert origin.counters.cdn_bytes_by_digest[layer] == size
    proxy.wait_for_line(f"recorded {layer[7:19]}")

    origin.reset_counters()
    warm = new_client(proxy)
    report = warm.pull("tiny")
    assert_complete(warm, layer, manifest)
    assert report.retries == 0
    assert origin.counters.cdn_bytes == 0
    assert not origin.counters.requests

    origin.stop()
    offline = new_client(proxy)
    offline.pull("tiny")
    assert_complete(offline, layer, manifest)

    proxy.restart()
    restarted = new_client(proxy)
    restarted.pull("tiny")
    assert_complete(restarted, layer, manifest)


def test_stale_manifest_is_served_while_upstream_is_down(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient
) -> None:
    """However old the manifest: no upstream, the stored one."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="0")
    layer, manifest = add_model(origin, 2 * MB)
    new_client(proxy).pull("tiny")
    proxy.wait_for_line(f"recorded {layer[7:19]}")
    origin.stop()
    client = new_client(proxy)
    client.pull("tiny")
    assert_complete(client, layer, manifest)
    proxy.wait_for_line("serving the stored manifest")


@pytest.mark.parametrize("state", ["cold", "half", "warm"])
def test_resumed_client(origin: Origin, proxy: Proxy, new_client: NewClient, state: str) -> None:
    """A client that was killed asks without HEAD for parts at odd offsets; the cache has nothing, half or all."""
    size = 30 * MB
    layer, manifest = add_model(origin, size)
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
            direct.pull("tiny")
    else:
        client.abort_after = 11 * MB + 7
        with pytest.raises(Aborted):
            client.pull("tiny")
    if state == "warm":
        new_client(proxy).pull("tiny")
        proxy.wait_for_line(f"recorded {layer[7:19]}")
    origin.reset_counters()
    again = new_client(proxy, directory=client.directory)
    report = again.pull("tiny")
    assert_complete(again, layer, manifest)
    assert report.retries == 0
    assert not any(exchange.method == "HEAD" and layer in exchange.url for exchange in report.requests)
    assert origin.counters.cdn_bytes_by_digest[layer] <= (0 if state == "warm" else size)


def test_a_leaving_client_changes_nothing_for_others(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """The client that came first goes away in the middle; the one that joined it never notices."""
    layer, manifest = add_model(origin, 30 * MB)
    origin.rate_per_connection = 2 * MB
    first, second = new_client(proxy), new_client(proxy)
    first.abort_after = 8 * MB

    def leave() -> None:
        with pytest.raises(Aborted):
            first.pull("tiny")

    with ThreadPoolExecutor(2) as pool:
        leaving = pool.submit(leave)
        report = pool.submit(second.pull, "tiny").result()
        leaving.result()
    assert_complete(second, layer, manifest)
    assert report.retries == 0
    assert origin.counters.cdn_bytes_by_digest[layer] <= 30 * MB * 1.01


def test_eight_cold_clients_cost_one(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """Eight machines at once: one transfer from upstream, and no client waits long for a byte."""
    size = 64 << 20
    layer, manifest = add_model(origin, size)
    origin.rate_per_connection = 5 * MB
    clients = [new_client(proxy, min_part=25 * MB) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(lambda client: client.pull("tiny"), clients))
    for client in clients:
        assert_complete(client, layer, manifest)
    assert max(report.max_gap_s for report in reports) < 5
    assert sum(report.retries for report in reports) == 0
    assert origin.counters.cdn_bytes_by_digest[layer] <= size * 1.01


def test_touching_the_script_breaks_nothing(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """mitmproxy would reload a changed script half-way; the cache forbids it and goes on."""
    layer, manifest = add_model(origin, 2 * MB)
    new_client(proxy).pull("tiny")
    ADDON.touch()
    # Longer than mitmproxy's poll of the file: its next look would come within a second.
    threading.Event().wait(2.2)
    client = new_client(proxy)
    client.pull("tiny")
    assert_complete(client, layer, manifest)
    assert sum("Loading script" in line for line in proxy.output) == 1
