"""Those who look at the status page, and those who hold connections open, cost a pull next to nothing."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

from tests.e2e.conftest import MB, add_model, unique
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy

VIEWERS: Final = 500
LORISES: Final = 100
SIZE: Final = 60 * MB
RATE: Final = MB
MEASURED_S: Final = 10.0
MOST: Final = 0.08
"""Of a core, which is what a pull has at most; 0.04 on an idle machine."""


@contextlib.contextmanager
def crowd(proxy: Proxy) -> Iterator[None]:
    """Viewers of the page's events, and connections whose request never comes to its end."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    fed = 0

    async def view(count: "asyncio.Semaphore") -> None:
        nonlocal fed
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.front_port)
        try:
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readuntil(b"event: events")).startswith(b"HTTP/1.1 200 ")
            count.release()
            while data := await reader.read(65536):
                fed += len(data)
        finally:
            writer.close()

    async def trickle() -> None:
        while True:
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.front_port)
            with contextlib.suppress(ConnectionError):
                try:
                    for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 4000:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(1)
                finally:
                    writer.close()

    async def gather() -> None:
        count = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as group:
            for _ in range(VIEWERS):
                group.create_task(view(count))
            for _ in range(LORISES):
                group.create_task(trickle())
            for _ in range(VIEWERS):
                await count.acquire()
            ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    task = loop.create_task(gather())
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60), "expected all viewers to be served"
        yield
        assert fed > VIEWERS, "expected viewers who are told what changes"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)


def cost(process: psutil.Process) -> float:
    """What the daemon takes of a core."""
    began, before = time.monotonic(), sum(process.cpu_times()[:2])
    time.sleep(MEASURED_S)
    return (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)


@pytest.mark.long
def test_viewers_cost_a_pull_next_to_nothing(origin: Origin, tmp_path: Path) -> None:
    """Five hundred who watch a recording, and a hundred who say nothing, leave the one core to pulls."""
    with Proxy(tmp_path, origin, front=True) as proxy:
        model = add_model(origin, unique(SIZE))
        origin.rate_total = RATE
        client = A2Client(proxy.url, proxy.ca_file, tmp_path / "client")
        pulling = threading.Thread(target=client.pull, args=(model.name,))
        pulling.start()
        proxy.wait_for_line("-> 307")
        process = psutil.Process(proxy.pid)
        alone = cost(process)
        with crowd(proxy):
            watched = cost(process)
        print(f"alone {alone:.3f}, watched {watched:.3f} of a core")
        assert watched - alone < MOST
        origin.rate_total = None
        pulling.join(60)
        assert client.blob_path(model.layer).stat().st_size == SIZE
