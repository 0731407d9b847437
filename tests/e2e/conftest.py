"""A hostile origin and a real mitmdump in front of it.

A start of mitmdump costs two seconds, so `origin` and `proxy` are one pair for all tests of a process: each test
brings models of its own (`add_model`, `unique`), and the pair is put right before the next one. A test that needs
other options, restarts, or looks at all that the cache holds or costs takes `start_proxy`.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.a2 import A2Client
from tests.support.http1 import Connection, connect
from tests.support.origin import R2_HOST, Origin, Source, Synthetic
from tests.support.proxy import Proxy

MODEL = "application/vnd.ollama.image.model"
REGISTRY = "registry.ollama.ai"
MB = 1_000_000

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Model:
    """A model of an origin."""

    repository: str
    layers: tuple[str, ...]
    config: str
    manifest: bytes

    @property
    def name(self) -> str:
        """What a user types."""
        return self.repository.removeprefix("library/")

    @property
    def layer(self) -> str:
        """The digest of the first layer."""
        return self.layers[0]

    @property
    def blobs(self) -> tuple[str, ...]:
        """The digests of all layers and of the config."""
        return (*self.layers, self.config)

    @property
    def manifest_target(self) -> str:
        """The request target of its manifest."""
        return f"/v2/{self.repository}/manifests/latest"

    @property
    def blob_target(self) -> str:
        """The request target of its first layer."""
        return f"/v2/{self.repository}/blobs/{self.layer}"

    @property
    def recorded(self) -> str:
        """The beginning of the line that the cache says when the first layer is verified."""
        return f"recorded {self.layer[7:19]}"


def unique(size: int) -> Synthetic:
    """Bytes that no other test has."""
    return Synthetic(size, next(_numbers))


def add_model(origin: Origin, *layers: bytes | Source, repository: str = "", **options: Any) -> Model:
    """Publish a model of these layers as `latest`, in a repository of its own unless one is named."""
    repository = repository or f"library/m{next(_numbers)}"
    digests = tuple(origin.add_blob(layer) for layer in layers)
    config = origin.add_blob(b'{"model_format":"gguf"}')
    pairs = [(MODEL, digest) for digest in digests]
    manifest = origin.add_model(repository, "latest", layers=pairs, config=config, **options)
    return Model(repository, digests, config, manifest)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """The pair behind `origin` and `proxy`."""
    folder = tmp_path_factory.mktemp("shared")
    with Origin(folder / "origin") as origin, Proxy(folder, origin, front=True) as proxy:
        yield origin, proxy


@pytest.fixture
def origin(shared: tuple[Origin, Proxy]) -> Iterator[Origin]:
    """The shared origin: running, without faults, limits and counts."""
    origin, _ = shared
    yield origin
    origin.restore()


@pytest.fixture
def proxy(shared: tuple[Origin, Proxy], origin: Origin) -> Proxy:
    """The shared cache in front of `origin`."""
    _, proxy = shared
    if not proxy.is_running:
        proxy.start()
    # Any answer ends what an earlier test has made the cache believe: that the registry is away.
    with to_registry(proxy) as connection:
        assert get(connection, "/v2/library/nobody/manifests/latest")[0] == 404
    origin.reset_counters()
    proxy.forget_lines()
    return proxy


@pytest.fixture
def start_proxy(tmp_path: Path, origin: Origin) -> Iterator[Callable[..., Proxy]]:
    """Start a cache of the test's own in front of the origin, with options; its output is shown on a failure."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    with ExitStack() as stack:

        def start(**options: Any) -> Proxy:
            return stack.enter_context(Proxy(folder, origin, **options))

        yield start


@pytest.fixture
def new_client(tmp_path: Path) -> Callable[..., A2Client]:
    """An Ollama of today with an empty models folder of its own; parts and back-off scaled down a hundredfold."""
    count = 0

    def make(proxy: Proxy, **options: Any) -> A2Client:
        nonlocal count
        count += 1
        scale: dict[str, Any] = {"min_part": MB, "max_part": 10 * MB, "backoff_unit_s": 0.05}
        directory = options.pop("directory", tmp_path / f"client{count}")
        return A2Client(proxy.url, proxy.ca_file, directory, **(scale | options))

    return make


def to_registry(proxy: Proxy) -> Connection:
    """A connection to the registry through the proxy."""
    return connect(proxy.url, REGISTRY, 443, proxy.ca_file)


def to_cdn(proxy: Proxy) -> Connection:
    """A connection to the blob host through the proxy."""
    return connect(proxy.url, R2_HOST, 443, proxy.ca_file)


PROXYING = "ollama/0.34.4 (amd64 linux) Go/go1.26"
"""The newest Ollama that is known to ask for a blob's parts where it asked for the blob: it gets our own address."""


def get(connection: Connection, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET: status, header fields by lower-case name, body. A blob is asked for as by Ollama 0.34.4 unless told."""
    if "/blobs/sha256:" in target:
        headers = {"User_Agent": PROXYING} | headers
    response = connection.request("GET", target, [(name.replace("_", "-"), value) for name, value in headers.items()])
    body = response.read()
    return response.status, {name.lower(): value for name, value in response.headers}, body


def canonical(proxy: Proxy, model: Model) -> str:
    """The canonical address (path and query) that the cache redirects a request for the first layer to."""
    with to_registry(proxy) as connection:
        status, headers, _ = get(connection, model.blob_target)
    assert status == 307, status
    location = headers["location"]
    assert location.startswith(f"https://{R2_HOST}/"), location
    return location.removeprefix(f"https://{R2_HOST}")


def fetch_parts(proxy: Proxy, address: str, blob: Source, parts: int) -> list[str]:
    """Fetch a blob of the blob host in equal parts at once; what was wrong with the answers, which is nothing."""
    size = blob.size // parts
    wrong: list[str] = []

    def fetch(number: int) -> None:
        start = position = number * size
        with to_cdn(proxy) as connection:
            response = connection.request("GET", address, [("Range", f"bytes={start}-{start + size - 1}")])
            while data := response.read(1 << 20):
                if data != blob.read(position, position + len(data)):
                    wrong.append(f"part {number}: another byte than expected in {position}-{position + len(data)}")
                position += len(data)
        if position != start + size:
            wrong.append(f"part {number}: expected {size} bytes, got {position - start}")

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(fetch, range(parts)))
    return wrong
