"""How bytes leave: short bodies end cleanly, slow and vanished clients cost nothing, bodies of others flow through."""

from collections.abc import Callable

import pytest

from tests.e2e.conftest import MB, add_model, canonical, fetch_parts, get, to_cdn, to_registry, unique
from tests.support.origin import Fault, Mode, Origin
from tests.support.proxy import PeakRss, Proxy


def test_keep_alive(origin: Origin, proxy: Proxy) -> None:
    """Several bodies, a HEAD and a 416 on one connection."""
    blob = unique(3 * MB)
    address = canonical(proxy, add_model(origin, blob))
    with to_cdn(proxy) as connection:
        for start in (0, 1, 1_234_567):
            assert get(connection, address, Range=f"bytes={start}-")[::2] == (206, blob.read(start, 3 * MB))
            assert connection.request("HEAD", address, []).status == 200
            assert get(connection, address, Range=f"bytes={3 * MB}-")[0] == 416
        assert connection.is_reusable


def test_a_hopeless_recording_ends_short_and_clean(origin: Origin, proxy: Proxy) -> None:
    """The source lies for good: the client gets what is right and then FIN, never a reset or text."""
    blob = unique(5 * MB)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    origin.faults.append(Fault(Mode.CONTENT_RANGE, digest=model.layer, times=None))
    with to_cdn(proxy) as connection:
        response = connection.request("GET", address, [])
        assert (response.status, response.content_length) == (200, 5 * MB)
        body = response.read()
        assert response.ended == "fin"
    assert 0 < len(body) < 5 * MB
    assert body == blob.read(0, len(body))
    proxy.wait_for_line("failed with")
    # The partial stays: once the source is honest again only the rest is fetched.
    origin.faults.clear()
    origin.reset_counters()
    with to_cdn(proxy) as connection:
        assert get(connection, address)[2] == blob.read(0, 5 * MB)
    assert origin.counters.cdn_bytes_by_digest[model.layer] < 5 * MB


def test_an_unusable_source_is_a_status_without_text(origin: Origin, proxy: Proxy) -> None:
    """Before the first byte a failure is a status and Content-Length 0: a client writes any body into the model."""
    model = add_model(origin, unique(MB))
    origin.faults.append(Fault(Mode.CONTENT_RANGE, digest=model.layer, times=None))
    with to_registry(proxy) as connection:
        status, headers, body = get(connection, model.blob_target)
    assert (status, headers["content-length"], body) == (502, "0", b"")


@pytest.mark.parametrize("farewell", ["reset", "close"])
def test_a_client_that_vanishes(origin: Origin, proxy: Proxy, farewell: str) -> None:
    """A client that resets or closes in mid-body is noticed, and its transfer ends in the log as short."""
    blob = unique(40 * MB)
    address = canonical(proxy, add_model(origin, blob))
    connection = to_cdn(proxy)
    response = connection.request("GET", address, [])
    assert len(response.read(100_000)) == 100_000
    connection.reset() if farewell == "reset" else connection.close()
    proxy.wait_for_line("short: ")
    with to_cdn(proxy) as other:
        assert get(other, address)[2] == blob.read(0, 40 * MB)


@pytest.mark.long
def test_slow_clients_cost_little_memory(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Twenty clients that read one byte and wait hold up nobody and pile up nothing."""
    proxy = start_proxy()
    blob = unique(30 * MB)
    address = canonical(proxy, add_model(origin, blob))
    with PeakRss(proxy) as rss:
        slow = []
        for _ in range(20):
            connection = to_cdn(proxy)
            response = connection.request("GET", address, [])
            assert len(response.read(1)) == 1
            slow.append(connection)
        with to_cdn(proxy) as fast:
            assert get(fast, address)[2] == blob.read(0, 30 * MB)
    for connection in slow:
        connection.reset()
    # Pieces, ciphertext and socket buffers of each; all bodies in memory would be 600 MB.
    assert rss.growth_mib < 130


def test_uploads_flow_through(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """A push is passed through untouched, both ways, without being held in memory."""
    proxy = start_proxy()
    size = 64 << 20
    add_model(origin, repository="me/mine")
    chunk = b"x" * (1 << 20)
    with to_registry(proxy) as connection, PeakRss(proxy) as rss:
        response = connection.request("POST", "/v2/me/mine/blobs/uploads/", [("Content-Length", "0"), ("X-Mark", "1")])
        assert response.status == 202
        location = response.header("location")
        assert location is not None
        response.read()
        target = location.partition("registry.ollama.ai")[2] or location
        fields = [("Content-Length", str(size)), ("Content-Range", f"0-{size - 1}"), ("X-Redirect-Uploads", "1")]
        response = connection.request("PATCH", target, fields, body=(chunk for _ in range(64)))
        assert response.status == 202
        response.read()
    assert origin.counters.upload_bytes == size
    sent = next(request for request in origin.counters.requests if request.method == "PATCH")
    assert sent.headers["content-range"] == f"0-{size - 1}"
    assert sent.headers["x-redirect-uploads"] == "1"
    assert rss.growth_mib < 30


def test_many_large_ranges_stay_within_memory(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Sixteen ranges of one blob at once, cold and warm: a few pieces each, not their bodies."""
    proxy = start_proxy()
    blob = unique(128 << 20)
    address = canonical(proxy, add_model(origin, blob))
    for _ in range(2):
        with PeakRss(proxy) as rss:
            assert fetch_parts(proxy, address, blob, 16) == []
        assert rss.mib < 200
    assert origin.counters.cdn_bytes <= blob.size * 1.01
