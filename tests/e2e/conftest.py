"""A hostile origin and a real mitmdump in front of it, fresh for each test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.a2 import A2Client
from tests.support.http1 import Connection, connect
from tests.support.origin import R2_HOST, Origin
from tests.support.proxy import Proxy

MODEL = "application/vnd.ollama.image.model"
REGISTRY = "registry.ollama.ai"
MB = 1_000_000


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    folder = tmp_path / "origin"
    folder.mkdir()
    with Origin(folder) as origin:
        yield origin


@pytest.fixture
def start_proxy(tmp_path: Path, origin: Origin) -> Iterator[Callable[..., Proxy]]:
    """Start the cache in front of the origin, with options; what it printed is shown when the test fails."""
    folder = tmp_path / "proxy"
    folder.mkdir()
    with ExitStack() as stack:

        def start(**options: object) -> Proxy:
            return stack.enter_context(Proxy(folder, origin, **options))

        yield start


@pytest.fixture
def proxy(start_proxy: Callable[..., Proxy]) -> Proxy:
    return start_proxy()


@pytest.fixture
def new_client(tmp_path: Path) -> Callable[..., A2Client]:
    """An Ollama of today with an empty models folder of its own; parts and back-off scaled down a hundredfold."""
    count = 0

    def make(proxy: Proxy, **options: object) -> A2Client:
        nonlocal count
        count += 1
        scale: dict[str, object] = {"min_part": MB, "max_part": 10 * MB, "backoff_unit_s": 0.05}
        directory = options.pop("directory", tmp_path / f"client{count}")
        return A2Client(proxy.url, proxy.ca_file, directory, **(scale | options))  # type: ignore[arg-type]

    return make


def to_registry(proxy: Proxy) -> Connection:
    """A connection to the registry through the proxy."""
    return connect(proxy.url, REGISTRY, 443, proxy.ca_file)


def to_cdn(proxy: Proxy) -> Connection:
    """A connection to the blob host through the proxy."""
    return connect(proxy.url, R2_HOST, 443, proxy.ca_file)


def get(connection: Connection, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET: status, header fields by lower-case name, body."""
    response = connection.request("GET", target, [(name.replace("_", "-"), value) for name, value in headers.items()])
    body = response.read()
    return response.status, {name.lower(): value for name, value in response.headers}, body


def canonical(proxy: Proxy, repository: str, digest: str) -> str:
    """The canonical address (path and query) that the cache redirects a blob request to."""
    with to_registry(proxy) as connection:
        status, headers, _ = get(connection, f"/v2/{repository}/blobs/{digest}")
    assert status == 307, status
    location = headers["location"]
    assert location.startswith(f"https://{R2_HOST}/"), location
    return location.removeprefix(f"https://{R2_HOST}")
