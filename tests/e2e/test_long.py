"""Pulls of the size that users have. Run by `scripts/test --long`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import MB, add_model, canonical, fetch_parts, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.origin import Origin, Sparse
from tests.support.proxy import PeakRss, Proxy

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_sixteen_ranges_of_4_gib(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Sixteen ranges of 256 MiB at once, cold and warm, in less than 200 MB of memory."""
    proxy = start_proxy()
    blob = Sparse(4 << 30)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    for _ in range(2):
        with PeakRss(proxy) as rss:
            assert fetch_parts(proxy, address, blob, 16) == []
        assert rss.mib < 200
        proxy.wait_for_line(model.recorded, timeout_s=60)
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= blob.size * 1.01


def test_sixteen_parts(origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client]) -> None:
    """A layer of 1.75 GB in an Ollama's own sixteen parts: cold, warm, offline, and after a restart."""
    proxy = start_proxy()
    size = 1_750 * MB
    model = add_model(origin, unique(size))
    own_sizes = {"min_part": 100 * MB, "max_part": 1_000 * MB, "backoff_unit_s": 1.0}

    client = new_client(proxy, **own_sizes)
    report = client.pull(model.name)
    assert_complete(client, model)
    assert sum(1 for exchange in report.requests if exchange.range and model.layer[7:] in exchange.url) == 16
    assert report.retries == report.stalls == 0
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= size * 1.01
    proxy.wait_for_line(model.recorded, timeout_s=60)
    client.blob_path(model.layer).unlink()

    origin.reset_counters()
    for state in ("warm", "offline", "restarted"):
        if state == "offline":
            origin.stop()
        if state == "restarted":
            proxy.restart()
        client = new_client(proxy, **own_sizes)
        assert client.pull(model.name).retries == 0
        assert_complete(client, model)
        assert origin.counters.cdn_bytes == 0
        client.blob_path(model.layer).unlink()


def test_eight_clients(origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client]) -> None:
    """Eight clients of one cold 256 MiB blob behind a slow source: one transfer, and nobody waits five seconds."""
    proxy = start_proxy()
    size = 256 << 20
    model = add_model(origin, unique(size))
    origin.rate_per_connection = 10 * MB
    clients = [new_client(proxy, min_part=100 * MB, max_part=1_000 * MB) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(lambda client: client.pull(model.name), clients))
    for client, report in zip(clients, reports, strict=True):
        assert_complete(client, model)
        assert report.retries == report.stalls == 0
        assert report.max_gap_s < 5
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= size * 1.01
