"""What a fleet lives through, and what it costs upstream; longer than the tests beside its fixtures."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.e2e.conftest import Model, add_model, get, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.goclient import PullReport
from tests.support.proxy import ADDON, Proxy
from tests.support.storefiles import blob_file
from tests.system.fleet import MIB, Fleet, NewClient, blob_key, fleet, manifest_key, new_client, shared_fleet, uploaded

__all__ = ["fleet", "new_client", "shared_fleet"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def test_private_models_stay_here(fleet: Fleet, new_client: NewClient) -> None:
    """Nothing of a model that takes a token is uploaded, and one that has become private is taken away."""
    private = add_model(fleet.origin, unique(2 * MIB))
    fleet.origin.set_private(private.repository, private=True)
    new_client(fleet.a).pull(private.name)
    public = fleet.recorded_by_a(new_client, MIB)  # a later one: so the earlier one was looked at
    assert not {*map(blob_key, private.layers), manifest_key(private)} & set(fleet.listing())
    fleet.origin.set_private(public.repository, private=True)
    with to_registry(fleet.a) as connection:
        assert get(connection, f"/v2/{public.repository}/blobs/sha256:{'0' * 64}")[0] == 401
    deadline = time.monotonic() + 30
    while manifest_key(public) in fleet.listing():
        assert time.monotonic() < deadline, "expected the manifest to be taken away"
        time.sleep(0.1)


def test_store_that_dies_costs_nothing_but_time(fleet: Fleet, new_client: NewClient) -> None:
    """Killed in the middle of a recording: upstream brings the rest. Silent from the start: upstream brings all."""
    model = fleet.recorded_by_a(new_client, 48 * MIB)
    killed = threading.Event()

    def kill(_count: int) -> None:
        if not killed.is_set():
            killed.set()
            fleet.server.kill()

    report = new_client(fleet.b, on_progress=kill).pull(model.name)
    assert killed.is_set() and 0 < fleet.origin.counters.cdn_bytes_by_digest[model.layer] <= 48 * MIB
    assert report.max_gap_s < 15
    fleet.server.start()
    fleet.server.pause()
    try:
        other = add_model(fleet.origin, unique(5 * MIB))
        began = time.monotonic()
        new_client(fleet.b).pull(other.name)
        assert time.monotonic() - began < 20
        fleet.b.wait_for_line("doing without it for a while")
    finally:
        fleet.server.resume()


def test_upload_survives_a_kill(fleet: Fleet, new_client: NewClient) -> None:
    """kill -9 in the middle of an upload: nothing is seen of it, and the next start brings one good object."""
    model = add_model(fleet.origin, unique(96 * MIB))
    held = fleet.server.held
    new_client(fleet.a).pull(model.name)
    deadline = time.monotonic() + 60
    while fleet.server.held < held + 16 * MIB:
        assert time.monotonic() < deadline, "expected an upload to begin"
        time.sleep(0.01)
    fleet.a.kill()
    assert blob_key(model.layer) not in fleet.listing()
    fleet.a.start()
    uploaded(fleet.a, model)
    assert [key for key in fleet.listing() if key == blob_key(model.layer)] == [blob_key(model.layer)]
    assert fleet.read(blob_key(model.layer)) == fleet.origin.blob(model.layer).read(0, 96 * MIB)


def pull_by_many(caches: list[Proxy], model: Model, folder: Path, clients: int, **options: Any) -> list[PullReport]:
    """Pull the model with so many clients of each cache at once; each checks every digest."""

    def pull(number: int) -> PullReport:
        cache = caches[number % len(caches)]
        return A2Client(cache.url, cache.ca_file, folder / f"many{number}", **options).pull(model.name)

    with ThreadPoolExecutor(clients * len(caches)) as pool:
        return list(pool.map(pull, range(clients * len(caches))))


def test_one_cache_fetches_for_all(fleet: Fleet, tmp_path: Path) -> None:
    """Three caches, four clients each, one cold blob at once: upstream gives it once, and nobody waits for long."""
    size = 256 * MIB
    model = add_model(fleet.origin, unique(size))
    fleet.origin.rate_total = 60 * MIB
    reports = pull_by_many([fleet.a, fleet.b, fleet.c], model, tmp_path, 4)
    assert fleet.origin.counters.cdn_bytes_by_digest[model.layer] <= 1.05 * size
    for cache in (fleet.a, fleet.b, fleet.c):
        cache.wait_for_line(model.recorded)
        assert not [line for line in cache.output if "a client has waited" in line]  # 4 s and more
    # What the clients see is up to this machine too, which decrypts and hashes for twelve of them.
    assert max(report.max_gap_s for report in reports) < 15


def test_dead_holder_is_replaced(fleet: Fleet, tmp_path: Path) -> None:
    """The cache that fetches for all is killed: one of the others goes on, and upstream gives little twice."""
    size = 64 * MIB
    model = add_model(fleet.origin, unique(size))
    fleet.origin.rate_total = 16 * MIB
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pull_by_many, [fleet.c], model, tmp_path / "first", 1, backoff_unit_s=0.01)
        fleet.origin.counters.wait_for(lambda seen: seen.cdn_bytes_by_digest[model.layer] > 8 * MIB)
        rest = pool.submit(pull_by_many, [fleet.a, fleet.b], model, tmp_path / "rest", 1)
        fleet.a.wait_for_line(f"{model.layer[7:19]} is recorded from")
        fleet.b.wait_for_line(f"{model.layer[7:19]} is recorded from")
        fleet.c.kill()
        reports = rest.result()
        assert first.exception() is not None
    fleet.c.start()
    assert fleet.origin.counters.cdn_bytes_by_digest[model.layer] <= 1.6 * size
    assert max(report.max_gap_s for report in reports) < 10


def run(cache: Proxy, *arguments: str) -> tuple[int, str]:
    """One run of the command line beside the cache: exit code and standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ADDON.parent), "OLLAMA_CACHE_DIR": str(cache.store)}
    command = [sys.executable, "-c", "from pullthrough.cli import main; main()", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr or done.returncode, done.stderr
    return done.returncode, done.stdout


def test_verbs(fleet: Fleet, new_client: NewClient) -> None:
    """`verify`, `prune`, `warm` and `stats` know the object store."""
    kept = fleet.recorded_by_a(new_client, 9 * MIB)
    stray, lease = f"blobs/sha256/00/{'0' * 64}", f"leases/{'0' * 64}/1"
    for key in (stray, lease):
        obstore.put(fleet.objects, key, b"nobody's")
    obstore.put(fleet.objects, blob_key(kept.layer), bytes(9 * MIB))
    code, output = run(fleet.a, "verify", "--tier")
    assert code == 1 and f"removed {blob_key(kept.layer)}" in output and f"removed {stray}" in output
    fleet.a.wait_for_line(f"uploaded {kept.layer[7:19]}", count=2)
    assert run(fleet.a, "verify", "--tier")[0] == 0

    unlisted = hashlib.sha256(b"unlisted").hexdigest()
    obstore.put(fleet.objects, f"blobs/sha256/{unlisted[:2]}/{unlisted}", b"unlisted")
    assert run(fleet.a, "prune", "--tier", "--age", "0", "--dry-run")[1].startswith("would remove 1 blob and ")
    assert run(fleet.a, "prune", "--tier", "--age", "0")[0] == 0
    assert lease not in fleet.listing() and blob_key(kept.layer) in fleet.listing()
    assert not any(unlisted in key for key in fleet.listing())

    model = add_model(fleet.origin, unique(MIB))
    assert run(fleet.b, "warm", "--tier-only", model.name)[0] == 0
    assert manifest_key(model) in fleet.listing()
    assert model.name not in run(fleet.b, "ls")[1]
    assert not blob_file(fleet.b.store, model.layer.replace(":", "-")).exists()
    assert "in use" in run(fleet.a, "stats")[1]
