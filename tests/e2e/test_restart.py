"""A start and a restart cost clients nothing: who comes too early waits, who is cut goes on as after any reset."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import MB, add_model, unique
from tests.support.a2 import A2Client
from tests.support.origin import REGISTRY_HOST, Origin
from tests.support.proxy import Proxy, free_port, patched

SLOW_START = """
import asyncio
from pathlib import Path
from pullthrough.proxy import frontend
check_hooks = frontend.check_hooks
async def wait(hooks):
    while not Path(GATE).exists():
        await asyncio.sleep(0.01)
    await check_hooks(hooks)
frontend.check_hooks = wait
"""
TWO_AT_ONCE = """
from pullthrough import daemon
daemon.most_connections = lambda _: 2
"""


def test_a_client_that_comes_early(origin: Origin, tmp_path: Path) -> None:
    """The port listens before the cache is open: a client is kept until it is, and then served, not turned away.

    Those who wait count as others do: of more than there may be, the one that has waited longest goes.
    """
    gate, folder = tmp_path / "gate", tmp_path / "proxy"
    folder.mkdir()
    program = patched(folder, SLOW_START.replace("GATE", repr(str(gate))) + TWO_AT_ONCE)
    proxy = Proxy(folder, origin, program=program)
    proxy.port = free_port()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(proxy.start)
        try:
            proxy.wait_for_line("proxy listening at")
            address = ("127.0.0.1", proxy.port)
            with socket.create_connection(address, 20) as one_too_many, socket.create_connection(address, 0.3) as early:
                with socket.create_connection(address):
                    assert one_too_many.recv(1) == b""
                early.sendall(f"CONNECT {REGISTRY_HOST}:443 HTTP/1.1\r\nHost: {REGISTRY_HOST}:443\r\n\r\n".encode())
                with pytest.raises(TimeoutError):
                    early.recv(1)
                gate.touch()
                early.settimeout(20)
                assert early.recv(100).startswith(b"HTTP/1.1 200 ")
        finally:
            gate.touch()
            starting.result()
            proxy.stop()
    assert not [line for line in proxy.output if "refused client" in line]


class Watched(A2Client):
    """An Ollama whose failed requests are seen."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.failures: list[tuple[float, BaseException]] = []

    def _copy(self, *arguments: Any) -> None:
        try:
            super()._copy(*arguments)
        except Exception as error:
            self.failures.append((time.monotonic(), error))
            raise


def wait_for_connections(proxy: Proxy, count: int) -> None:
    """Return when so many clients have connected to a cache that is not open yet."""
    deadline = time.monotonic() + 30
    while True:
        every = psutil.Process(proxy.pid).net_connections("tcp")
        here = [each for each in every if each.status == psutil.CONN_ESTABLISHED and each.laddr[1] == proxy.port]
        if len(here) >= count:
            return
        assert time.monotonic() < deadline, f"expected {count} connections, got {len(here)}"


@pytest.mark.long
def test_a_restart_under_sixteen_clients(origin: Origin, tmp_path: Path) -> None:
    """All pulls end whole; what fails was cut, or found nobody listening; nothing fails once somebody does."""
    gate, folder = tmp_path / "gate", tmp_path / "proxy"
    folder.mkdir()
    gate.touch()
    with Proxy(folder, origin, program=patched(folder, SLOW_START.replace("GATE", repr(str(gate))))) as proxy:
        models = [add_model(origin, unique(24 * MB)) for _ in range(4)]
        clients = [
            Watched(proxy.url, proxy.ca_file, tmp_path / str(number), min_part=3 * MB, max_part=3 * MB)
            for number in range(16)
        ]
        origin.rate_total = 12 * MB
        listening = [0.0]

        def watch() -> None:
            proxy.wait_for_line("proxy listening at", timeout_s=60)
            listening[0] = time.monotonic()
            wait_for_connections(proxy, 16)
            gate.touch()

        with ThreadPoolExecutor(16) as pool:
            pulls = [pool.submit(client.pull, models[number % 4].name) for number, client in enumerate(clients)]
            origin.counters.wait_for(lambda counters: counters.cdn_bytes > 16 * MB)
            proxy.stop()
            gate.unlink()
            proxy.forget_lines()
            watching = threading.Thread(target=watch)
            watching.start()
            proxy.start()
            watching.join()
            results = [pull.result() for pull in pulls]
        origin.rate_total = None
    failures = [failure for client in clients for failure in client.failures]
    late = [error for when, error in failures if when > listening[0]]
    print(f"{len(failures)} requests failed, {sum(result.retries for result in results)} retries, {late} late")
    assert failures, "expected the restart to cut somebody"
    assert late == []
    assert not [line for line in proxy.output if "refused client" in line and "the cache is ending" not in line]
    # What had come before was kept.
    assert origin.counters.cdn_bytes < 4 * 24 * MB * 1.25
