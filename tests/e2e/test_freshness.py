"""Tags that move, are withdrawn, are looked at in the background: through a real mitmdump."""

import time
from collections.abc import Callable

import pytest

from tests.e2e.conftest import Model, add_model, get, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy

LIFETIME_S = 2.0


def pulled(proxy: Proxy, model: Model) -> tuple[int, bytes, str]:
    """Status, body and Cache-Status of a manifest request."""
    with to_registry(proxy) as connection:
        status, headers, body = get(connection, model.manifest_target)
    return status, body, headers.get("cache-status", "")


def test_a_moved_tag(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Seen after its lifetime and not before; unchanged, it costs one HEAD; another pattern has its own lifetime."""
    proxy = start_proxy(ollama_cache_manifest_lifetime=f"1h,moving/*={LIFETIME_S}")
    moving, lasting = (add_model(origin, unique(1000), repository=f"{who}/m") for who in ("moving", "lasting"))
    for model in (moving, lasting):
        began = time.monotonic()
        assert pulled(proxy, model)[:2] == (200, model.manifest)
    again = {
        model.repository: add_model(origin, unique(1000), repository=model.repository) for model in (moving, lasting)
    }
    while (answer := pulled(proxy, moving))[1] == moving.manifest:
        assert answer[2].startswith("ollama-cache; hit")
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert time.monotonic() - began >= LIFETIME_S - 0.5
    assert answer[1] == again[moving.repository].manifest
    assert answer[2] == "ollama-cache; fwd=stale; fwd-status=200; stored"
    proxy.wait_for_line(f"{moving.repository}:latest moved: sha256:")
    assert pulled(proxy, lasting)[1] == lasting.manifest

    deadline = time.monotonic() + 60
    gets = origin.counters.registry_requests["GET", "manifest"]
    while not pulled(proxy, moving)[2].startswith("ollama-cache; fwd=stale"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert origin.counters.registry_requests["GET", "manifest"] == gets


def test_a_withdrawn_model_is_dropped_where_that_is_wanted(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client]
) -> None:
    """What the registry has no more is served on by default; `withdrawn=drop` forgets it."""
    model = add_model(origin, unique(1000))
    options = {"ollama_cache_manifest_lifetime": "0"}
    proxy = start_proxy(**options)
    new_client(proxy).pull(model.name)
    origin.remove_model(model.repository, "latest")
    new_client(proxy).pull(model.name)
    proxy.wait_for_line("upstream answered 404; serving the stored manifest")
    proxy.stop()
    proxy = start_proxy(**options, ollama_cache_withdrawn="drop")
    assert pulled(proxy, model)[0] == 404
    origin.stop()
    assert pulled(proxy, model)[0] == 504


@pytest.mark.long
def test_what_has_changed_is_recorded_before_the_tag_moves(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client]
) -> None:
    """`refresh`: clients get the old model whole while the new one is recorded, then the new one from the LAN."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="10d", ollama_cache_refresh="10s")
    model = add_model(origin, unique(300_000))
    new_client(proxy).pull(model.name)
    new_layer = unique(5_000_000)
    gate = origin.gate("/blobs/")
    moved = add_model(origin, new_layer, repository=model.repository)
    gate.wait_held()
    assert pulled(proxy, model)[1] == model.manifest
    gate.set()
    proxy.wait_for_line(f"{model.repository}:latest moved: sha256:")
    origin.stop()
    assert pulled(proxy, model)[1] == moved.manifest
    new_client(proxy).pull(model.name)

    origin.start()
    heads = origin.counters.registry_requests["HEAD", "manifest"]
    origin.counters.wait_for(lambda counters: counters.registry_requests["HEAD", "manifest"] > heads)
