"""A parent proxy on loopback: the only place where names resolve.

Invariant: it leads to nothing but the (host, port) pairs it was given; every request to it is recorded before it is
answered, also those that it refuses. Knows CONNECT and plain requests in absolute form, and nothing of what they carry.
"""

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

_WAIT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to the proxy."""

    method: str
    target: str
    """As on the wire: an authority of CONNECT, else an absolute URL."""
    headers: dict[str, str]
    """By lower-case name."""


class ConnectProxy:
    """An HTTP proxy; a thread per direction."""

    def __init__(self, resolves: Mapping[tuple[str, int], tuple[str, int]], *, credentials: str = "") -> None:
        """`resolves` leads (host, port) to addresses; with `credentials` (user:password) nobody else is served."""
        self.resolves = dict(resolves)
        self.credentials = credentials
        self.status: int | None = None
        """What every request is answered instead; 0 closes without an answer."""
        self._asked: list[Asked] = []
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listening.getsockname()[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="connect-proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A listening socket that is only closed keeps its accept waiting.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.disconnect()

    @property
    def url(self) -> str:
        """What goes into HTTPS_PROXY, with the credentials."""
        user = f"{self.credentials}@" if self.credentials else ""
        return f"http://{user}127.0.0.1:{self.port}"

    @property
    def asked(self) -> list[Asked]:
        """All requests in the order of arrival."""
        with self._changed:
            return list(self._asked)

    @property
    def targets(self) -> set[str]:
        """What has been asked for."""
        return {asked.target for asked in self.asked}

    def restore(self) -> None:
        """Answer as at first, and forget what was asked."""
        self.status = None
        with self._changed:
            self._asked.clear()

    def disconnect(self) -> None:
        """End all present connections."""
        with self._changed:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                sock, _address = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), name="connect-proxy-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._kept(client), contextlib.suppress(OSError, ValueError):
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(65536)
                if not data:
                    return
                head += data
            head, _, early = head.partition(b"\r\n\r\n")
            line, *lines = head.decode("latin-1").split("\r\n")
            method, target, _version = line.split(" ")
            fields = [item.split(":", 1) for item in lines]
            asked = Asked(method, target, {name.lower(): value.strip() for name, value in fields})
            with self._changed:
                self._asked.append(asked)
            self._answer(client, asked, lines, early)

    def _answer(self, client: socket.socket, asked: Asked, lines: list[str], early: bytes) -> None:
        if self.status == 0:
            return
        expected = f"Basic {base64.b64encode(self.credentials.encode()).decode()}"
        if self.credentials and asked.headers.get("proxy-authorization") != expected:
            client.sendall(
                b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                b'Proxy-Authenticate: Basic realm="parent"\r\nContent-Length: 0\r\n\r\n'
            )
            return
        if self.status is not None:
            client.sendall(b"HTTP/1.1 %d Because\r\nContent-Length: 0\r\n\r\n" % self.status)
            return
        split = urlsplit(f"//{asked.target}" if asked.method == "CONNECT" else asked.target)
        address = self.resolves.get((split.hostname or "", split.port or 80))
        if address is None:
            client.sendall(b"HTTP/1.1 502 No Such Host\r\nContent-Length: 0\r\n\r\n")
            return
        with socket.create_connection(address, _WAIT_S) as server, self._kept(server):
            server.settimeout(None)
            if asked.method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = split.path + (f"?{split.query}" if split.query else "")
                kept = [item for item in lines if not item.lower().startswith(("proxy-", "connection:"))]
                head = "\r\n".join([f"{asked.method} {path} HTTP/1.1", *kept, "Connection: close", "", ""])
                server.sendall(head.encode("latin-1"))
            server.sendall(early)
            upward = threading.Thread(target=_copy, args=(client, server), daemon=True)
            upward.start()
            _copy(server, client)
            upward.join(_WAIT_S)

    @contextlib.contextmanager
    def _kept(self, sock: socket.socket) -> Iterator[None]:
        with self._changed:
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._changed:
                self._sockets.discard(sock)
            sock.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """All bytes, and the end."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
