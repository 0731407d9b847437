"""The takeover of a client's connection from mitmproxy, with what has been read from it, so that a thread serves it.

The descriptor is duplicated, and mitmproxy's side is ended at once as if the client had left, so that it stops counting
the connection and frees what it holds for it.

Invariant: a connection is taken whole or left as it was; all that the client has sent is either returned or still in
the socket. These internals of mitmproxy and asyncio are used, and `check` tests them: `Proxyserver.connections`, a
handler's `client`, `transports` and `layer`, the stack of its layers, the buffer of its HTTP/1 connection, and the
buffer of asyncio's StreamReader.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from mitmproxy import connection, ctx, http
from mitmproxy.proxy import layer, server
from mitmproxy.proxy.layers.http import HttpLayer, HTTPMode
from mitmproxy.proxy.mode_specs import ProxyMode

from pullthrough.delivery.delivery import Delivery

_log = logging.getLogger(__name__)

TRIAL_S: Final = 5.0
_TRIAL: Final = b"CONNECT trial.invalid:443 HTTP/1.1\r\nHost: trial.invalid:443\r\n\r\n"

HandOver = Callable[[connection.Client], Callable[[], object]]


class Takeover:
    """The hand-over to `delivery` of connections to the blob host; takes none before `open`."""

    def __init__(self, hand_over: HandOver = lambda _: lambda: None) -> None:
        """`hand_over` keeps a client's place among the connections and returns the function that gives it up."""
        self._hand_over = hand_over
        self._delivery: Delivery | None = None
        self._host = ""

    async def open(self, delivery: Delivery, host: str) -> None:
        """Take connections to `host` from now on, if that works with this mitmproxy."""
        try:
            await check()
        except Exception as error:
            _log.warning("bytes leave through mitmproxy, which is slower: connections cannot be taken here (%r)", error)
            return
        self._host = host
        self._delivery = delivery

    def close(self) -> None:
        """Stop taking connections."""
        self._delivery = None

    def is_for(self, host: str) -> bool:
        """Return whether connections to `host` are taken."""
        return self._delivery is not None and host.lower().rstrip(".") == self._host

    def take_connect(self, flow: http.HTTPFlow) -> None:
        """Take the connection of a CONNECT that awaits its answer, if it leads to the host."""
        request, client = flow.request, flow.client_conn
        # With TLS to the proxy itself, the client's bytes are inside that TLS on the socket.
        if flow.response is not None or flow.error is not None or client.tls_established:
            return
        if request.port == 443 and self.is_for(request.host) and self._take(client, tunnelled=True):
            flow.kill()

    def take_captured(self, following: layer.NextLayer) -> bool:
        """Take the connection whose first TLS bytes for the host are in `following`; return whether that worked."""
        # Bytes that came while mitmproxy called this hook are out of reach.
        return not following._paused_event_queue and self._take(
            following.context.client, tunnelled=False, read=following.data_client()
        )

    def _take(self, client: connection.Client, *, tunnelled: bool, read: bytes = b"") -> bool:
        handler = ctx.master.addons.get("proxyserver").connections.get(client.id)
        if self._delivery is None or handler is None:
            return False
        try:
            sock, early = take(handler)
        except OSError as error:
            # There is no descriptor left, or the client has gone.
            _log.warning("client %s stays with mitmproxy: %s", client.peername[0], error)
            return False
        self._delivery.serve(
            sock, client.peername[0], read + early, tunnelled=tunnelled, on_close=self._hand_over(client)
        )
        return True


def take(handler: server.ConnectionHandler) -> tuple[socket.socket, bytes]:
    """Return the client's socket and what was read from it but not used. Raises OSError if that is impossible.

    The handler's own connection is ended.
    """
    streams: Any = handler.transports.get(handler.client)
    if streams is None:
        raise ConnectionResetError("client disconnected")
    transport = streams.writer.transport
    layers = handler.layer.context.layers
    buffers = [each.connections[handler.client].buf for each in layers if isinstance(each, HttpLayer)]  # type: ignore[attr-defined]
    # Some clients send newlines after CONNECT; mitmproxy drops them, too.
    early = b"".join(map(bytes, buffers)).lstrip(b"\r\n") + bytes(streams.reader._buffer)
    sock: socket.socket = transport.get_extra_info("socket").dup()
    transport.abort()
    return sock, early


async def check() -> None:
    """Take a connection from mitmproxy and check that no byte is lost. Any exception means that it does not work."""
    if sys.platform == "win32":
        raise OSError("Windows' event loop owns its sockets")
    taken: list[tuple[socket.socket, bytes]] = []

    def choose(following: layer.NextLayer) -> None:
        following.layer = HttpLayer(following.context, HTTPMode.regular)

    def connect(flow: http.HTTPFlow) -> None:
        taken.append(take(handler))
        flow.kill()

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listening.getsockname()))
        client.settimeout(TRIAL_S)
        accepted, _ = listening.accept()
        reader, writer = await asyncio.open_connection(sock=accepted)
        hooks: dict[str, Callable[..., None]] = {"next_layer": choose, "http_connect": connect}
        handler = server.SimpleConnectionHandler(reader, writer, ctx.options, ProxyMode.parse("regular"), hooks)
        client.sendall(_TRIAL + b"early")
        await asyncio.wait_for(handler.handle_client(), TRIAL_S)
        sock, early = taken[0]
        stack.enter_context(sock)
        sock.setblocking(True)
        sock.sendall(b"late")
        if (early, client.recv(4)) != (b"early", b"late"):
            raise RuntimeError(f"expected all bytes of a trial, got {early!r}")
