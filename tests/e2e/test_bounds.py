"""What clients may take at the proxy's port: bytes of a head, time, connections; and what an error of ours becomes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from pullthrough.runtime import platform
from tests.e2e.conftest import MB, REGISTRY, add_model, canonical, get, to_cdn, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.http1 import client_context
from tests.support.origin import R2_HOST, Origin
from tests.support.proxy import PROGRAM, Proxy, patched

STOPPED_S = 20.0
"""Longer than a connection may be silent, a control request may take, and a registry's answer is waited for."""
CONNECT = f"CONNECT {REGISTRY}:443 HTTP/1.1\r\nHost: {REGISTRY}:443\r\n\r\n".encode()
FLOOD = b"X" * 65536
RECORD = b"\x16\x03\x01\x40\x00"
"""The head of a TLS record of 16 KiB, of a handshake."""
HIT = """
import sys, time
from pathlib import Path
from tests.support.http1 import connect
proxy, cafile, host, address = sys.argv[1:]
began = time.monotonic()
with connect(proxy, host, 443, Path(cafile)) as connection:
    response = connection.request("GET", address)
    buffer = bytearray(1 << 20)
    while response.readinto(buffer):
        pass
print(time.monotonic() - began)
"""
SHORT = "from pullthrough.proxy import client_limits\nclient_limits.HEAD_S = 0.5\nclient_limits.IDLE_S = 2.0"


def dial(proxy: Proxy, source: str = "127.0.0.1") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=20, source_address=(source, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def tunnelled(proxy: Proxy) -> socket.socket:
    """Behind a CONNECT to the registry."""
    sock = dial(proxy)
    sock.sendall(CONNECT)
    assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    return sock


def encrypted(proxy: Proxy) -> socket.socket:
    """With TLS to the registry."""
    return client_context(proxy.ca_file).wrap_socket(tunnelled(proxy), server_hostname=REGISTRY)


def asked(proxy: Proxy) -> socket.socket:
    """With TLS to the registry, which has answered something."""
    sock = encrypted(proxy)
    sock.sendall(f"HEAD /v2/library/absent/manifests/latest HTTP/1.1\r\nHost: {REGISTRY}\r\n\r\n".encode())
    assert sock.recv(4096).startswith(b"HTTP/1.1 404")
    return sock


def is_ended(sock: socket.socket) -> bool:
    """Whether the other end says nothing more, and ends."""
    try:
        return sock.recv(4096) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def flood(sock: socket.socket, data: bytes = FLOOD) -> bool:
    """Whether the connection ends, or takes nothing for two seconds, before it has taken more than buffers hold."""
    sent = 0
    sock.settimeout(2)
    with contextlib.suppress(OSError):
        while sent < 128 * MB:
            sock.sendall(data)
            sent += len(data)
    sock.settimeout(20)
    return sent < 64 * MB


ENDLESS: dict[str, tuple[Callable[[Proxy], socket.socket], bytes, bytes]] = {
    "request line": (dial, b"GET /", FLOOD),
    "field": (dial, b"GET / HTTP/1.1\r\nX: ", FLOOD),
    "CONNECT": (dial, b"CONNECT x:443 HTTP/1.1\r\nX: ", FLOOD),
    "fields": (dial, b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 1000),
    "ClientHello": (tunnelled, RECORD + b"\x01\xff\xff\xff" + bytes(16380), RECORD + bytes(16384)),
    "in TLS": (encrypted, b"GET / HTTP/1.1\r\nX: ", FLOOD),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_head(proxy: Proxy, kind: str) -> None:
    """Nobody is told more than that it is over, nor costs more than a head."""
    before = proxy.rss_mib()
    begin, head, more = ENDLESS[kind]
    with closing(begin(proxy)) as sock:
        sock.sendall(head)
        assert flood(sock, more)
        assert is_ended(sock)
    proxy.wait_for_line("bytes of a head")
    assert proxy.rss_mib() - before < 20


def test_a_flood_behind_a_request(origin: Origin, proxy: Proxy) -> None:
    """What is sent while an answer is under way waits where it is, and the answer goes on."""
    model = add_model(origin, unique(4 * MB))
    address = canonical(proxy, model)
    before = proxy.rss_mib()
    origin.rate_total = MB // 2
    with closing(dial(proxy)) as sock:
        sock.sendall(f"GET http://{R2_HOST}{address} HTTP/1.1\r\nHost: {R2_HOST}\r\n\r\n".encode())
        assert flood(sock)
        got = 0
        while got < MB and (data := sock.recv(1 << 20)):
            got += len(data)
        assert got >= MB, proxy.dump()
    assert proxy.rss_mib() - before < 20


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory, origin_of_module: Origin) -> Iterator[Proxy]:
    """A cache with a twentieth of its patience."""
    folder = tmp_path_factory.mktemp("hasty")
    with Proxy(folder, origin_of_module, program=patched(folder, SHORT)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def origin_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    with Origin(tmp_path_factory.mktemp("origin")) as origin:
        yield origin


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        pytest.param(dial, b"", id="silent"),
        pytest.param(dial, b"GET / HTTP/1.1\r\nHost: x\r\n", id="half a head"),
        pytest.param(tunnelled, b"", id="behind CONNECT"),
        pytest.param(tunnelled, b"\x16\x03\x01\x02", id="half a ClientHello"),
        pytest.param(asked, b"GET /v2/", id="half a head after another in TLS"),
    ],
)
def test_a_head_takes_its_time(hasty: Proxy, begin: Callable[[Proxy], socket.socket], said: bytes) -> None:
    """A connection that does not come to its point ends, however slowly it goes on."""
    hasty.forget_lines()
    began = time.monotonic()
    with closing(begin(hasty)) as sock:
        sock.sendall(said)
        assert is_ended(sock)
    assert 0.4 < time.monotonic() - began < 5
    hasty.wait_for_line("no full request within")


def test_a_trickle(hasty: Proxy) -> None:
    """A byte now and then buys no time."""
    with closing(dial(hasty)) as sock:
        began = time.monotonic()
        sock.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 10:
                sock.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(1):
                        break
        assert time.monotonic() - began < 3


def test_waiting_is_free_between_requests(hasty: Proxy) -> None:
    """A connection that has asked may wait longer than a head may take, as may one whose TLS is up."""
    with closing(encrypted(hasty)) as quiet, closing(asked(hasty)) as waiting:
        began = time.monotonic()
        for sock in (quiet, waiting):
            sock.settimeout(0.75)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(20)
        assert is_ended(quiet)
        assert is_ended(waiting)
        assert 1.5 < time.monotonic() - began < 5


def test_places_are_bounded(start_proxy: Callable[..., Proxy], origin: Origin, tmp_path: Path) -> None:
    """Where all places are taken by those who say nothing, the newcomer gets one of them."""
    few = "from pullthrough.net import connection_limits\nconnection_limits.most_connections = lambda _: 24"
    proxy = start_proxy(program=patched(tmp_path, few))
    model = add_model(origin, unique(4 * MB))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(closing(dial(proxy, "127.0.0.2"))) for _ in range(24)]
        report = A2Client(proxy.url, proxy.ca_file, tmp_path / "client", min_part=MB, max_part=MB).pull(model.name)
        assert report.retries == 0
        assert is_ended(silent[0])


def test_few_descriptors(start_proxy: Callable[..., Proxy], origin: Origin, tmp_path: Path) -> None:
    """With a limit of 256 descriptors and 1,000 silent connections a pull goes on, cold and warm."""
    limited = ("sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *PROGRAM)
    proxy = start_proxy(program=limited, front=True)
    model = add_model(origin, unique(16 * MB))
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            port = proxy.port if number % 2 else proxy.front_port
            sock = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=("127.0.0.2", 0))
            stack.enter_context(closing(sock))
        for state in ("cold", "warm"):
            client = A2Client(proxy.url, proxy.ca_file, tmp_path / state, min_part=MB, max_part=2 * MB)
            report = client.pull(model.name)
            assert report.retries == 0, report
    # A burst may leave none for a second: to accept one more, or to look into the store, which is tried again.
    expected = ("OSError: ", "it is tried again")
    told = [
        line for line in proxy.output if "Too many open files" in line and not any(map(line.__contains__, expected))
    ]
    assert not told, told


@pytest.mark.long
def test_a_process_that_stood_still(start_proxy: Callable[..., Proxy], origin: Origin, tmp_path: Path) -> None:
    """Stopped for longer than any silence may last, with a pull under way.

    Nobody was silent meanwhile: nothing is fetched twice, no registry counts as down, and the client keeps what it has.
    """
    proxy = start_proxy()
    blob = unique(24 * MB)
    model = add_model(origin, blob)
    origin.rate_total = 3 * MB
    client = A2Client(proxy.url, proxy.ca_file, tmp_path / "client", min_part=4 * MB, max_part=8 * MB, stall_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(client.pull, model.name)
        while origin.counters.cdn_bytes_by_digest[model.layer] < 6 * MB:
            assert not pulling.done(), pulling.result()
            time.sleep(0.05)
        os.kill(proxy.pid, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        os.kill(proxy.pid, signal.SIGCONT)
        report = pulling.result(60)
    assert report.retries == 0, report
    assert proxy.wait_for_line("the event loop was held up for")
    recorded = proxy.wait_for_line(model.recorded)
    assert "fetched 1.000 x" in recorded, recorded
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= 1.02 * blob.size
    told = [line for line in proxy.output if "without a byte" in line or "upstream failed" in line]
    assert not told, told


@pytest.mark.parametrize("hours", [pytest.param(26, marks=pytest.mark.long), -26])
def test_the_clock_is_set(start_proxy: Callable[..., Proxy], origin: Origin, tmp_path: Path, hours: int) -> None:
    """An address that was handed out is good for as long as it said, whatever becomes of the machine's clock."""
    offset = tmp_path / "offset"
    offset.write_text("0")
    patch = f"import time\nreal = time.time\ntime.time = lambda: real() + float(open({str(offset)!r}).read())"
    proxy = start_proxy(program=patched(tmp_path, patch))
    model = add_model(origin, unique(MB))
    address = canonical(proxy, model)
    for seconds in (0, hours * 3600):
        offset.write_text(str(seconds))
        with to_cdn(proxy) as connection:
            assert get(connection, address)[0] == 200, seconds
    with to_registry(proxy) as connection:
        assert get(connection, model.manifest_target)[0] == 200
        origin.stop()
        assert get(connection, model.manifest_target)[0] == 200
    origin.start()


BREAKABLE: Final = {
    # First: those below import it.
    "response_of": "pullthrough.proxy.messages",
    "RequestHooks._check_way": "pullthrough.proxy.request_hooks",
    "RequestHooks._may_answer": "pullthrough.proxy.request_hooks",
    "Registry.answer": "pullthrough.registry.service",
    "ConnectionHooks.pass_on": "pullthrough.proxy.connection_hooks",
}
BREAKING: Final = """
from importlib import import_module
from operator import attrgetter
from pathlib import Path

def breakable(what, module):
    owner, _, name = what.rpartition(".")
    place = attrgetter(owner)(import_module(module)) if owner else import_module(module)
    real = getattr(place, name)

    def call(*arguments, **options):
        # The answer that tells of a failure is never broken.
        if Path(BROKEN).read_text() == what and 502 not in arguments:
            raise RuntimeError(f"broken {what}")
        return real(*arguments, **options)

    setattr(place, name, call)

for what, module in NAMES.items():
    breakable(what, module)
"""
"""Each of these fails while a file names it."""


@pytest.mark.parametrize("offline", [False, True])
def test_an_error_of_ours(start_proxy: Callable[..., Proxy], origin: Origin, tmp_path: Path, offline: bool) -> None:
    """An exception in a hook is an answer of ours: nothing is dialled past `upstream`, `offline` and the policy."""
    broken = tmp_path / "broken"
    broken.write_text("")
    patch = BREAKING.replace("BROKEN", repr(str(broken))).replace("NAMES", repr(BREAKABLE))
    proxy = start_proxy(program=patched(tmp_path, patch), ollama_cache_offline=offline)
    model = add_model(origin, unique(100))
    for what in ["Registry.answer"] if offline else BREAKABLE:
        broken.write_text(what)
        # What is broken is met by one of these at least.
        statuses = []
        for method, target in (("GET", model.manifest_target), ("GET", "/v2/"), ("DELETE", model.manifest_target)):
            with to_registry(proxy) as connection:
                response = connection.request(method, target)
                statuses.append(response.status)
                response.read()
        assert 502 in statuses, (what, statuses)
        proxy.wait_for_line(f"RuntimeError: broken {what}")
    assert not [line for line in proxy.output if "nothing was passed on" in line or "refused connection" in line]


BY_TURNS = """
import asyncio
from mitmproxy.proxy import events
from mitmproxy.proxy.server import ConnectionHandler
from pullthrough.proxy.client_limits import ClientLimit
real, read = ConnectionHandler.server_event, ClientLimit.read

async def server_event(self, event):
    if isinstance(event, events.DataReceived):
        await asyncio.sleep(0.001)
    await real(self, event)

ConnectionHandler.server_event = server_event
ClientLimit.read = lambda self, size: read(self, 1000)
"""
"""What a client has sent comes piece by piece, and each waits for its turn, as if others of its events came first."""


def test_a_refused_upload(start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """Its connection ends although the body waits for its turn when that is decided."""
    proxy = start_proxy(program=patched(tmp_path, BY_TURNS), ollama_cache_offline=True)
    head = f"PATCH /v2/library/m/blobs/uploads/1 HTTP/1.1\r\nHost: {REGISTRY}\r\nContent-Length: 40000\r\n\r\n"
    with encrypted(proxy) as sock:
        sock.sendall(head.encode() + bytes(40_000))
        assert is_ended(sock)
    proxy.wait_for_line("offline: PATCH")


SILENT, STALLED, ENDLESS_HEADS = 5000, 300, 100


@pytest.mark.long
def test_a_crowd(start_proxy: Callable[..., Proxy], origin: Origin, tmp_path: Path) -> None:
    """Hits go on at half their speed or better, and the memory comes back, whoever else is at the door."""
    platform.allow_descriptors(4 * SILENT)
    proxy = start_proxy()
    blob = unique(256 * MB)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    with to_cdn(proxy) as connection:
        get(connection, address)
    proxy.wait_for_line(model.recorded)

    def hit_s() -> float:
        # In a process of its own: this one's threads share an interpreter with those that crowd.
        program = [sys.executable, "-c", HIT, proxy.url, str(proxy.ca_file), R2_HOST, address]
        return float(subprocess.run(program, check=True, capture_output=True, text=True).stdout)

    quiet_s = min(hit_s() for _ in range(3))
    before = proxy.rss_mib()
    stop = threading.Event()

    def send_heads(number: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), closing(dial(proxy, f"127.0.3.{number % 200 + 1}")) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nX: ")
                while not stop.is_set():
                    sock.sendall(b"X" * 1000)
                    stop.wait(0.1)

    with contextlib.ExitStack() as stack:
        for number in range(SILENT):
            stack.enter_context(closing(dial(proxy, f"127.0.1.{number % 200 + 1}")))
        for number in range(STALLED):
            sock = stack.enter_context(closing(dial(proxy, f"127.0.2.{number % 200 + 1}")))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(f"GET http://{R2_HOST}{address} HTTP/1.1\r\nHost: {R2_HOST}\r\n\r\n".encode())
        pool = stack.enter_context(ThreadPoolExecutor(ENDLESS_HEADS))
        heads = [pool.submit(send_heads, number) for number in range(ENDLESS_HEADS)]
        crowded_s = min(hit_s() for _ in range(3))
        peak = proxy.rss_mib()
        stop.set()
        for head in heads:
            head.result()
    print(f"hit: {quiet_s:.2f} s alone, {crowded_s:.2f} s in the crowd; RSS {before:.0f} -> {peak:.0f} MiB", end="")
    # Alone a hit has both cores of a small machine; here the crowd's own program wants one of them.
    assert crowded_s < 8 * quiet_s, (quiet_s, crowded_s)
    deadline = time.monotonic() + 30
    # CPython gives back an arena of 1 MiB when all of it is free: one long-lived object keeps the rest of it.
    bound = before + (peak - before) / 3
    while (after := proxy.rss_mib()) > bound and time.monotonic() < deadline:
        time.sleep(0.5)
    print(f" -> {after:.0f} MiB")
    assert after < bound, (before, peak, after)
