"""Connections to other servers, for threads: by name and port, through the parent proxy if one is configured.

Invariant: the certificate chain and host name of every TLS server are verified; a name is connected to only at
addresses that the rules allow; the parent's credentials go to the parent alone. No message quotes what was sent.
"""

import contextlib
import errno
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import h11

from pullthrough.config.settings import Endpoint
from pullthrough.core.cdn_loop import CDN_LOOP, LoopGuard
from pullthrough.core.errors import UpstreamTimeout, UpstreamUnreachable
from pullthrough.net.happy_eyeballs import DELAY_S, interleaved
from pullthrough.net.proxy_env import ParentProxies, Proxy
from pullthrough.upstream.layers import READ, InnerTls, Layer, Plain, Tls
from pullthrough.upstream.resolver import AddressRules
from pullthrough.upstream.wording import worded

CONNECT_S: Final = 10.0
"""How long all addresses of a name may take together to connect, and then each handshake."""
SILENT_S: Final = 60.0
"""How long the server may neither take nor send a byte, unless the caller says otherwise."""
_TICK_S: Final = 0.25
"""How often a connection attempt checks whether it is still wanted: a connecting socket cannot be shut down."""
_UNDER_WAY: Final = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0))

_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # they need no descriptor


class Caller:
    """A party that wants a connection. `stop`, which any thread may call, ends its blocking calls."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._sock: socket.socket | None = None

    def stop(self) -> None:
        """Make what is under way raise UpstreamUnreachable."""
        self._stop.set()
        if (sock := self._sock) is not None:
            with contextlib.suppress(OSError):  # not connected yet, or no longer
                # Not SSLSocket.shutdown, which would let the connection go on in the clear.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    @property
    def stopped(self) -> bool:
        """Whether the connection is no longer wanted."""
        return self._stop.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep. Raises UpstreamUnreachable once stopped."""
        self._stop.wait(seconds)
        self.check()

    def watch(self, sock: socket.socket | None) -> None:
        """Shut this socket down when stopped. Raises UpstreamUnreachable if already stopped."""
        self._sock = sock
        self.check()

    def check(self) -> None:
        """Raise UpstreamUnreachable once stopped."""
        if self.stopped:
            raise UpstreamUnreachable("nobody wants it any more")


class Dialed:
    """An open connection. `close` it."""

    def __init__(self, sock: socket.socket, layer: Layer, proxy: Proxy | None) -> None:
        self.sock = sock
        """The socket of the first leg, to wait on."""
        self.proxy = proxy
        """The proxy that takes requests in absolute form; None if the server is reached directly or by a tunnel."""
        self.used = time.monotonic()
        """When the connection was last used (monotonic seconds)."""
        self._layer = layer

    def take(self, buffer: memoryview) -> int | None:
        """Read what has come; 0 at the end, None if nothing has come. Raises OSError if the connection fails."""
        return self._layer.read_into(buffer)

    def wait(self, timeout_s: float) -> bool:
        """Wait until `take` may have more. Return False if nothing comes in time."""
        return _wait(self.sock, self._layer.wants or selectors.EVENT_READ, timeout_s)

    def read_into(self, buffer: memoryview, timeout_s: float = SILENT_S) -> int:
        """Read at least a byte; 0 at the end. Raises OSError if the connection fails, TimeoutError if it stalls."""
        return _until(self.sock, self._layer, lambda: self._layer.read_into(buffer), timeout_s)

    def read(self) -> bytes:
        """Return what has come, b"" at the end. Raises UpstreamError if the connection fails."""
        buffer = bytearray(READ)
        with translated():
            return bytes(memoryview(buffer)[: self.read_into(memoryview(buffer))])

    def write(self, data: bytes) -> None:
        """Send all of it. Raises UpstreamError if the connection fails."""
        with translated():
            _send(self.sock, self._layer, data)

    @property
    def is_idle(self) -> bool:
        """Whether the server has been silent: a connection with unrequested bytes cannot be used again."""
        return not _wait(self.sock, selectors.EVENT_READ, 0.0)

    def close(self) -> None:
        """Close the connection at once."""
        self.sock.close()


class Dialer:
    """An opener of connections, for threads."""

    def __init__(self, context: ssl.SSLContext, rules: AddressRules, parents: ParentProxies, loop: LoopGuard) -> None:
        """`context` verifies; `rules` say which addresses a name may lead to."""
        self._context = context
        self._rules = rules
        self._parents = parents
        self._loop = loop

    def dial(self, endpoint: Endpoint, caller: Caller | None = None) -> Dialed:
        """Return a connection to the endpoint. Raises UpstreamUnreachable, UpstreamTimeout or AddressRefused."""
        proxy = self._parents.of(endpoint.scheme, endpoint.host, endpoint.port)
        first = Endpoint(proxy.scheme, proxy.host, proxy.port) if proxy is not None else endpoint
        caller = caller or Caller()
        with _blamed_on(proxy):
            sock = self._connect(first.host, first.port, caller)
        try:
            caller.watch(sock)
            with _blamed_on(proxy), translated(first):
                layer: Layer = Plain(sock)
                if first.scheme == "https":
                    sock, layer = self._encrypt(sock, first.host, caller)
                if proxy is not None and endpoint.scheme == "https":
                    self._tunnel(sock, layer, endpoint, proxy)
            if proxy is not None and endpoint.scheme == "https":
                with translated(endpoint):
                    if first.scheme == "https":
                        inner = InnerTls(layer, self._context, endpoint.host)
                        _until(sock, inner, inner.handshake, CONNECT_S)
                        layer = inner
                    else:
                        sock, layer = self._encrypt(sock, endpoint.host, caller)
                proxy = None
        except BaseException:
            sock.close()
            raise
        return Dialed(sock, layer, proxy)

    def _connect(self, host: str, port: int, caller: Caller) -> socket.socket:
        """Return a socket connected to one of the name's addresses; each has DELAY_S before the next is tried too."""
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UpstreamUnreachable(f"{host}: name resolution failed: {worded(error)}") from None
        self._rules.check(host, port, [str(entry[4][0]) for entry in entries])
        found = interleaved(entries, lambda entry: entry[0])
        problem: OSError | None = None
        now = time.monotonic()
        end, next_at = now + CONNECT_S, now
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as losers:
            while now < end and (found or selector.get_map()):
                caller.check()
                if found and (now >= next_at or not selector.get_map()):
                    family, kind, protocol, _, address = found.pop(0)
                    next_at = now + DELAY_S
                    try:
                        sock = losers.enter_context(socket.socket(family, kind, protocol))
                        sock.setblocking(False)
                        if (number := sock.connect_ex(address)) not in _UNDER_WAY:
                            raise OSError(number, os.strerror(number))
                        selector.register(sock, selectors.EVENT_WRITE)
                    except OSError as error:
                        problem = error
                for key, _ in selector.select(min(_TICK_S, end - now)):
                    assert isinstance(key.fileobj, socket.socket)
                    sock = key.fileobj
                    if (number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == 0:
                        winner = socket.socket(fileno=sock.detach())
                        winner.setblocking(False)
                        winner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        return winner
                    problem = OSError(number, os.strerror(number))
                    selector.unregister(sock)
                    next_at = now
                now = time.monotonic()
        raise UpstreamUnreachable(f"{host}:{port}: {worded(problem) if problem else 'no connection in time'}")

    def _encrypt(self, sock: socket.socket, host: str, caller: Caller) -> tuple[ssl.SSLSocket, Tls]:
        tls = Tls(self._context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False))
        try:
            caller.watch(tls.sock)
            _until(tls.sock, tls, tls.handshake, CONNECT_S)
        except BaseException:
            tls.sock.close()  # the socket that was wrapped is detached
            raise
        return tls.sock, tls

    def _tunnel(self, sock: socket.socket, layer: Layer, endpoint: Endpoint, proxy: Proxy) -> None:
        connection = h11.Connection(h11.CLIENT)
        fields = [("Host", endpoint.authority), (CDN_LOOP, self._loop.identifier), *proxy.fields.items()]
        _send(sock, layer, connection.send(h11.Request(method="CONNECT", target=endpoint.authority, headers=fields)))
        _send(sock, layer, connection.send(h11.EndOfMessage()))
        # Byte by byte: what follows the head belongs to the TLS connection with the server.
        byte = memoryview(bytearray(1))
        while (event := connection.next_event()) is h11.NEED_DATA or isinstance(event, h11.InformationalResponse):
            if event is h11.NEED_DATA:
                if not _until(sock, layer, lambda: layer.read_into(byte), CONNECT_S):
                    raise UpstreamUnreachable(f"{proxy.origin} answered nothing")
                connection.receive_data(bytes(byte))
        assert isinstance(event, h11.Response)
        if not 200 <= event.status_code < 300:
            raise UpstreamUnreachable(f"{proxy.origin} answered {event.status_code}")


@contextlib.contextmanager
def _blamed_on(proxy: Proxy | None) -> Iterator[None]:
    """Name the parent proxy, if there is one, in the errors of the way to it."""
    try:
        yield
    except (UpstreamUnreachable, UpstreamTimeout) as error:
        if proxy is None:
            raise
        raise type(error)(f"parent proxy {error}") from None


@contextlib.contextmanager
def translated(endpoint: Endpoint | None = None) -> Iterator[None]:
    """Turn the failures of network and peer into our errors, which quote no bytes that were received."""
    where = f"{endpoint.host}:{endpoint.port}: " if endpoint is not None else ""
    try:
        yield
    except TimeoutError:
        raise UpstreamTimeout(f"{where}no answer in time") from None
    except h11.RemoteProtocolError:
        raise UpstreamUnreachable(f"{where}the answer is no HTTP/1.1") from None
    except (OSError, ValueError) as error:
        raise UpstreamUnreachable(f"{where}{worded(error)}") from None


def _until(sock: socket.socket, layer: Layer, once: Callable[[], int | None], timeout_s: float) -> int:
    """Call `once` until it need not wait, and return its result. Raises TimeoutError if nothing happens for so long."""
    while (result := once()) is None:
        if not _wait(sock, layer.wants, timeout_s):
            raise TimeoutError
    return result


def _send(sock: socket.socket, layer: Layer, data: bytes | None) -> None:
    view = memoryview(data or b"")
    while view:
        view = view[_until(sock, layer, partial(layer.write, view), SILENT_S) :]
    if isinstance(layer, InnerTls):
        _until(sock, layer, layer.flush, SILENT_S)


def _wait(sock: socket.socket, events: int, timeout_s: float) -> bool:
    with _Selector() as selector:
        selector.register(sock, events)
        return bool(selector.select(timeout_s))
