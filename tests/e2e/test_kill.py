"""The cache is killed in the middle of a recording, or asked to end: nothing that was written is fetched again."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import MB, add_model, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.goclient import PullError
from tests.support.origin import Origin
from tests.support.proxy import Proxy

NewClient = Callable[..., A2Client]
CONNECTIONS = 16
LARGEST_SLICE = 8 << 20


@pytest.mark.parametrize(
    ("size", "percent"),
    [
        (64 << 20, 50),
        pytest.param(512 << 20, 10, marks=pytest.mark.long),
        pytest.param(512 << 20, 50, marks=pytest.mark.long),
        pytest.param(512 << 20, 95, marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(300)
def test_kill_9(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, size: int, percent: int
) -> None:
    """Four clients pull; after the crash they come back: each byte once more at most for what was under way."""
    proxy = start_proxy()
    model = add_model(origin, unique(size))
    origin.rate_per_connection = 4 * MB
    clients = [new_client(proxy, min_part=size // 16, max_part=size, max_retries=1) for _ in range(4)]

    def pull(client: A2Client) -> None:
        with contextlib.suppress(PullError):
            client.pull(model.name)

    with ThreadPoolExecutor(4) as pool:
        pulls = [pool.submit(pull, client) for client in clients]
        wanted = size * percent // 100
        origin.counters.wait_for(lambda counters: counters.cdn_bytes_by_digest[model.layer] >= wanted, timeout_s=60)
        proxy.kill()
        for each in pulls:
            each.result()
    origin.rate_per_connection = None
    proxy.start()
    for client in clients:
        client.pull(model.name)
        assert_complete(client, model)
        client.blob_path(model.layer).unlink()
    upstream = origin.counters.cdn_bytes_by_digest[model.layer]
    assert upstream <= size + CONNECTIONS * LARGEST_SLICE
    print(f"killed at {percent} %: upstream bytes / blob {upstream / size:.3f}")


def test_asked_to_end(origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient) -> None:
    """SIGTERM ends a busy cache at once, with exit code 0; the next start goes on where it was."""
    proxy = start_proxy()
    size = 64 << 20
    model = add_model(origin, unique(size))
    origin.rate_per_connection = 2 * MB
    client = new_client(proxy, min_part=size // 16, max_part=size, max_retries=1)
    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(client.pull, model.name)
        origin.counters.wait_for(lambda counters: counters.cdn_bytes_by_digest[model.layer] >= size // 2, timeout_s=60)
        began = time.monotonic()
        assert proxy.stop() == 0
        # Two seconds on an idle machine.
        assert time.monotonic() - began < 5
        with pytest.raises(PullError):
            pull.result()
    origin.rate_per_connection = None
    proxy.start()
    client.pull(model.name)
    assert_complete(client, model)
    # What a connection had under way is written and journalled as far as it came.
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= size * 1.05
