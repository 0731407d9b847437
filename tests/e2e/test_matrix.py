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
from tests.support.goclient import Aborted, PullClient, PullError
from tests.support.legacy import A0Client, A1Client
from tests.support.modern import ModernClient
from tests.support.origin import PUBLIC_ADDRESSES, Origin
from tests.support.proxy import Proxy
from tests.support.readers import StrictReader

SIZE: Final = 8 * MB
STATES: Final = ("cold", "warm", "offline", "resumed", "concurrent")


class Client(Protocol):
    """A row of the matrix."""

    @property
    def name(self) -> str: ...

    @property
    def bypasses(self) -> bool:
        """It fetches the bytes of blobs past the proxy."""

    def pull(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
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
    bypasses: bool = False

    def _client(self, proxy: Proxy, folder: Path, origin: Origin, **options: Any) -> PullClient:
        options = {**self.scale, "version": self.version, **options}
        cafile = proxy.ca_file
        if self.kind is ModernClient:
            options |= {"dns": PUBLIC_ADDRESSES, "resolve": origin.resolve, "probe_deadline_s": 2.0}
        if self.bypasses:
            # It trusts the real registry's authority as well as the cache's.
            cafile = folder.parent / f"{folder.name}-trusted.pem"
            cafile.write_bytes(proxy.ca_file.read_bytes() + origin.ca_file.read_bytes())
        return self.kind(proxy.url, cafile, folder, **options)

    def pull(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
        report = self._client(proxy, folder, origin).pull(model.name)
        assert report.retries == report.stalls == 0

    def start_and_stop(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
        with pytest.raises(Aborted):
            self._client(proxy, folder, origin, abort_after=SIZE // 2).pull(model.name)


@dataclass(frozen=True)
class Program:
    """A real client, in a process of its own."""

    client: Foreign
    bypasses: bool = False

    @property
    def name(self) -> str:
        return self.client.name

    def pull(self, proxy: Proxy, model: Model, folder: Path, origin: Origin) -> None:
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
    Emulated("Ollama 0.35.1 (parts past the proxy)", ModernClient, "0.35.1", PARTS, bypasses=True),
    Emulated("Ollama 0.40.2 (the same, takes lists)", ModernClient, "0.40.2", PARTS, bypasses=True),
    Emulated("Ollama after 0.40.2 (mended)", ModernClient, "0.40.3", PARTS),
    Emulated("an unknown Ollama, if it is mended", ModernClient, "0.41.0 proxying", PARTS),
    Emulated("an unknown Ollama, if it is not", ModernClient, "0.41.0 bypassing", PARTS, bypasses=True),
    Emulated("a reader of redirects that trusts two hosts", StrictReader, "current", {}),
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
    "Ollama 0.40.2",
    "Ollama after",
    "client2 of 0.31",
    "ramalama",
)


def knows_tokens(client: Client) -> bool:
    """Whether it answers a challenge: Ollama since 0.1.2. client2 asks for small blobs without any credential."""
    return isinstance(client, Emulated) and client.kind in (A1Client, A2Client, ModernClient) and not client.bypasses


def is_quick(client: Client, state: str) -> bool:
    """Every client is tried cold in each run, and one of each generation in every state."""
    return state == "cold" or client.name.startswith(REPRESENTATIVE)


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
    """The client gets the bytes, and upstream is asked for each of them once, or not at all.

    One that fetches past the proxy gets them there, as long as there is a way, and the cache fetches nothing besides.
    """
    word = ("no" if state == "offline" else "past it") if client.bypasses else "ok"
    record_property("matrix", [client.name, state, word])
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
    if client.bypasses and state == "offline":
        with pytest.raises(PullError, match=r"max retries exceeded: .*refused"):
            client.pull(proxy, model, folders[0], origin)
        return
    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(lambda folder: client.pull(proxy, model, folder, origin), folders))
    for folder in folders:
        assert holds(folder, data)
    fetched = origin.counters.cdn_bytes_by_digest[model.layer]
    if client.bypasses:
        # What was under way when it was stopped is fetched twice, and by nobody else.
        assert SIZE * len(folders) <= fetched <= SIZE * len(folders) * (1.5 if state == "resumed" else 1)
        assert not proxy.store.joinpath("ingest", f"{model.layer.replace(':', '-')}.partial").exists()
        assert state == "warm" or not any(model.recorded in line for line in proxy.output)
    else:
        assert fetched == (0 if state in ("warm", "offline") else SIZE)


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
        client.pull(proxy, model, folder, origin)
        assert holds(folder, data)
        proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == SIZE
    origin.stop()
    with pytest.raises(Exception, match=r"\d{3}|unauthorized|offline|denied") as refused:
        client.pull(proxy, model, tmp_path / "offline", origin)
    assert not isinstance(refused.value, AssertionError)
    assert not holds(tmp_path / "offline", data)
