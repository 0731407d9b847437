"""aiohttp_body: bytes over a real connection: with and without sendfile, bad files, clients that do not read."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from pullthrough.core.errors import UpstreamUnreachable
from pullthrough.delivery import outlets
from pullthrough.delivery.accept_policy import AcceptPolicy
from pullthrough.delivery.aiohttp_body import send
from pullthrough.delivery.byte_sender import SPAN, Sending
from pullthrough.delivery.byte_threads import ByteThreads
from pullthrough.net.connection_limits import ConnectionLimits
from pullthrough.recording.reader import FileSpan, Memory, Pending, Reader
from pullthrough.runtime.shared_file import SharedFile

SIZE = 3 * SPAN + 12345
DATA = os.urandom(SIZE)


class ScriptedReader:
    """Hands out what it was told to, exceptions too; `size` bytes in all."""

    start = 0
    is_complete = False

    def __init__(self, size: int, *pieces: FileSpan | Memory | Pending | Exception) -> None:
        self.stop = size
        self._pieces = list(pieces)
        self.unreadable = 0

    def on_unreadable(self) -> None:
        self.unreadable += 1

    async def next(self, limit: int, wait_s: float) -> FileSpan | Memory | Pending:
        await asyncio.sleep(0)
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SharedFile]:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    file = SharedFile(os.open(path, os.O_RDONLY), SIZE).acquire()
    yield file
    file.release()


@asynccontextmanager
async def serving(make: Callable[[], Any], length: int = SIZE) -> AsyncIterator[tuple[int, "asyncio.Queue[Sending]"]]:
    """(port, how each body fared) of a server that sends what `make()` reads."""
    outcomes: asyncio.Queue[Sending] = asyncio.Queue()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = length
        await response.prepare(request)
        sending = Sending()
        await send(request, response, cast(Reader, make()), sending, threads)
        if sending.problem:
            response.force_close()
        await outcomes.put(sending)
        return response

    threads = ByteThreads(16)
    threads.open()
    runner = web.ServerRunner(
        AcceptPolicy(handle, lambda _: True, ConnectionLimits(100), access_log=None), shutdown_timeout=0.1
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1], outcomes
    finally:
        await runner.cleanup()
        await asyncio.to_thread(threads.close, 0.0)


async def fetch(port: int) -> bytes:
    """The body of one response, whole or short."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    body = await reader.read()
    writer.close()
    return body


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each call of os.sendfile is going to have sent."""
    if not hasattr(os, "sendfile"):
        pytest.skip("no sendfile on this system")
    calls: list[int] = []
    real = os.sendfile

    def sendfile(*arguments: Any) -> int:
        count = real(*arguments)
        calls.append(count)
        return count

    monkeypatch.setattr(os, "sendfile", sendfile)
    return calls


def test_files_go_by_sendfile(monkeypatch: pytest.MonkeyPatch, file: SharedFile) -> None:
    """Several clients at once share one descriptor, from different offsets, and each gets its own bytes."""
    calls = counted(monkeypatch)

    async def test() -> None:
        starts = iter((0, 1, SIZE // 2, 7, 0, 99))
        async with serving(
            lambda: Reader(start := next(starts), start + SIZE // 3, file=file.acquire()), SIZE // 3
        ) as (
            port,
            outcomes,
        ):
            bodies = await asyncio.gather(*(fetch(port) for _ in range(6)))
            assert {outcomes.get_nowait().problem for _ in range(6)} == {""}
        expected = sorted(DATA[start : start + SIZE // 3] for start in (0, 1, SIZE // 2, 7, 0, 99))
        assert sorted(bodies) == expected

    run(test)
    assert sum(calls) == 6 * (SIZE // 3)


@pytest.mark.parametrize("lack", ["no call", "a file system that cannot"])
def test_without_sendfile(monkeypatch: pytest.MonkeyPatch, file: SharedFile, lack: str) -> None:
    """The same bytes where the system has no such call, and where it fails."""
    if lack == "no call":
        monkeypatch.delattr(os, "sendfile", raising=False)
    else:

        def sendfile(*_: Any) -> int:
            raise OSError(errno.EINVAL, "not here")

        monkeypatch.setattr(os, "sendfile", sendfile, raising=False)

    async def test() -> None:
        async with serving(lambda: Reader(0, SIZE, file=file.acquire())) as (port, outcomes):
            assert await fetch(port) == DATA
            assert await outcomes.get() == Sending(sent=SIZE, problem="")

    run(test)


def test_memory_and_waiting(file: SharedFile) -> None:
    """What is in no file is written in its place, and waiting for bytes ends nothing."""

    async def test() -> None:
        pieces = [Pending(), Memory(b"abc"), Pending(), FileSpan(file.descriptor, 3, 10), Memory(DATA[10:20])]
        async with serving(lambda: ScriptedReader(20, *pieces), 20) as (port, outcomes):
            assert await fetch(port) == b"abc" + DATA[3:20]
            assert (await outcomes.get()).sent == 20

    run(test)


def test_a_failure_ends_short(file: SharedFile) -> None:
    """What was right is sent; then the connection ends, without another byte."""

    async def test() -> None:
        pieces = [FileSpan(file.descriptor, 0, 10), UpstreamUnreachable("gone")]
        async with serving(lambda: ScriptedReader(SIZE, *pieces)) as (port, outcomes):
            assert await fetch(port) == DATA[:10]
            assert await outcomes.get() == Sending(10, "gone")

    run(test)


def test_a_file_that_is_too_short_is_given_up(file: SharedFile) -> None:
    """Somebody cut the file: the body ends short, and the store is told."""
    reader = ScriptedReader(SIZE, FileSpan(file.descriptor, 0, 10), FileSpan(file.descriptor, SIZE - 5, SIZE + 5))

    async def test() -> None:
        async with serving(lambda: reader) as (port, outcomes):
            assert (await fetch(port)).startswith(DATA[:10])
            assert "the file is shorter" in (await outcomes.get()).problem

    run(test)
    assert reader.unreadable == 1


@pytest.mark.parametrize("way", ["sendfile", "write"])
def test_a_client_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    """After the time limit, and nothing is held for it any more."""
    monkeypatch.setattr(outlets, "CLIENT_STALL_S", 0.2)
    large = tmp_path / "large"
    with large.open("wb") as hole:
        hole.truncate(1 << 30)
    shared = SharedFile(os.open(large, os.O_RDONLY), 1 << 30).acquire()
    if way == "write":
        monkeypatch.delattr(os, "sendfile", raising=False)

    async def test() -> None:
        async with serving(lambda: Reader(0, 1 << 30, file=shared), 1 << 30) as (port, outcomes):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            sending = await outcomes.get()
            assert sending.problem == "client took no byte for 0 s"
            assert sending.sent < 1 << 30
            writer.transport.abort()

    run(test)
    shared.release()


def test_a_client_that_leaves_is_noticed() -> None:
    """Also while there is nothing to send to it."""

    async def test() -> None:
        async with serving(lambda: ScriptedReader(SIZE, Memory(b"abc"), *[Pending()] * 1_000_000)) as (port, outcomes):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"abc")
            writer.close()
            assert await outcomes.get() == Sending(3, "client disconnected")

    run(test)
