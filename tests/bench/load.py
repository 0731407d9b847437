"""The load generator: requests by plain sockets, from processes of their own, bodies read into one buffer and dropped.

**Invariant**: nothing is hashed, kept or written, and a body counts only if it came whole with the status and length
announced; anything else is an error. A request that is due at a time is timed from then, so that a slow answer does not
hide those that wait behind it. Knows nothing of what answers.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.parse import urljoin, urlsplit

PROCESSES: Final = 2
_BUFFER: Final = 256 * 1024
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Route:
    """How the hosts of URLs are reached."""

    ca_file: str = ""
    proxy: tuple[str, int] | None = None
    """Of https URLs, by CONNECT."""
    resolve: Mapping[tuple[str, int], tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    url: str
    method: str = "GET"
    interval: tuple[int, int] | None = None
    """Half-open."""
    follows: bool = False
    """Whether a redirect is followed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came; the body is gone."""

    status: int
    headers: Mapping[str, str]
    size: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What was done between two readings of the monotonic clock."""

    began: float
    ended: float
    bytes: int
    requests: int

    @property
    def seconds(self) -> float:
        """From the first request to the last byte."""
        return self.ended - self.began

    @property
    def mb_per_s(self) -> float:
        """10^6 bytes a second."""
        return self.bytes / self.seconds / 1e6

    @classmethod
    def of(cls, tallies: Sequence[Self]) -> Self:
        """Several that ran side by side."""
        return cls(
            min(tally.began for tally in tallies),
            max(tally.ended for tally in tallies),
            sum(tally.bytes for tally in tallies),
            sum(tally.requests for tally in tallies),
        )


class Load:
    """The processes."""

    def __init__(self) -> None:
        # One more than share a load, for the tiny requests beside it. Spawned: the parent has threads.
        self._pool = ProcessPoolExecutor(PROCESSES + 1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        for started in [self._pool.submit(time.sleep, 0.05) for _ in range(PROCESSES + 1)]:
            started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def fetch(self, route: Route, lists: Sequence[Sequence[Ask]], *, seconds: float = 0.0) -> Tally:
        """A thread for each list, its requests one after the other; over and over for so many seconds, if any."""
        return Tally.of([share.result() for share in self._start(route, lists, seconds, PROCESSES)])

    def pace(self, route: Route, ask: Ask, *, connections: int, rate: float, seconds: float) -> list[float]:
        """Latencies in seconds, sorted, of requests offered at `rate` a second over open connections in turn."""
        return self._pool.submit(_pace, route, ask, connections, rate, seconds).result()

    def beside(self, route: Route, heavy: Sequence[Ask], ask: Ask, *, rate: float, seconds: float) -> list[float]:
        """As `pace` over one connection, while each of `heavy` is fetched all the time."""
        shares = self._start(route, [[one] for one in heavy], seconds + 0.5, PROCESSES)
        time.sleep(0.3)  # the streams have begun
        latencies = self.pace(route, ask, connections=1, rate=rate, seconds=seconds)
        for share in shares:
            share.result()
        return latencies

    def storm(self, route: Route, ask: Ask, connections: int) -> list[float]:
        """Seconds, sorted, from each connection's beginning to its answer, when so many are made at once."""
        numbers = [connections // PROCESSES] * PROCESSES
        shares = [self._pool.submit(_storm, route, ask, number) for number in numbers]
        return sorted(seconds for share in shares for seconds in share.result())

    def _start(
        self, route: Route, lists: Sequence[Sequence[Ask]], seconds: float, processes: int
    ) -> "list[Future[Tally]]":
        shares = [lists[number::processes] for number in range(min(processes, len(lists)))]
        return [self._pool.submit(_fetch, route, share, seconds) for share in shares]


def once(route: Route, ask: Ask) -> Reply:
    """One request from this process."""
    return _Client(route).ask(ask)


class _Connection:
    def __init__(self, route: Route, scheme: str, host: str, port: int) -> None:
        address = (route.proxy if scheme == "https" else None) or route.resolve.get((host, port), (host, port))
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._sock = socket.create_connection(address, _TIMEOUT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if scheme == "https":
            if route.proxy:
                self._sock.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
                if (status := self._head()[0]) != 200:
                    raise RuntimeError(f"expected 200 to CONNECT, got {status}")
            self._sock = _context(route.ca_file).wrap_socket(self._sock, server_hostname=host)

    def exchange(self, request: bytes, *, has_body: bool, until: float) -> Reply:
        self._sock.sendall(request)
        status, headers, size = self._head()
        wanted = int(headers["content-length"]) if has_body and status not in (204, 304) else 0
        while size < wanted:
            count = self._sock.recv_into(self._view)
            if not count:
                raise RuntimeError(f"expected {wanted} bytes of body, got {size}")
            size += count
            if until and time.monotonic() > until:
                break
        return Reply(status, headers, size)

    def _head(self) -> tuple[int, dict[str, str], int]:
        """Status, fields and how many bytes of the body came with them."""
        filled = 0
        while (end := self._buffer.find(b"\r\n\r\n", 0, filled)) < 0:
            count = self._sock.recv_into(self._view[filled:])
            if not count:
                raise RuntimeError(f"expected a response head, got {filled} bytes")
            filled += count
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}, filled - end - 4


class _Client:
    """Keeps a connection to each origin."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._connections: dict[tuple[str, str, int], _Connection] = {}

    def connection(self, url: str) -> _Connection:
        split = urlsplit(url)
        key = split.scheme, split.hostname or "", split.port or (443 if split.scheme == "https" else 80)
        if key not in self._connections:
            self._connections[key] = _Connection(self._route, *key)
        return self._connections[key]

    def ask(self, ask: Ask, until: float = 0.0) -> Reply:
        split = urlsplit(ask.url)
        target = split.path + (f"?{split.query}" if split.query else "")
        lines = [f"{ask.method} {target} HTTP/1.1", f"Host: {split.netloc}", "User-Agent: bench", "Accept: */*"]
        if ask.interval:
            lines.append(f"Range: bytes={ask.interval[0]}-{ask.interval[1] - 1}")
        request = ("\r\n".join(lines) + "\r\n\r\n").encode()
        reply = self.connection(ask.url).exchange(request, has_body=ask.method != "HEAD", until=until)
        if reply.status == 307 and ask.follows:
            return self.ask(Ask(urljoin(ask.url, reply.headers["location"]), ask.method, ask.interval, True), until)
        wanted = 206 if ask.interval else 200
        if reply.status != wanted and not (reply.status == 307 and not ask.interval):
            raise RuntimeError(f"expected {wanted} to {ask.method} {split.path}, got {reply.status}")
        return reply


@functools.lru_cache
def _context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def _fetch(route: Route, lists: Sequence[Sequence[Ask]], seconds: float) -> Tally:
    ready = threading.Barrier(len(lists))

    def run(asks: Sequence[Ask]) -> Tally:
        client = _Client(route)
        client.connection(asks[0].url)
        if seconds:
            # A proxy connects upstream at the first request only, which is no part of a steady rate. A registry's own
            # address is signed for one method.
            client.ask(asks[0] if "X-Amz-" in asks[0].url else dataclasses.replace(asks[0], method="HEAD"))
        ready.wait(_TIMEOUT_S)
        began = time.monotonic()
        until = began + seconds if seconds else 0.0
        size = requests = 0
        for ask in itertools.cycle(asks) if seconds else asks:
            size += client.ask(ask, until).size
            requests += 1
            if seconds and time.monotonic() >= until:
                break
        return Tally(began, time.monotonic(), size, requests)

    with ThreadPoolExecutor(len(lists)) as threads:
        return Tally.of(list(threads.map(run, lists)))


def _storm(route: Route, ask: Ask, connections: int) -> list[float]:
    ready = threading.Barrier(connections)

    def run(_: int) -> float:
        ready.wait(_TIMEOUT_S)
        began = time.monotonic()
        once(route, ask)
        return time.monotonic() - began

    with ThreadPoolExecutor(connections) as threads:
        return list(threads.map(run, range(connections)))


def _pace(route: Route, ask: Ask, connections: int, rate: float, seconds: float) -> list[float]:
    ready = threading.Barrier(connections)
    due = [number / rate for number in range(round(rate * seconds))]

    def run(first: int) -> list[float]:
        client = _Client(route)
        client.ask(ask)
        ready.wait(_TIMEOUT_S)
        began = time.monotonic()
        latencies = []
        for offset in due[first::connections]:
            time.sleep(max(0.0, began + offset - time.monotonic()))
            client.ask(ask)
            latencies.append(time.monotonic() - began - offset)
        return latencies

    with ThreadPoolExecutor(connections) as threads:
        return sorted(latency for found in threads.map(run, range(connections)) for latency in found)
