"""The cache's disk fails: full, gone, read-only, unreadable. A pull never fails because of it."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, add_model, canonical, to_cdn, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import PROGRAM, PeakRss, Proxy
from tests.support.storefiles import blob_file

NewClient = Callable[..., A2Client]


def small_disk(folder: Path, size: str) -> list[str | Path]:
    """mitmdump in a mount namespace of its own, where `folder` is a disk of that size. Skips where that is refused."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}'"
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs Linux and unshare")
    folder.mkdir(parents=True)
    done = subprocess.run([*unshare, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this system does not let us mount: {done.stderr.strip()}")
    return [*unshare, "sh", "-c", f'{mount} && exec "$@"', "sh", *PROGRAM]


def fill(proxy: Proxy, store: Path) -> None:
    """Take all the room that is left on the store's disk."""
    with Path(f"/proc/{proxy.pid}/root{store}/other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
        while True:
            other.write(bytes(MB))


def files_of(proxy: Proxy, folder: str) -> list[str]:
    """What lies in a folder of the store, as the cache's process sees it."""
    return sorted(path.name for path in Path(f"/proc/{proxy.pid}/root{proxy.store}/{folder}").iterdir())


@pytest.mark.parametrize(
    ("disk", "size"),
    [
        pytest.param("32m", 96 * MB, id="3 times the disk"),
        pytest.param("64m", 1 << 30, id="1 GiB and 64 MiB", marks=pytest.mark.long),
    ],
)
def test_full_disk(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path, disk: str, size: int
) -> None:
    """A blob larger than the disk is passed through, in constant memory and without a trace; a smaller one is kept."""
    store = tmp_path / "small"
    proxy = start_proxy(program=small_disk(store, disk), ollama_cache_dir=store)
    large, small = add_model(origin, unique(size)), add_model(origin, unique(8 * MB))
    with PeakRss(proxy) as rss:
        client = new_client(proxy, min_part=size // 16, max_part=size)
        report = client.pull(large.name)
    assert_complete(client, large)
    assert report.retries == report.stalls == 0
    assert report.max_gap_s < 10
    proxy.wait_for_line("expected room for")
    assert rss.growth_mib < 64 + 100  # the window, and what streaming takes
    assert files_of(proxy, "ingest") == []
    assert origin.counters.cdn_bytes_by_digest[large.layer] <= size * 1.02

    client = new_client(proxy)
    client.pull(small.name)
    assert_complete(client, small)
    proxy.wait_for_line(small.recorded)
    assert small.layer.replace(":", "-") in files_of(proxy, "public/blobs")


@pytest.mark.long
def test_four_clients_past_the_disk(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path
) -> None:
    """Clients at about the same place share what passes through."""
    store = tmp_path / "small"
    proxy = start_proxy(program=small_disk(store, "16m"), ollama_cache_dir=store)
    model = add_model(origin, unique(32 * MB))
    origin.rate_per_connection = 2 * MB
    clients = [new_client(proxy, min_part=8 * MB) for _ in range(4)]
    with PeakRss(proxy) as rss, ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda client: client.pull(model.name), clients))
    for client, report in zip(clients, reports, strict=True):
        assert_complete(client, model)
        assert report.retries == report.stalls == 0
    assert rss.growth_mib < 64 + 100  # the window, and what streaming takes
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= 32 * MB * 2


def test_disk_that_fills_up(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path
) -> None:
    """Somebody else takes the room while a blob is recorded: what is pulled has its own already."""
    store = tmp_path / "small"
    proxy = start_proxy(program=small_disk(store, "32m"), ollama_cache_dir=store)
    model = add_model(origin, unique(24 * MB))
    origin.rate_per_connection = MB
    client = new_client(proxy, min_part=2 * MB)
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(client.pull, model.name)
        origin.counters.wait_for(lambda counters: counters.cdn_bytes > 6 * MB)
        fill(proxy, store)
        report = pulling.result()
    assert_complete(client, model)
    assert report.retries == report.stalls == 0
    proxy.wait_for_line(model.recorded)


def test_disk_that_fills_up_before_a_pull_shows(
    origin: Origin, start_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    """What a client only reads from has no room of its own: it goes on without the disk."""
    store = tmp_path / "small"
    proxy = start_proxy(program=small_disk(store, "32m"), ollama_cache_dir=store)
    blob = unique(24 * MB)
    model = add_model(origin, blob)
    origin.rate_per_connection = MB // 2
    address, stop = canonical(proxy, model), 20 * MB
    with to_cdn(proxy) as connection:
        response = connection.request("GET", address, [("Range", f"bytes=0-{stop - 1}")])
        assert response.read(MB) == blob.read(0, MB)
        fill(proxy, store)
        origin.rate_per_connection = None
        position = MB
        while data := response.read(MB):
            assert data == blob.read(position, position + len(data))
            position += len(data)
    assert position == stop
    proxy.wait_for_line("No space left on device")


@pytest.mark.long
def test_what_is_being_recorded_counts(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path
) -> None:
    """Two blobs that fit one by one come at once: the one that comes second is passed through from the start."""
    store = tmp_path / "small"
    proxy = start_proxy(program=small_disk(store, "32m"), ollama_cache_dir=store)
    models = [add_model(origin, unique(24 * MB)) for _ in range(2)]
    origin.rate_per_connection = MB
    clients = [new_client(proxy, min_part=2 * MB) for _ in models]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda client, model: client.pull(model.name), clients, models))
    for client, model, report in zip(clients, models, reports, strict=True):
        assert_complete(client, model)
        assert report.retries == report.stalls == 0
    proxy.wait_for_line("expected room for")


def test_store_that_vanishes(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path
) -> None:
    """Somebody deletes the store's folders under the running cache: pulls go on."""
    proxy = start_proxy()
    first, second = add_model(origin, unique(4 * MB)), add_model(origin, unique(4 * MB))
    new_client(proxy).pull(first.name)
    proxy.wait_for_line(first.recorded)
    for name in ("public/blobs", "private/blobs", "ingest", "quarantine"):
        shutil.rmtree(proxy.store / name)
    for model in (first, second):
        client = new_client(proxy)
        report = client.pull(model.name)
        assert_complete(client, model)
        assert report.retries == report.stalls == 0


@pytest.mark.long
def test_file_that_cannot_be_read(origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient) -> None:
    """A stored blob turns out to be unreadable in the middle of a hit: it is recorded anew for the client's retry."""
    proxy = start_proxy()
    model = add_model(origin, unique(40 * MB))
    new_client(proxy).pull(model.name)
    proxy.wait_for_line(model.recorded)
    blob = blob_file(proxy.store, model.layer.replace(":", "-"))

    intact = True

    def cut(_count: int) -> None:
        nonlocal intact
        if intact:
            intact = False
            os.truncate(blob, MB)

    client = new_client(proxy, min_part=20 * MB, max_part=20 * MB, on_progress=cut)
    client.pull(model.name)
    assert_complete(client, model)
    proxy.wait_for_line("it will be recorded anew")
    proxy.wait_for_line(model.recorded, count=2)
    new_client(proxy).pull(model.name)
