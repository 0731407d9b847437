"""Several caches and the object store they share: a real S3 server, a real mitmdump for each cache."""

import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.e2e.conftest import Model, add_model, unique
from tests.support import s3
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.goclient import PullError, PullReport
from tests.support.legacy import A1Client
from tests.support.origin import Origin
from tests.support.proxy import ADDON, Proxy, free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

MIB = 1 << 20
NewClient = Callable[..., A2Client]


class Fleet:
    """Caches `a` and `b`, an origin, and the folder of a bucket that they share."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.origin = stack.enter_context(Origin(folder / "origin"))
        self.server = stack.enter_context(s3.S3Server(folder / "s3"))
        self.objects = self.server.store("fleet")
        self.secret = folder / "fleet-secret"
        self.secret.touch(0o600)
        self.secret.write_text(secrets.token_hex(32))
        self._folder = folder
        self._stack = stack
        self.a = self.start("a", ollama_cache_direct="object-store")
        self.b = self.start("b")
        self.c = self.start("c")

    def start(self, name: str, **options: Any) -> Proxy:
        """A cache of the fleet."""
        folder = self._folder / name
        folder.mkdir()
        fleet = {
            "ollama_cache_object_store": f"s3://{s3.BUCKET}/fleet",
            "ollama_cache_fleet_secret_file": self.secret,
            "ollama_cache_listen": f"127.0.0.1:{free_port()}",
            "ollama_cache_front": "",
            "ollama_cache_direct": "off",
        }
        cache = Proxy(folder, self.origin, env=self.server.environment, **(fleet | options))
        return self._stack.enter_context(cache)

    def listing(self, prefix: str = "") -> list[str]:
        """What lies in the object store."""
        return sorted(item["path"] for page in obstore.list(self.objects, prefix or None) for item in page)

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self.objects, key).bytes())

    def recorded_by_a(self, new_client: NewClient, *sizes: int) -> Model:
        """A model that `a` has recorded and uploaded."""
        model = add_model(self.origin, *map(unique, sizes))
        new_client(self.a).pull(model.name)
        uploaded(self.a, model)
        self.origin.reset_counters()
        return model


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if s3.interpreter() is None:
        pytest.skip(f"OpenStack Swift is missing: no `swift` in this environment, and {s3.INTERPRETER} names no other")
    with ExitStack() as stack:
        yield Fleet(tmp_path_factory.mktemp("fleet"), stack)


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, put right after each test."""
    shared_fleet.a.forget_lines()
    shared_fleet.b.forget_lines()
    shared_fleet.c.forget_lines()
    yield shared_fleet
    shared_fleet.origin.restore()


@pytest.fixture
def new_client(tmp_path: Path) -> NewClient:
    """An Ollama of today with an empty models folder of its own; parts and back-off scaled down."""

    def make(proxy: Proxy, **options: Any) -> A2Client:
        scale: dict[str, Any] = {"min_part": 1_000_000, "max_part": 10_000_000, "backoff_unit_s": 0.05}
        folder = tmp_path / f"client-{secrets.token_hex(4)}"
        return A2Client(proxy.url, proxy.ca_file, folder, **(scale | options))

    return make


def blob_key(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"


def manifest_key(model: Model) -> str:
    return f"manifests/registry.ollama.ai/{model.repository}/latest"


def uploaded(proxy: Proxy, model: Model) -> None:
    """Wait until the cache has brought the whole model into the object store."""
    proxy.wait_for_line(f"uploaded registry.ollama.ai/{model.repository}:latest", timeout_s=40)


def test_what_one_has_recorded_serves_all(fleet: Fleet, new_client: NewClient) -> None:
    """A records; B serves it while upstream is down; A that has lost its disk refills with no byte of upstream's."""
    model = fleet.recorded_by_a(new_client, 12 * MIB, 3000)
    assert {*map(blob_key, model.blobs), manifest_key(model)} <= set(fleet.listing())
    assert fleet.read(blob_key(model.layer)) == fleet.origin.blob(model.layer).read(0, 12 * MIB)
    fleet.origin.stop()
    new_client(fleet.b).pull(model.name)
    fleet.a.stop()
    shutil.rmtree(fleet.a.store)
    fleet.a.start()
    new_client(fleet.a).pull(model.name)
    fleet.origin.start()
    new_client(fleet.a).pull(model.name)
    assert (fleet.origin.counters.cdn_bytes, fleet.origin.counters.registry_bytes) == (0, 0)
    lines = fleet.a.output + fleet.b.output
    assert not [line for line in lines if fleet.secret.read_text() in line or "X-Amz-Signature" in line]


def test_private_models_stay_here(fleet: Fleet, new_client: NewClient) -> None:
    """Nothing of a model that takes a token is uploaded, and one that has become private is taken away."""
    private = add_model(fleet.origin, unique(2 * MIB))
    fleet.origin.set_private(private.repository, private=True)
    new_client(fleet.a).pull(private.name)
    public = fleet.recorded_by_a(new_client, MIB)  # a later one: so the earlier one was looked at
    assert not {*map(blob_key, private.layers), manifest_key(private)} & set(fleet.listing())
    fleet.origin.set_private(public.repository, private=True)
    new_client(fleet.a).pull(public.name)  # fresh for five minutes
    assert manifest_key(public) in fleet.listing()


def test_tampered_objects_are_no_hit(fleet: Fleet, new_client: NewClient) -> None:
    """A blob with other bytes is quarantined and replaced; a manifest that the fleet has not signed is ignored."""
    model = fleet.recorded_by_a(new_client, 9 * MIB)
    key = blob_key(model.layer)
    attributes = {"sha256": model.layer.removeprefix("sha256:")}
    obstore.put(fleet.objects, key, bytes(9 * MIB), attributes=attributes)
    client = new_client(fleet.b)
    with contextlib.suppress(PullError):
        client.pull(model.name)
    fleet.b.wait_for_line("quarantined")
    client.pull(model.name)  # it checks every digest
    fleet.b.wait_for_line(f"uploaded {model.layer[7:19]}")
    assert fleet.read(key) == fleet.origin.blob(model.layer).read(0, 9 * MIB)

    signed = fleet.recorded_by_a(new_client, MIB)
    evil = add_model(fleet.origin, unique(MIB))
    forged = fleet.read(manifest_key(signed)).replace(b'"confirmed": 1', b'"confirmed": 9')
    obstore.put(fleet.objects, manifest_key(signed), forged)
    obstore.put(fleet.objects, manifest_key(evil), fleet.read(manifest_key(model)))
    for victim in (signed, evil):
        new_client(fleet.b).pull(victim.name)
        fleet.b.wait_for_line(f"{manifest_key(victim)}: expected a document signed by this fleet")
        assert [request for request in fleet.origin.counters.requests if request.target == victim.manifest_target]


def test_store_that_dies_costs_nothing_but_time(fleet: Fleet, new_client: NewClient) -> None:
    """Killed in the middle of a recording: upstream brings the rest. Silent from the start: upstream brings all."""
    model = fleet.recorded_by_a(new_client, 48 * MIB)
    killed = threading.Event()

    def kill(_count: int) -> None:
        if not killed.is_set():
            killed.set()
            fleet.server.kill()

    fleet.origin.rate_per_connection = None
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


def test_parts_come_from_the_object_store(fleet: Fleet, tmp_path: Path, new_client: NewClient) -> None:
    """Large parts follow a second redirect to a signed address, with every generation's way of asking."""
    scale = {"min_part": 10_000_000, "max_part": 10_000_000}
    kinds: list[tuple[Any, dict[str, int]]] = [(A2Client, scale), (A1Client, scale), (Client2, {})]
    for kind, options in kinds:
        model = fleet.recorded_by_a(new_client, 20_000_000)
        fleet.a.forget_lines()
        kind(fleet.a.url, fleet.a.ca_file, tmp_path / kind.__name__, **options).pull(model.name)
        fleet.a.wait_for_line("-> 307 ollama-cache; hit; detail=direct")
        assert fleet.origin.counters.cdn_bytes == 0
    assert not [line for line in fleet.a.output if "X-Amz" in line]


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
    assert max(report.max_gap_s for report in reports) < 5
    for cache in (fleet.a, fleet.b, fleet.c):
        cache.wait_for_line(model.recorded)


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
    assert run(fleet.a, "prune", "--tier", "--age", "0", "--dry-run")[1].startswith("would remove 1 blobs and 1 ")
    assert run(fleet.a, "prune", "--tier", "--age", "0")[0] == 0
    assert lease not in fleet.listing() and blob_key(kept.layer) in fleet.listing()
    assert not any(unlisted in key for key in fleet.listing())

    model = add_model(fleet.origin, unique(MIB))
    assert run(fleet.b, "warm", "--tier-only", model.name)[0] == 0
    assert manifest_key(model) in fleet.listing()
    assert model.name not in run(fleet.b, "ls")[1]
    assert not (fleet.b.store / "blobs" / model.layer.replace(":", "-")).exists()
    assert "in use" in run(fleet.a, "stats")[1]
