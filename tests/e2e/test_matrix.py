"""Every client against every state of the cache: the compatibility matrix, printed after the run.

`scripts/test tests/e2e/test_matrix.py` runs it alone.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from tests.e2e.conftest import MB, Model, add_model, canonical, get, to_cdn, to_registry, unique
from tests.support import foreign
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.foreign import Foreign, Order, gguf
from tests.support.goclient import Aborted, PullClient
from tests.support.legacy import A0Client, A1Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy

SIZE: Final = 8 * MB
STATES: Final = ("cold", "warm", "offline", "resumed", "concurrent")


class Client(Protocol):
    """A row of the matrix."""

    @property
    def name(self) -> str: ...

    def pull(self, proxy: Proxy, model: Model, folder: Path) -> None:
        """Fetch the model into the folder; raises if the client is not content."""

    def start_and_stop(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
        """The same, but stopped on the way."""


@dataclass(frozen=True)
class Emulated:
    """An emulator of an Ollama. Sizes are scaled so that a small blob has several parts."""

    name: str
    kind: Callable[..., PullClient]
    version: str
    scale: dict[str, Any]

    def _client(self, proxy: Proxy, folder: Path, **options: Any) -> PullClient:
        return self.kind(proxy.url, proxy.ca_file, folder, version=self.version, **(self.scale | options))

    def pull(self, proxy: Proxy, model: Model, folder: Path) -> None:
        report = self._client(proxy, folder).pull(model.name)
        assert report.retries == report.stalls == 0

    def start_and_stop(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
        with pytest.raises(Aborted):
            self._client(proxy, folder, abort_after=SIZE // 2).pull(model.name)


@dataclass(frozen=True)
class Program:
    """A real client, in a process of its own."""

    client: Foreign

    @property
    def name(self) -> str:
        return self.client.name

    def pull(self, proxy: Proxy, model: Model, folder: Path) -> None:
        self.client.fetch(proxy, Order(model.name, model.layer, folder))

    def start_and_stop(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
        origin.rate_per_connection = MB // 4
        with self.client.running(proxy, Order(model.name, model.layer, folder)) as process:
            origin.counters.wait_for(lambda counters: counters.cdn_bytes_by_digest[model.layer] > SIZE // 4)
            assert process.poll() is None, process.communicate()[0]
        origin.rate_per_connection = None


PARTS: Final = {"min_part": MB, "max_part": 10 * MB, "backoff_unit_s": 0.05}
CLIENTS: Final[tuple[Client, ...]] = (
    Emulated("Ollama 0.0.11 (one stream)", A0Client, "0.0.11", {}),
    Emulated("Ollama 0.1.1 (one stream)", A0Client, "0.1.1", {}),
    Emulated("Ollama 0.1.10 (parts at the registry)", A1Client, "0.1.10", {"min_part": MB, "max_part": 4 * MB}),
    Emulated("Ollama 0.1.30 (parts at the registry)", A1Client, "0.1.30", PARTS),
    Emulated("Ollama 0.3.0 (parts at the registry)", A1Client, "0.3.0", PARTS),
    Emulated("Ollama 0.3.9 (direct URL, 307 only)", A2Client, "0.3.9", PARTS),
    Emulated("Ollama 0.5.7 (direct URL, 5 s stall)", A2Client, "0.5.7", PARTS),
    Emulated("Ollama 0.32.1 (direct URL)", A2Client, "0.32.1", PARTS),
    Emulated("Ollama 0.34.2 (no foreign redirects)", A2Client, "0.34.2", PARTS),
    Emulated("Ollama 0.34.3 (redirects in the family)", A2Client, "current", PARTS),
    Emulated("client2 of 0.6.0 (probe, 8 MiB pieces)", Client2, "0.6.0", {"threshold": 2 * MB, "chunk": MB}),
    Emulated("client2 of 0.31.1 (chunk sums)", Client2, "chunksums", {"threshold": 2 * MB}),
    *(Program(client) for client in foreign.CLIENTS),
)


LONG: Final = pytest.mark.long
REPRESENTATIVE: Final = (
    "Ollama 0.1.1 ",
    "Ollama 0.1.30",
    "Ollama 0.5.7",
    "Ollama 0.34.3",
    "client2 of 0.31",
    "ramalama",
)


def knows_tokens(client: Client) -> bool:
    """Whether it answers a challenge: Ollama since 0.1.2. client2 asks for small blobs without any credential."""
    return isinstance(client, Emulated) and client.kind in (A1Client, A2Client)


def is_quick(client: Client, state: str) -> bool:
    """Every client is tried in each run, and one of each generation in every state."""
    return state in ("cold", "offline") or client.name.startswith(REPRESENTATIVE)


def holds(folder: Path, data: bytes) -> bool:
    """Some file below the folder is these bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size == len(data))
    return any(path.read_bytes() == data for path in files)


def record(proxy: Proxy, model: Model) -> None:
    """Let the cache record the model, whoever the client."""
    with to_registry(proxy) as connection:
        get(connection, model.manifest_target)
        for layer in model.blobs:
            assert get(connection, f"/v2/{model.repository}/blobs/{layer}")[0] == 307
    with to_cdn(proxy) as connection:
        get(connection, canonical(proxy, model))
    proxy.wait_for_line(model.recorded)


@pytest.mark.parametrize(
    ("client", "state"),
    [
        pytest.param(client, state, id=f"{client.name}, {state}", marks=[] if is_quick(client, state) else [LONG])
        for client in CLIENTS
        for state in STATES
    ],
)
def test_matrix(
    origin: Origin,
    proxy: Proxy,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    client: Client,
    state: str,
) -> None:
    """The client gets the bytes, and upstream is asked for each of them once, or not at all."""
    record_property("matrix", [client.name, state])
    data = gguf(unique(SIZE - 24).read(0, SIZE - 24))
    model = add_model(origin, data)
    folders = [tmp_path / f"client{number}" for number in range(4 if state == "concurrent" else 1)]
    if state in ("warm", "offline"):
        record(proxy, model)
        origin.reset_counters()
    if state == "offline":
        origin.stop()
    if state == "resumed":
        client.start_and_stop(proxy, model, folders[0], origin)
        assert not holds(folders[0], data)
    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(lambda folder: client.pull(proxy, model, folder), folders))
    for folder in folders:
        assert holds(folder, data)
    expected = 0 if state in ("warm", "offline") else SIZE
    assert origin.counters.cdn_bytes_by_digest[model.layer] == expected


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(client, id=client.name, marks=[] if client.name.startswith(REPRESENTATIVE) else [LONG])
        for client in CLIENTS
        if knows_tokens(client)
    ],
)
def test_private(origin: Origin, proxy: Proxy, tmp_path: Path, client: Client) -> None:
    """A private model: recorded once, served again to who may have it, and to nobody while upstream cannot be asked."""
    data = gguf(unique(SIZE - 24).read(0, SIZE - 24))
    model = add_model(origin, data, private=True)
    for folder in (tmp_path / "cold", tmp_path / "warm"):
        client.pull(proxy, model, folder)
        assert holds(folder, data)
        proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == SIZE
    origin.stop()
    with pytest.raises(Exception, match=r"\d{3}|unauthorized|offline|denied") as refused:
        client.pull(proxy, model, tmp_path / "offline")
    assert not isinstance(refused.value, AssertionError)
    assert not holds(tmp_path / "offline", data)
