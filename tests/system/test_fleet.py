"""Several caches and the object store they share: a real S3 server, a real mitmdump for each cache."""

import itertools
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.e2e.conftest import add_model, unique
from tests.support import s3
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy

pytestmark = pytest.mark.long

MIB = 1 << 20

_fleets = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    if s3.interpreter() is None:
        pytest.skip(f"OpenStack Swift is missing: no `swift` in this environment, and {s3.INTERPRETER} names no other")
    with s3.S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


class Fleet:
    """Caches that share one folder of the bucket; each has a folder of its own."""

    def __init__(self, folder: Path, origin: Origin, server: s3.S3Server, stack: ExitStack) -> None:
        self.origin = origin
        self.server = server
        self.prefix = f"fleet{next(_fleets)}"
        self.objects = server.store(self.prefix)
        self.secret = folder / "fleet-secret"
        self.secret.touch(0o600)
        self.secret.write_text(secrets.token_hex(32))
        self._folder = folder
        self._stack = stack

    def start(self, name: str, **options: Any) -> Proxy:
        """A cache of the fleet."""
        folder = self._folder / name
        folder.mkdir()
        fleet = {
            "ollama_cache_object_store": f"s3://{s3.BUCKET}/{self.prefix}",
            "ollama_cache_fleet_secret_file": self.secret,
        }
        return self._stack.enter_context(Proxy(folder, self.origin, env=self.server.environment, **(fleet | options)))

    def keys(self, prefix: str = "") -> list[str]:
        """What lies in the object store."""
        return sorted(item["path"] for page in obstore.list(self.objects, prefix or None) for item in page)

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self.objects, key).bytes())


@pytest.fixture
def fleet(tmp_path: Path, origin: Origin, server: s3.S3Server) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, origin, server, stack)


def blob_key(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"


def uploaded(proxy: Proxy, name: str) -> None:
    proxy.wait_for_line(f"uploaded registry.ollama.ai/library/{name}:latest", timeout_s=30)


def test_what_one_has_recorded_serves_all(fleet: Fleet, new_client: Callable[..., A2Client]) -> None:
    """A records; B serves it while upstream is down; A without its disk serves it with no byte of upstream's."""
    model = add_model(fleet.origin, unique(12 * MIB), unique(3000))
    first = fleet.start("a")
    new_client(first).pull(model.name)
    uploaded(first, model.name)
    assert fleet.keys() == sorted(
        [*map(blob_key, model.blobs), f"manifests/registry.ollama.ai/{model.repository}/latest"]
    )
    assert fleet.read(blob_key(model.layer)) == fleet.origin.blob(model.layer).read(0, 12 * MIB)
    fleet.origin.stop()
    second = fleet.start("b")
    new_client(second).pull(model.name)
    fleet.origin.start()
    fleet.origin.reset_counters()
    third = fleet.start("c")  # with another disk a cache is another cache
    new_client(third).pull(model.name)
    assert (fleet.origin.counters.cdn_bytes, fleet.origin.counters.registry_bytes) == (0, 0)
    assert not any(
        fleet.secret.read_text() in line or "X-Amz-Signature" in line for line in first.output + second.output
    )
