"""A fleet for tests: caches, the object store that they share on a real S3 server, and an origin.

Knows nothing of what a test is about.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.e2e.conftest import Model, add_model, unique
from tests.support import s3
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy, free_port

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
        self.a = self.start("a", ollama_cache_offload=True)
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
            # Where this runs in a container, a cache does not guess at its address.
            "ollama_cache_advertise": "127.0.0.1",
            "ollama_cache_front": "",
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
