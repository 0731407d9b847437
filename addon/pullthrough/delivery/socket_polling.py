"""Whether a blocking socket can be read or written, and whether its peer has gone.

Invariant: nothing is read. Windows has no poll(2); there select(2) is used, which notices that a peer has gone only by
looking for the end of its data.
"""

import contextlib
import select
import socket
import sys
from typing import Final

_GONE: Final = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)


def readable(sock: socket.socket, timeout_s: float) -> bool:
    """Return whether bytes, or their end, arrive within the time."""
    if sys.platform == "win32":
        return bool(select.select([sock], [], [], timeout_s)[0])
    return _poll(sock, select.POLLIN, timeout_s) != 0


def writable(sock: socket.socket, timeout_s: float | None) -> bool:
    """Return whether bytes can be sent within the time, or never again."""
    if sys.platform == "win32":
        return bool(select.select([], [sock], [], timeout_s)[1])
    return _poll(sock, select.POLLOUT, timeout_s) != 0


def either_readable(one: socket.socket, other: socket.socket, timeout_s: float) -> tuple[bool, bool]:
    """Wait until bytes or their end arrive on one of two sockets; return for each whether they have."""
    if sys.platform == "win32":
        found = select.select([one, other], [], [], timeout_s)[0]
        return one in found, other in found
    poll = select.poll()
    poll.register(one, select.POLLIN)
    poll.register(other, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(timeout_s * 1000)}
    return one.fileno() in ready, other.fileno() in ready


def is_gone(sock: socket.socket) -> bool:
    """Return whether the peer has closed its end, or the connection is lost."""
    if sys.platform == "linux":
        return bool(_poll(sock, select.POLLRDHUP, 0.0) & _GONE)
    if not readable(sock, 0.0):
        return False
    with contextlib.suppress(OSError):
        return sock.recv(1, socket.MSG_PEEK) == b""
    return True


def _poll(sock: socket.socket, events: int, timeout_s: float | None) -> int:
    if sys.platform == "win32":
        raise NotImplementedError("select(2) is used there")
    if sock.fileno() < 0:
        return _GONE
    poll = select.poll()
    poll.register(sock, events)
    found = poll.poll(None if timeout_s is None else timeout_s * 1000)
    return found[0][1] if found else 0
