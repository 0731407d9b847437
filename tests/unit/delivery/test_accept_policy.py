"""accept_policy: strangers, those who say nothing, and those who are too many."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from pullthrough.delivery import accept_policy
from pullthrough.delivery.accept_policy import AcceptPolicy
from pullthrough.net.connection_limits import ConnectionLimits

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    """A door with a page behind it that is answered when `go` is set."""

    def __init__(self, admits: Callable[[str], bool] = lambda _: True, most: int = 100) -> None:
        self.asked = 0
        self._asking: asyncio.Queue[None] = asyncio.Queue()
        self.go = asyncio.Event()
        self.limits = ConnectionLimits(1000, most)
        self.listener = AcceptPolicy(self._answer, admits, self.limits)
        self._lines: list[asyncio.StreamWriter] = []
        self._port = 0

    async def _answer(self, _: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        self._asking.put_nowait(None)
        await self.go.wait()
        return web.Response(text="here")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        runner = web.ServerRunner(self.listener)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._port = runner.addresses[0][1]
        try:
            yield
        finally:
            for writer in self._lines:
                writer.close()
            await runner.cleanup()

    async def connect(self, data: bytes = b"") -> Line:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._lines.append(writer)
        writer.write(data)
        return reader, writer

    async def asks(self) -> None:
        """Until one more has asked."""
        await asyncio.wait_for(self._asking.get(), 20)


async def read(line: Line) -> bytes:
    """What comes until the end."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(line[0].read(), 20)
    return b""


def test_strangers_get_nothing() -> None:
    """A connection of one who is not admitted ends before its request is looked at."""

    async def ask(peer: str) -> tuple[bytes, int]:
        served = Served(lambda address: address == peer)
        served.go.set()
        async with served.running():
            line = await served.connect(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            return await read(line), served.asked

    assert asyncio.run(ask("192.0.2.1")) == (b"", 0)
    answer, asked = asyncio.run(ask("127.0.0.1"))
    assert answer.startswith(b"HTTP/1.1 200") and asked == 1


def test_those_who_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for the head of a first request, however slowly it comes; who has asked may wait."""
    monkeypatch.setattr(accept_policy, "HEAD_S", 0.2)

    async def main() -> None:
        served = Served()
        async with served.running():
            asker = await served.connect(GET)
            silent, slow = await served.connect(), await served.connect(b"GET / HT")

            async def trickle() -> None:
                for byte in GET * 1000:
                    slow[1].write(bytes([byte]))
                    await asyncio.sleep(0.02)

            trickling = asyncio.create_task(trickle())
            assert await read(silent) == await read(slow) == b""
            trickling.cancel()
            assert served.asked == 1
            served.go.set()
            assert (await asker[0].readuntil(b"here")).startswith(b"HTTP/1.1 200")

    asyncio.run(main())


def test_those_who_are_too_many() -> None:
    """The one that has waited longest goes, never one that is being answered; without such a one, the newcomer."""

    async def main() -> None:
        served = Served(most=3)
        async with served.running():
            first = await served.connect(GET)
            await served.asks()
            waiting = [await served.connect(), await served.connect()]
            await served.connect(GET)
            assert await read(waiting[0]) == b""
            await served.asks()
            await served.connect(GET)
            assert await read(waiting[1]) == b""
            await served.asks()
            assert await read(await served.connect(GET)) == b""
            assert served.asked == 3
            served.go.set()
            assert (await first[0].readuntil(b"here")).startswith(b"HTTP/1.1 200")
        assert len(served.limits) == 0

    asyncio.run(main())
