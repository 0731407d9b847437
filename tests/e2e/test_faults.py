"""Every trouble of tests/faults.py in every situation: right bytes, clients that notice nothing, a bounded cost.

`scripts/test tests/e2e/test_faults.py` runs it alone; the measured ratios are printed after the run.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.conftest import MB, add_model, unique
from tests.faults import FLIPPED, RATE, SIZE, TROUBLES, Trouble
from tests.support import foreign
from tests.support.a2 import A2Client, Aborted, DigestMismatch
from tests.support.foreign import Order, gguf
from tests.support.goclient import PullReport
from tests.support.legacy import A1Client
from tests.support.origin import Fault, Gate, Mode, Origin
from tests.support.proxy import Proxy

NewClient = Callable[..., A2Client]
SetScene = Callable[[Trouble, str], AbstractContextManager["Scene"]]

SITUATIONS: Final = ("cold", "half", "four")
PARTS: Final[dict[str, Any]] = {"min_part": 3 * MB, "max_part": 10 * MB, "patience_s": 20.0}
RAMALAMA: Final = next(client for client in foreign.CLIENTS if client.name == "ramalama")
REPRESENTATIVE: Final = (
    "reset after 40 kB, six times",
    "one connection stalls after 40 kB",
    "503, three times",
    "registry: 500 for the blob's address, once",
    "addresses expire (403) at a quarter",
    "200 in place of every 206",
    "upstream away for 1 s at a quarter",
)
QUICK: Final = (*REPRESENTATIVE, "another ETag from a quarter on", "429 with Retry-After: 1, twice")
"""Troubles that every run meets, cold; the long run meets all of them, in each situation."""
BY_NAME: Final = {trouble.name: trouble for trouble in TROUBLES}
ROWS: Final = [
    pytest.param(
        trouble,
        situation,
        id=f"{trouble.name}, {situation}",
        marks=[] if situation == "cold" and trouble.name in QUICK else [pytest.mark.long],
    )
    for trouble in TROUBLES
    for situation in SITUATIONS
    if trouble.comes_again or situation != "half"
]


class Scene:
    """A blob of the origin, and a trouble with it in a situation."""

    def __init__(self, origin: Origin, proxy: Proxy, trouble: Trouble, situation: str) -> None:
        self.data = gguf(unique(SIZE - 24).read(0, SIZE - 24))
        self._origin = origin
        self._proxy = proxy
        self._trouble = trouble
        self._situation = situation
        self._model = add_model(origin, self.data)
        self._held: Gate | None = None
        self._begun = threading.Event()

    @property
    def name(self) -> str:
        """What a user types to pull it."""
        return self._model.name

    @property
    def layer(self) -> str:
        """The blob's digest."""
        return self._model.layer

    @property
    def ratio(self) -> float:
        """Upstream bytes / blob, so far."""
        return self._origin.counters.cdn_bytes_by_digest[self.layer] / SIZE

    def halve(self, client: A2Client) -> None:
        """Let a pull begin and its client leave; what the cache asks for next is held until somebody else pulls."""
        self._origin.rate_total = RATE
        with ThreadPoolExecutor(1) as pool:
            pull = pool.submit(client.pull, self._model.name)
            self._origin.counters.wait_for(lambda counters: counters.cdn_bytes_by_digest[self.layer] >= SIZE // 8)
            self._held = self._origin.gate(f"/{self.layer[7:]}/data")
            client.abort()
            with pytest.raises(Aborted):
                pull.result()
        # Under another name, so that the registry is asked for the manifest once more.
        self._model = add_model(self._origin, self.data)

    def begun(self, _count: int = 0) -> None:
        """A client has got bytes (its `on_progress`)."""
        self._begun.set()

    def meet[T](self, pulls: Sequence[Callable[[str], T]]) -> list[Future[T]]:
        """Let all pull the model at once, and the trouble come; all have ended when this returns."""
        self._origin.faults += [make(self._model.repository, self.layer) for make in self._trouble.faults]
        self._origin.rate_total = self._trouble.rate
        with ThreadPoolExecutor(len(pulls)) as pool:
            futures = [pool.submit(pull, self.name) for pull in pulls]
            try:
                self._wait(futures)
                if self._trouble.midway:
                    assert self.ratio < 1
                    self._trouble.midway(self._origin, self.layer)
            finally:
                if self._held:
                    self._held.open()
        return futures

    def _wait(self, futures: Sequence[Future[object]]) -> None:
        """Return at half-way: when a client reads what is there, or a quarter has been sent."""
        if self._held:
            for future in futures:
                future.add_done_callback(lambda _: self.begun())
            assert self._begun.wait(20.0)
        elif self._trouble.midway:
            try:
                self._origin.counters.wait_for(lambda _: self.ratio >= 1 / 4, timeout_s=10.0)
            except TimeoutError:
                for future in futures:
                    if future.done():
                        future.result()
                raise

    def settle(self) -> None:
        """The trouble has come, the blob is recorded, and upstream has sent no more than that may cost."""
        self._proxy.wait_for_line(self._model.recorded)
        assert all(fault.hits for fault in self._origin.faults)
        bound = self._trouble.bound_in(self._situation)
        assert self.ratio <= bound, f"expected upstream bytes / blob of {bound:.4f} at most, got {self.ratio:.4f}"


@pytest.fixture
def set_scene(origin: Origin, proxy: Proxy, record_property: Callable[[str, object], None]) -> SetScene:
    """Make a scene for a block; its ratio goes into the report, and the cache's output beside a failure."""

    @contextmanager
    def make(trouble: Trouble, situation: str) -> Iterator[Scene]:
        if trouble.rate or situation == "half":
            # How fast the line was before is not remembered: half-way comes before all has been asked for.
            proxy.restart()
        begin = len(proxy.output)
        scene = Scene(origin, proxy, trouble, situation)
        try:
            yield scene
        finally:
            record_property("fault", [trouble.name, situation, round(scene.ratio, 4)])
            print("\n".join(proxy.output[begin:]))
            for fault in origin.faults:
                fault.gate.open()

    return make


def assert_unnoticed(report: PullReport) -> None:
    """Nothing made the client try anything twice, and it got exactly the ranges it asked for."""
    assert report.retries == report.stalls == 0
    parts = [exchange.status for exchange in report.requests if exchange.range and exchange.status != 307]
    assert parts
    assert set(parts) == {206}


def assert_right(client: A2Client, scene: Scene) -> None:
    """What the client has is the blob."""
    assert client.blob_path(scene.layer).read_bytes() == scene.data


@pytest.mark.parametrize(("trouble", "situation"), ROWS)
def test_ollama(set_scene: SetScene, proxy: Proxy, new_client: NewClient, trouble: Trouble, situation: str) -> None:
    """Ollama of today, as impatient as it once was: alone, after another that has left half-way, four at once."""
    with set_scene(trouble, situation) as scene:
        if situation == "half":
            scene.halve(new_client(proxy))
        clients = [
            new_client(proxy, **PARTS, stall_s=5.0, on_progress=scene.begun)
            for _ in range(4 if situation == "four" else 1)
        ]
        futures = scene.meet([client.pull for client in clients])
        for client, future in zip(clients, futures, strict=True):
            assert_unnoticed(future.result())
            assert_right(client, scene)
        scene.settle()


@pytest.mark.long
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_parts_at_the_registry(set_scene: SetScene, proxy: Proxy, tmp_path: Path, trouble: Trouble) -> None:
    """Ollama before the direct URL: each part asks the registry, and waits 5 s for a byte."""
    with set_scene(trouble, "0.3.0") as scene:
        client = A1Client(proxy.url, proxy.ca_file, tmp_path, version="0.3.0", backoff_unit_s=0.05, **PARTS)
        (future,) = scene.meet([client.pull])
        assert_unnoticed(future.result())
        assert_right(client, scene)
        scene.settle()


@pytest.mark.long
@pytest.mark.parametrize("trouble", [BY_NAME[name] for name in REPRESENTATIVE], ids=lambda trouble: trouble.name)
def test_ramalama(set_scene: SetScene, proxy: Proxy, tmp_path: Path, trouble: Trouble) -> None:
    """A client that others wrote."""
    with set_scene(trouble, "ramalama") as scene:
        (future,) = scene.meet([lambda name: RAMALAMA.fetch(proxy, Order(name, scene.layer, tmp_path))])
        future.result()
        files = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == SIZE)
        assert any(path.read_bytes() == scene.data for path in files)
        scene.settle()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_wrong_byte(set_scene: SetScene, proxy: Proxy, new_client: NewClient, situation: str) -> None:
    """Whoever got the byte may fail at the digest; it is never a hit, and the next pull is right."""
    with set_scene(FLIPPED, situation) as scene:
        if situation == "half":
            scene.halve(new_client(proxy))
        clients = [new_client(proxy, **PARTS, on_progress=scene.begun) for _ in range(4 if situation == "four" else 1)]
        for future in scene.meet([client.pull for client in clients]):
            with suppress(DigestMismatch):
                future.result()
        proxy.wait_for_line("quarantined")
        for client in clients:
            client.pull(scene.name)
            assert_right(client, scene)
        other = new_client(proxy, **PARTS)
        assert_unnoticed(other.pull(scene.name))
        assert_right(other, scene)
        scene.settle()


def test_retry_after_is_waited_for(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """A source that names a time is not asked before."""
    model = add_model(origin, unique(MB))
    origin.faults.append(Fault(Mode.STATUS, digest=model.layer, status=429, headers={"Retry-After": "1"}))
    began = time.monotonic()
    assert_unnoticed(new_client(proxy).pull(model.name))
    assert time.monotonic() - began >= 1
