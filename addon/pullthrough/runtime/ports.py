"""Listening on a TCP port, and the reason if that fails.

Invariant: the reason is one line that says which process has the port, or what to set.
"""

import contextlib
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

BACKLOG: Final = 1024
_NO_SUCH_FAMILY: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_LISTEN: Final = "0A"  # a state in /proc/net/tcp


def listening(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets for each address of `host`; for "", of each family that this machine has.

    Raises:
        OSError: one of them is not available.
    """
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            try:
                sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
                problem = error
        if not sockets and problem is not None:
            raise problem
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def listens(port: int) -> bool:
    """Return whether this process listens on a port, on whichever address."""
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process().net_connections("tcp")
        return any(each.status == psutil.CONN_LISTEN and each.laddr[1] == port for each in connections)
    return False


def reason(error: OSError, port: int) -> str:
    """Return why a port cannot be listened on: which process has it, or what would allow it."""
    if error.errno == errno.EADDRINUSE:
        return f"it is taken by {_holder(port)}"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if error.errno == errno.EACCES:
        return (
            f"ports below {_first_free()} are for root, or for a program with CAP_NET_BIND_SERVICE (in a service: "
            "AmbientCapabilities=CAP_NET_BIND_SERVICE)"
        )
    return error.strerror or str(error)


def _holder(port: int) -> str:
    """Return the process that listens on a port, as far as this user may know."""
    # macOS tells only root, and a process may end meanwhile.
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            is_it = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr[1] == port
            if is_it and connection.pid:
                if connection.pid == os.getpid():
                    return "this cache itself, for another of its listeners"
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    users = dict.fromkeys(_users(port))
    return f"a process of {' and '.join(users)}" if users else "another process"


def _users(port: int) -> Iterator[str]:
    """Yield the users that listen on a port, which Linux tells for every process."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield _user_name(int(fields[7]))


def _user_name(uid: int) -> str:
    if sys.platform != "win32":
        import pwd

        with contextlib.suppress(KeyError):
            return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"


def _first_free() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return socket.IPPORT_RESERVED if hasattr(socket, "IPPORT_RESERVED") else 1024


def shown_address(host: str, port: int) -> str:
    """Return `host:port` as people write it; `*` for all addresses."""
    is_v6 = False
    with contextlib.suppress(ValueError):
        is_v6 = ipaddress.ip_address(host).version == 6
    return f"[{host}]:{port}" if is_v6 else f"{host or '*'}:{port}"
