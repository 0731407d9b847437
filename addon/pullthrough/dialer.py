"""Connections to other servers, for threads: by name and port, through the parent proxy where one is prescribed.

Invariant: the chain and the host name of a TLS server are verified; a registry's name that leads to this machine is
refused; the parent's credentials go to the parent alone. Knows HTTP only as far as CONNECT.
"""

import contextlib
import socket
import ssl
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Final, Protocol

import h11

from pullthrough.errors import UpstreamTimeout, UpstreamUnreachable
from pullthrough.loopguard import CDN_LOOP, LoopGuard
from pullthrough.parent import Parents, Proxy
from pullthrough.settings import Endpoint
from pullthrough.tunnel import check_elsewhere

CONNECT_S: Final = 10.0
NEXT_S: Final = 1.0
"""How long one address of a name may take while there are others."""
SILENT_S: Final = 60.0
"""How long the other end may take no byte, and give none."""
_READ: Final = 256 << 10


class Line(Protocol):
    """A connection to a server: a socket, or TLS on one."""

    def recv(self, size: int, /) -> bytes: ...

    def sendall(self, data: bytes, /) -> None: ...


class Dialed:
    """An open connection. `close` it."""

    def __init__(self, sock: socket.socket, line: Line, proxy: Proxy | None) -> None:
        self.sock = sock
        """Of the first leg, to wait on."""
        self.proxy = proxy
        """What is asked in absolute form in the server's place; None for the server itself, or a tunnel to it."""
        self._line = line

    def read(self) -> bytes:
        """What has come, b"" at the end. UpstreamError if the connection fails."""
        with translated():
            return self._line.recv(_READ)

    def write(self, data: bytes) -> None:
        """Send all of it. UpstreamError if the connection fails."""
        with translated():
            self._line.sendall(data)

    def close(self) -> None:
        self.sock.close()


class Dialer:
    """Opens connections from threads."""

    def __init__(
        self,
        context: ssl.SSLContext,
        parents: Parents,
        loop: LoopGuard,
        *,
        is_own: Callable[[str, int], bool],
        own_addresses: Callable[[], Collection[str]],
    ) -> None:
        """`is_own` says of (host, port) whether a name that leads here would be this cache itself."""
        self._context = context
        self._parents = parents
        self._loop = loop
        self._is_own = is_own
        self._own_addresses = own_addresses

    def dial(self, endpoint: Endpoint) -> Dialed:
        """A connection to the endpoint. UpstreamUnreachable, UpstreamTimeout, or LoopDetected."""
        proxy = self._parents.of(endpoint.scheme, endpoint.host, endpoint.port)
        with translated():
            sock = self._connect(*((proxy.host, proxy.port) if proxy else (endpoint.host, endpoint.port)), proxy)
            try:
                line: Line = sock
                if proxy is not None and proxy.scheme == "https":
                    line = _Tls(sock, self._context, proxy.host)
                if proxy is not None and endpoint.scheme == "https":
                    self._tunnel(line, endpoint, proxy)
                    proxy = None
                if endpoint.scheme == "https":
                    line = _Tls(line, self._context, endpoint.host)
            except BaseException:
                sock.close()
                raise
        return Dialed(sock, line, proxy)

    def _connect(self, host: str, port: int, proxy: Proxy | None) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if proxy is None and self._is_own(host, port):
            check_elsewhere(host, [str(entry[4][0]) for entry in found], own=self._own_addresses())
        problem: OSError | None = None
        for number, (family, kind, protocol, _, address) in enumerate(found, 1):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(NEXT_S if number < len(found) else CONNECT_S)
                sock.connect(address)
            except OSError as error:
                problem = error
                sock.close()
                continue
            sock.settimeout(SILENT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        raise problem or OSError(f"{host} has no address")

    def _tunnel(self, line: Line, endpoint: Endpoint, proxy: Proxy) -> None:
        connection = h11.Connection(h11.CLIENT)
        fields = [("Host", endpoint.authority), (CDN_LOOP, self._loop.identifier), *proxy.fields.items()]
        line.sendall(connection.send(h11.Request(method="CONNECT", target=endpoint.authority, headers=fields)) or b"")
        line.sendall(connection.send(h11.EndOfMessage()) or b"")
        while (event := connection.next_event()) is h11.NEED_DATA or isinstance(event, h11.InformationalResponse):
            if event is h11.NEED_DATA:
                connection.receive_data(line.recv(_READ))
        status = event.status_code if isinstance(event, h11.Response) else 0
        if not 200 <= status < 300:
            raise UpstreamUnreachable(f"parent proxy {proxy.origin} answered {status or 'nothing'}")


class _Tls:
    """TLS on a line, which may be TLS itself: that is why it is not the socket's."""

    def __init__(self, line: Line, context: ssl.SSLContext, host: str) -> None:
        self._line = line
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._do(self._tls.do_handshake)

    def recv(self, size: int) -> bytes:
        try:
            return self._do(partial(self._tls.read, size))
        except ssl.SSLZeroReturnError:
            return b""

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._do(partial(self._tls.write, view)) :]

    def _do[T](self, once: Callable[[], T]) -> T:
        while True:
            try:
                result = once()
            except ssl.SSLWantReadError:
                self._flush()
                data = self._line.recv(_READ)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._line.sendall(self._outgoing.read())


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """What the network and the peer do, as errors of ours."""
    try:
        yield
    except TimeoutError:
        raise UpstreamTimeout("no answer in time") from None
    except (OSError, h11.RemoteProtocolError) as error:
        raise UpstreamUnreachable(f"{type(error).__name__}: {error}") from None
