"""Threads for connections: one for each that is being served, and one poller for those that wait for a request.

A connection is served by a thread, and gives the thread back while it is idle. Its `deadline` says when its present
work must be done; a connection past its deadline is shut down, which frees a blocked read or write at once.

Invariant: there are never more threads than places; when all are taken, connections wait, first come, first served.
After `close` has returned, no thread uses a socket.
"""

import contextlib
import logging
import selectors
import socket
import sys
import threading
import time
from collections import deque
from typing import Final, Protocol

from pullthrough.core.humanize import count_text
from pullthrough.runtime import platform

_log = logging.getLogger(__name__)

STACK: Final = 512 << 10
"""The size of a thread's stack in bytes: the deepest call, OpenSSL's handshake, takes less than a tenth."""
TICK_S: Final = 1.0
"""How often deadlines are checked."""
PARKED_S: Final = 120.0
"""How long a connection may wait for its next request: longer than Go keeps its end idle (net/http, 90 s)."""
JOIN_S: Final = 5.0
SWITCH_S: Final = 0.0005
"""How long a thread that wants the interpreter waits for one that computes. With Python's own 5 ms for each MiB,
waiting would be most of a stream's time beside a busy event loop."""
MOST: Final = 4096
_RESERVED: Final = 256
"""Descriptors reserved for registries, the CDN and the disk."""
_THREAD_BYTES: Final = 1 << 20
"""The memory that a thread may use: a piece of a body, TLS, its stack."""


class Connection(Protocol):
    """What is served."""

    deadline: float
    """Monotonic seconds: when its present work must be done."""

    def fileno(self) -> int:
        """Return its socket."""

    def run(self) -> bool:
        """Serve, in a thread, until the connection is idle (True) or over (False)."""

    def stop(self) -> None:
        """Shut the socket down, from any thread: blocked calls return."""

    def close(self) -> None:
        """Release everything; nothing is called afterwards."""


def ceiling(descriptors: int, memory: int) -> int:
    """Return how many connections may be served at once, given the available descriptors and memory."""
    return max(16, min(MOST, (descriptors - _RESERVED) // 2, memory // 2 // _THREAD_BYTES))


class ByteThreads:
    """The threads, and the connections that wait for one."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._free = places
        self._waiting: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        self._arrivals: list[Connection] = []
        """Connections that the poller is to watch."""
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._poller = threading.Thread(target=self._poll, name="ollama-cache-poller", daemon=True)

    def open(self) -> None:
        """Begin to serve."""
        sys.setswitchinterval(SWITCH_S)
        self._poller.start()

    @property
    def waiting(self) -> int:
        """How many connections wait for a thread."""
        return len(self._waiting)

    def start(self, connection: Connection) -> None:
        """Serve the connection, which this object owns from now on, as soon as there is a thread."""
        with self._lock:
            if not self._closing:
                if self._free == 0:
                    self._waiting.append(connection)
                    return
                self._free -= 1
                self._busy.add(connection)
                begun = self._spawn(connection)
                if begun:
                    return
                # The system gives no more threads: make do with those there are; the next one that is free serves it.
                self._busy.discard(connection)
                if self._busy:
                    self._waiting.append(connection)
                    return
                self._free += 1
        connection.stop()
        connection.close()

    def close(self, grace_s: float) -> None:
        """Give running connections this long to finish, then shut them down. Blocks; may be called twice."""
        with self._lock:
            self._closing = True
            waiting, self._waiting = list(self._waiting), deque()
        self._wake_poller()
        for connection in waiting:
            connection.stop()
            connection.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, grace_s)
            for connection in self._busy:
                connection.stop()
            if not self._changed.wait_for(lambda: not self._busy, JOIN_S):
                _log.warning("%s did not end in time", count_text(len(self._busy), "connection"))
        if self._poller.is_alive():
            self._poller.join(JOIN_S)

    # --- threads

    def _spawn(self, connection: Connection) -> bool:
        before = threading.stack_size(STACK)
        try:
            threading.Thread(target=self._run, args=(connection,), name="ollama-cache-bytes", daemon=True).start()
        except RuntimeError as error:
            _log.warning("no more threads than %d: %s", len(self._busy) - 1, error)
            return False
        finally:
            threading.stack_size(before)
        return True

    def _run(self, first: Connection) -> None:
        platform.lower_priority()
        connection: Connection | None = first
        while connection is not None:
            is_idle = False
            try:
                is_idle = connection.run()
            except Exception:
                _log.exception("serving a connection failed")
            with self._changed:
                self._busy.discard(connection)
                is_idle = is_idle and not self._closing
                if is_idle:
                    connection.deadline = time.monotonic() + PARKED_S
                    self._arrivals.append(connection)
                self._changed.notify_all()
            if is_idle:
                self._wake_poller()
            else:
                connection.close()
            with self._lock:
                connection = self._waiting.popleft() if self._waiting else None
                if connection is None:
                    self._free += 1
                else:
                    self._busy.add(connection)

    # --- the poller

    def _wake_poller(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _poll(self) -> None:
        parked: dict[Connection, None] = {}
        while True:
            for key, _ in self._selector.select(TICK_S):
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                    continue
                self._selector.unregister(key.fd)
                del parked[key.data]
                self.start(key.data)
            with self._lock:
                arrivals, self._arrivals = self._arrivals, []
                now = time.monotonic()
                late = [connection for connection in self._busy if connection.deadline < now]
                closing = self._closing
            for connection in arrivals:
                parked[connection] = None
                self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
            for connection in late:
                connection.stop()
            for connection in [each for each in parked if closing or each.deadline < now]:
                self._selector.unregister(connection.fileno())
                del parked[connection]
                connection.stop()
                connection.close()
            if closing:
                self._selector.close()
                self._wake.close()
                self._woken.close()
                return
