"""Outlets for the bytes of a body: a TLS connection that a thread owns, or the socket of the plain port.

A megabyte is read and handed to OpenSSL, or the kernel, in one call: neither holds the interpreter lock. If the socket
takes nothing, such a call returns after STALL_S; then the memory of the piece is released, and the piece is read again
once there is room, so that stalled clients hold no memory.

Invariant: bytes leave in order, all of them or an exception: `ClientGone` when it is the client's end, `Unreadable`
when it is the file's. An outlet is used by one thread at a time, but for `stop`. Descriptors of files are used by
offset only, as several clients share one.
"""

import contextlib
import errno
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from pullthrough.delivery.socket_polling import is_gone, writable
from pullthrough.runtime import platform

FIRST: Final = 256 << 10
"""Bytes of a body's first piece, and of every piece while many clients have a large one."""
PIECE: Final = 1 << 20
LARGE: Final = 48
"""How many clients may have large pieces at the same time."""
CLIENT_STALL_S: Final = 600.0
"""A client that does not take a piece in this time is dropped: less than 2 KB/s."""
ROOM: Final = 16 << 10
"""Room for a head in front of a piece."""
_KEPT: Final = 16
"""How many buffers are kept for the next pieces."""


class ClientGone(ConnectionError):
    """The client has left, or was shut out; the message says why."""


class Unreadable(OSError):
    """The file does not have the bytes that it should have."""


class Outlet(Protocol):
    """What a body is sent to."""

    sent: int
    """Bytes of bodies so far."""

    def put(self, data: bytes | bytearray) -> None:
        """Send what is in memory."""

    def put_file(self, descriptor: int, start: int, stop: int) -> None:
        """Send bytes `[start, stop)` of an open file."""

    def flush(self) -> None:
        """Send what was held back to go with the first bytes of the body."""

    def is_gone(self) -> bool:
        """Return whether the client has left."""


class Buffers:
    """The memory of pieces on their way, shared by all clients and given back to the system."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[memoryview] = []
        self._out = 0

    def take(self) -> memoryview:
        """Memory for one piece and a head; pages that were never written to cost nothing."""
        with self._lock:
            self._out += 1
            if self._kept:
                return self._kept.pop()
        if sys.platform == "win32":
            return memoryview(mmap.mmap(-1, ROOM + PIECE))
        return memoryview(mmap.mmap(-1, ROOM + PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def give(self, buffer: memoryview) -> None:
        """Return a buffer that is no longer used."""
        with self._lock:
            self._out -= 1
            self._kept.append(buffer)
            del self._kept[min(_KEPT, self._out + 1) :]

    @property
    def in_use(self) -> int:
        """How many buffers are in use."""
        return self._out

    @property
    def size(self) -> int:
        """How large the next piece may be."""
        return PIECE if self._out < LARGE else FIRST


class PlainOutlet:
    """A socket without TLS, which somebody else's event loop has made non-blocking and reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent = 0

    def put(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            view = view[self._send(partial(self.sock.send, view)) :]

    def put_file(self, descriptor: int, start: int, stop: int) -> None:
        # Without sendfile: Windows, and file systems that cannot.
        if sys.platform != "win32" and hasattr(os, "sendfile"):
            start = self._put_by_sendfile(descriptor, start, stop)
        while start < stop:
            data = bytearray(min(PIECE, stop - start))
            fill(descriptor, memoryview(data), start)
            self.put(data)
            start += len(data)

    def _put_by_sendfile(self, descriptor: int, start: int, stop: int) -> int:
        """Return how far the file was sent: not at all if sendfile does not work here."""
        if sys.platform == "win32":
            raise NotImplementedError("there is no sendfile(2)")
        try:
            while start < stop:
                count = self._send(partial(os.sendfile, self.sock.fileno(), descriptor, start, stop - start))
                if count == 0:
                    raise Unreadable(f"expected {stop - start} bytes at {start}, got none: the file is shorter")
                start += count
        except ConnectionError:
            raise
        except OSError as error:
            if error.errno == errno.EIO:
                raise Unreadable(str(error)) from error
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        return start

    def flush(self) -> None:
        """Send what was held back, which is nothing."""

    def is_gone(self) -> bool:
        return is_gone(self.sock)

    def stop(self) -> None:
        """Shut the connection down, from any thread: blocked calls return."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _send(self, once: Callable[[], int]) -> int:
        while True:
            try:
                count = once()
            except BlockingIOError:
                if not writable(self.sock, CLIENT_STALL_S):
                    raise ClientGone(f"client took no byte for {CLIENT_STALL_S:.0f} s") from None
            except ConnectionError:
                raise ClientGone("client disconnected") from None
            else:
                self.sent += count
                return count


def fill(descriptor: int, buffer: memoryview, start: int) -> None:
    """Read all of `buffer` from the file at `start`. Unreadable if it is not there."""
    while buffer:
        try:
            count = platform.read_into(descriptor, buffer, start)
        except OSError as error:
            raise Unreadable(str(error)) from error
        if count == 0:
            raise Unreadable(f"expected {len(buffer)} bytes at {start}, got none: the file is shorter")
        buffer, start = buffer[count:], start + count
