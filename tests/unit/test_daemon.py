"""daemon: parts are opened in one order and closed in the reverse one, whatever fails."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from pullthrough.admin.server import ControlServer
from pullthrough.config.options import parse_settings
from pullthrough.core.errors import CacheError, SettingsError
from pullthrough.daemon import Daemon
from pullthrough.delivery.delivery import Delivery
from pullthrough.monitoring.health import Health
from pullthrough.monitoring.traffic import Traffic
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.prefetch import Prefetcher
from pullthrough.registry.redirects import Redirects
from pullthrough.registry.refresh import Refresher
from pullthrough.runtime.executors import Threads
from pullthrough.runtime.loop_lag import LoopLag
from pullthrough.runtime.temp_folder import TemporaryFolder
from pullthrough.server.blob_server import BlobServer
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream


class FakeProxy:
    """A proxy without mitmproxy."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def expect(self, limits: Any) -> None:
        pass

    async def open(self, *_: Any) -> None:
        return

    def close(self) -> None:
        return

    def admits(self, peer: str) -> bool:
        return peer == "127.0.0.1"

    def refused(self) -> str:
        return ""

    def present(self, folder: str, certificates: list[str]) -> None:
        assert all(Path(text.partition("=")[2]).parent == Path(folder) for text in certificates)
        self.shown = certificates

    def ports(self) -> Collection[int]:
        return ()

    def address(self) -> tuple[str, int]:
        return "", 8080


ENDS: list[tuple[type, str]] = [
    (Health, "close"),
    (ControlServer, "close"),
    (FakeProxy, "close"),
    (BlobServer, "close"),
    (Delivery, "close"),
    (Refresher, "close"),
    (Redirects, "close"),
    (Prefetcher, "close"),
    (Recorder, "close"),
    (LoopLag, "close"),
    (Threads, "close"),
    (Upstream, "close"),
    (Traffic, "count"),
    (Store, "close"),
    (TemporaryFolder, "cleanup"),
]
"""How everything ends: first who brings work, last what the work is done with."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type, str]]:
    """What has ended, in order; each end happens, too."""
    found: list[tuple[type, str]] = []

    def noted(owner: type, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def end(self: Any) -> Any:
            found.append((owner, name))
            return original(self)

        return end

    for owner, name in ENDS:
        monkeypatch.setattr(owner, name, noted(owner, name))
    return found


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number: int = sock.getsockname()[1]
        return number


@pytest.fixture
def make(tmp_path: Path, port: int) -> Callable[[], Daemon]:
    """Makes the daemon of one store and one port."""
    texts = {"listen": f"127.0.0.1:{port}", "front": f"{port}=registry.ollama.ai", "advertise": "127.0.0.1"}
    settings = parse_settings(texts, dir=tmp_path / "store", certs=tmp_path / "certs")
    return lambda: Daemon(settings, FakeProxy(), ParentProxies(), trusted_ca=None, options=[])


def test_a_disk_without_room_is_told(tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture) -> None:
    """At the start, and not first by a pull that is not kept."""
    texts = {"listen": f"127.0.0.1:{port}", "advertise": "127.0.0.1", "min_free": "100PB"}
    settings = parse_settings(texts, dir=tmp_path / "store", certs=tmp_path / "certs")

    async def main() -> None:
        daemon = Daemon(settings, FakeProxy(), ParentProxies(), trusted_ca=None, options=[])
        await daemon.start()
        await daemon.stop()

    run(main)
    assert "nothing will be recorded: min_free keeps 100000 TB" in caplog.text


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(limited())


def is_free(tmp_path: Path, port: int) -> bool:
    """Whether the store, the port and the event loop's threads can be had by another daemon."""
    Store.open(tmp_path / "store").close()
    with socket.create_server(("127.0.0.1", port)):
        return True


def test_what_ends_when(make: Callable[[], Daemon], ended: list[tuple[type, str]], tmp_path: Path, port: int) -> None:
    """Who brings work ends first, what the work is done with last; to stop again does nothing."""

    async def work() -> None:
        daemon = make()
        await daemon.start()
        assert ended == []
        await daemon.stop()
        assert ended == ENDS
        await daemon.stop()
        assert ended == ENDS

    run(work)
    assert is_free(tmp_path, port)


def test_without_a_start(make: Callable[[], Daemon], ended: list[tuple[type, str]], tmp_path: Path, port: int) -> None:
    """What was opened at once is closed."""

    async def work() -> None:
        await make().stop()

    run(work)
    assert ended == ENDS[-2:]
    assert is_free(tmp_path, port)


@pytest.mark.parametrize("part", [Upstream, Refresher, Delivery, FakeProxy, BlobServer, ControlServer])
def test_a_part_that_fails_to_open(
    make: Callable[[], Daemon],
    ended: list[tuple[type, str]],
    part: type,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    port: int,
) -> None:
    """It and all that was opened before it end, in order; the error is told, and all can be had again."""

    async def fail(*_: Any) -> None:
        raise CacheError("no")

    def fail_at_once(*_: Any) -> None:
        raise CacheError("no")

    async def work() -> None:
        daemon = make()
        monkeypatch.setattr(part, "open", fail_at_once if part is Refresher else fail)
        with pytest.raises(CacheError, match=r"^no$"):
            await daemon.start()
        assert ended == expected
        await daemon.stop()
        assert ended == expected
        assert len(asyncio.all_tasks()) == 1

    # The blob server, whose ports are open from the beginning, opens once the proxy has.
    expected = ENDS[ENDS.index((FakeProxy if part is BlobServer else part, "close")) :]
    run(work)
    assert is_free(tmp_path, port)


def test_an_end_that_fails_holds_up_no_other(
    make: Callable[[], Daemon],
    ended: list[tuple[type, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    port: int,
) -> None:
    """The store is closed though the disk fails a recording."""

    async def fail(_: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    async def work() -> None:
        daemon = make()
        monkeypatch.setattr(Recorder, "close", fail)
        await daemon.start()
        with pytest.raises(OSError, match="I/O error"):
            await daemon.stop()

    run(work)
    assert ended[-2:] == ENDS[-2:]
    assert is_free(tmp_path, port)


def test_a_port_that_is_taken(
    make: Callable[[], Daemon], ended: list[tuple[type, str]], tmp_path: Path, port: int
) -> None:
    """Nothing is left open of a daemon that was never made."""

    async def work() -> None:
        with socket.create_server(("127.0.0.1", port)), pytest.raises(SettingsError, match="expected a free address"):
            make()

    run(work)
    assert ended == ENDS[-2:]
    assert is_free(tmp_path, port)
