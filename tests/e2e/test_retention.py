"""The store within its bounds, while clients pull: through a real mitmdump."""

import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import MB, add_model, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy
from tests.support.storefiles import blob_files

NewClient = Callable[..., A2Client]


def on_disk(proxy: Proxy) -> int:
    """What blobs and recordings take of the disk, in bytes."""
    total = 0
    for folder in ("public/blobs", "private/blobs", "ingest"):
        for path in (proxy.store / folder).iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
    return total


def test_the_least_recently_pulled_goes(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient
) -> None:
    """Whole models make room for a new one, pinned ones do not; what is larger than the bound is passed through."""
    pinned, old, middle = (add_model(origin, unique(3 * MB), unique(MB)) for _ in range(3))
    proxy = start_proxy(ollama_cache_max_size="13MB", ollama_cache_pins=f"{pinned.name}:*")
    for model in (pinned, old, middle, old):
        new_client(proxy).pull(model.name)
        for digest in model.layers:
            proxy.wait_for_line(f"recorded {digest[7:19]}")
    proxy.restart()

    new = add_model(origin, unique(4 * MB))
    new_client(proxy).pull(new.name)
    proxy.wait_for_line(f"evicting registry.ollama.ai/{middle.repository}:latest")
    proxy.wait_for_line(new.recorded)
    large = add_model(origin, unique(20 * MB))
    client = new_client(proxy)
    client.pull(large.name)
    assert_complete(client, large)
    proxy.wait_for_line("expected room for 20 MB within the bounds (max_size 13 MB")
    held = {path.name.replace("-", ":") for path in blob_files(proxy.store)}
    assert held >= {*pinned.blobs, *old.layers, *new.layers}
    assert held.isdisjoint(middle.layers)

    origin.stop()
    for model in (pinned, old, new):
        client = new_client(proxy)
        client.pull(model.name)
        assert_complete(client, model)


@pytest.mark.long
def test_eviction_under_load(origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient) -> None:
    """Models of three times the bound, pulled by four clients in any order: all correct, the bound kept."""
    bound = 60 * MB
    models = [add_model(origin, unique(9 * MB), unique(1 * MB)) for _ in range(18)]
    proxy = start_proxy(ollama_cache_max_size=str(bound))
    stop = threading.Event()
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, on_disk(proxy))

    def work(number: int) -> int:
        chosen = random.Random(number).sample(models, len(models))
        for model in chosen:
            client = new_client(proxy)
            client.pull(model.name)
            assert_complete(client, model)
        return len(chosen)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) == 72
    finally:
        stop.set()
        watcher.join()
    # Open files outlive their names, and four recordings may be under way.
    assert bound * 0.5 < peak <= bound + 4 * 10 * MB
    evicted = sum("evicting registry.ollama.ai/" in line for line in proxy.output)
    assert evicted >= len(models) - bound // (10 * MB)
