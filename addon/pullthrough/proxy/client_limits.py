"""Limits for each client of mitmproxy: the number of connections, the size of a head, and the time for it.

mitmproxy reads as fast as a client sends, whether or not it can use the bytes, and limits neither the size of a head
nor the time that it takes. Here its reader of a client's connection is replaced by one that checks, before it reads on,
how much mitmproxy has not used yet: while a head is awaited, too much ends the connection; at any other time reading
waits until it has been used.

Invariant: a connection whose request is being answered, or that is a tunnel, is never ended from here. Relies on
mitmproxy internals that `hook_check` tests at the start.
"""

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final

from mitmproxy import connection, ctx, http, tls
from mitmproxy.proxy import events, layer, server_hooks
from mitmproxy.proxy.layers.http import HttpLayer
from mitmproxy.proxy.layers.http._events import RequestData
from mitmproxy.proxy.server import ConnectionHandler

from pullthrough.net.connection_limits import ConnectionLimits, Slot
from pullthrough.runtime import platform

_log = logging.getLogger(__name__)

HEAD_BYTES: Final = 64 << 10
"""The most that is read of a head or ClientHello, or ahead of what is used: Go's own server takes 1 MiB, nginx 32 KiB;
an Ollama sends less than 2 KiB."""
HEAD_S: Final = 10.0
"""How long each of these may take: the first head, the TLS handshake after it, a later head from its first byte."""
IDLE_S: Final = 120.0
"""How long a connection may wait for a request: longer than Go keeps its end idle (net/http, 90 s)."""
BACKLOG: Final = 1024
CROWD: Final = 256
"""From so many connections on, the memory that they leave behind is worth releasing once most of them have gone."""
RELEASE_S: Final = 2.0
LOOK_AGAIN_S: Final = 0.25
"""How soon a waiting reader checks again without a hook: mitmproxy goes on a little after one."""


class Phase(Enum):
    """The phase of a client's connection."""

    HEAD = auto()
    """The rest of a head, or of a handshake, is awaited."""
    IDLE = auto()
    """The next request is awaited."""
    BUSY = auto()
    """A request is being answered, or a tunnel is open."""


class Owed(Enum):
    """The parts of an exchange that are not complete."""

    REQUEST = auto()
    RESPONSE = auto()


class ClientLimit:
    """A reader that replaces mitmproxy's for one client's connection."""

    def __init__(self, handler: ConnectionHandler, slot: Slot) -> None:
        streams: Any = handler.transports[handler.client]
        self.slot = slot
        self._handler = handler
        self._inner: asyncio.StreamReader = streams.reader
        self._writer: asyncio.StreamWriter = streams.writer
        self._phase = Phase.HEAD
        self._owed: set[Owed] = set()
        self._moved = asyncio.Event()
        self._patience: asyncio.TimerHandle | None = None
        self.enter(Phase.HEAD)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the inner reader."""
        return getattr(self._inner, name)

    async def read(self, size: int) -> bytes:
        """Read like StreamReader.read, once mitmproxy has used what it has."""
        while unread(self._handler.layer, self._handler.client) > HEAD_BYTES:
            if not await self._moves() and self._phase is not Phase.BUSY:
                _log.warning("closed client %s: more than %d bytes of a head", self._peer, HEAD_BYTES)
                self._writer.transport.abort()
                return b""
        data = await self._inner.read(size)
        if data and self._phase is Phase.IDLE:
            self.enter(Phase.HEAD)
        return data

    async def _moves(self) -> bool:
        """Wait for a hook, after which mitmproxy may use more. Return False if none comes soon."""
        self._moved.clear()
        try:
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._moved.wait()
        except TimeoutError:
            return False
        return True

    def enter(self, phase: Phase) -> None:
        """Set the deadline for this phase."""
        self._phase = phase
        self.slot.busy = phase is Phase.BUSY
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if phase is not Phase.BUSY:
            seconds = HEAD_S if phase is Phase.HEAD else IDLE_S
            self._patience = asyncio.get_running_loop().call_later(seconds, self._expire)
        self._moved.set()

    def begin(self) -> None:
        """Note that a request has come; its body may follow."""
        self._owed = {Owed.REQUEST, Owed.RESPONSE}
        self.enter(Phase.BUSY)

    def settle(self, *owed: Owed) -> None:
        """Note what is complete of the exchange; once all is, the next request is awaited. An answer may come first."""
        self._owed -= set(owed)
        if not self._owed:
            self.enter(Phase.IDLE)

    def move(self) -> None:
        """Check again what mitmproxy has used."""
        self._moved.set()

    def end(self) -> None:
        """Stop watching."""
        if self._patience is not None:
            self._patience.cancel()

    def close(self) -> None:
        """End the connection if mitmproxy has not: it does not if data that has just come is still waiting."""
        self.end()
        self._writer.close()

    def _expire(self) -> None:
        if self._phase is Phase.HEAD:
            _log.warning("closed client %s: no full request within %.0f s", self._peer, HEAD_S)
        self._writer.close()

    @property
    def _peer(self) -> str:
        return str(self._handler.client.peername[0])


class ClientLimits:
    """The addon that limits each connection that `connection_hooks` has admitted. Takes none before `open`."""

    name = "ollama_cache_intake"

    def __init__(self) -> None:
        self._limits = ConnectionLimits(0)
        self._waiting: dict[str, Slot] = {}
        """The places of clients that came before they could be admitted."""
        self._of_client: dict[str, ClientLimit] = {}
        self._most = 0
        """The most connections at once since memory was last released."""

    def open(self, limits: ConnectionLimits) -> None:
        """Count connections towards these limits from now on."""
        self._limits = limits
        _lengthen_queues()

    def hold(self, client: connection.Client, limits: ConnectionLimits) -> None:
        """Take a place within `limits` for a client that waits to be admitted, or refuse it if there is none."""
        if client.transport_protocol == "tcp" and (slot := self._take(client, limits)) is not None:
            self._waiting[client.id] = slot

    def _take(self, client: connection.Client, limits: ConnectionLimits) -> Slot | None:
        streams = ctx.master.addons.get("proxyserver").connections[client.id].transports[client]
        slot = limits.take(client.peername[0], streams.writer.close)
        if slot is None:
            client.error = "too many connections"
            _log.warning("refused client %s: too many connections of its address, or of all", client.peername[0])
        return slot

    def free(self, client: connection.Client) -> None:
        """Note that the connection is a tunnel from now on."""
        self._enter(client, Phase.BUSY)

    def hand_over(self, client: connection.Client) -> Callable[[], None]:
        """Leave the connection and its place to another owner; return the function that gives the place up.

        The function may be called from any thread.
        """
        client_limit = self._of_client.pop(client.id, None)
        if client_limit is None:
            return lambda: None
        client_limit.end()
        client_limit.slot.busy = True
        loop, slot = asyncio.get_running_loop(), client_limit.slot

        def release() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._release, slot)

        return release

    def _enter(self, client: connection.Client, phase: Phase) -> None:
        if (client_limit := self._of_client.get(client.id)) is not None:
            client_limit.enter(phase)

    # --- hooks

    def client_connected(self, client: connection.Client) -> None:
        """Take a place for an admitted client, and replace mitmproxy's reader of it."""
        slot = self._waiting.pop(client.id, None)
        if client.error or client.transport_protocol != "tcp":
            if slot is not None:
                slot.release()
            return
        slot = slot or self._take(client, self._limits)
        if slot is None:
            return
        handler = ctx.master.addons.get("proxyserver").connections[client.id]
        handler.transports[client].reader = self._of_client[client.id] = ClientLimit(handler, slot)
        self._most = max(self._most, len(self._limits))

    def client_disconnected(self, client: connection.Client) -> None:
        if (slot := self._waiting.pop(client.id, None)) is not None:
            slot.release()
        if (client_limit := self._of_client.pop(client.id, None)) is not None:
            client_limit.close()
            self._release(client_limit.slot)

    def _release(self, slot: Slot) -> None:
        """Give up a place; when a crowd has left, release its memory once the work for it has ended."""
        slot.release()
        left = len(self._limits)
        if self._most >= CROWD and left <= self._most // 4:
            self._most = left
            asyncio.get_running_loop().call_later(RELEASE_S, platform.release_memory)

    def http_connect(self, flow: http.HTTPFlow) -> None:
        self._enter(flow.client_conn, Phase.HEAD)

    def tls_established_client(self, data: tls.TlsData) -> None:
        self._enter(data.context.client, Phase.IDLE)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        if (client_limit := self._of_client.get(flow.client_conn.id)) is not None:
            client_limit.begin()

    def request(self, flow: http.HTTPFlow) -> None:
        self._settle(flow, Owed.REQUEST)

    def response(self, flow: http.HTTPFlow) -> None:
        # After a switch of protocols the connection is a tunnel (RFC 9110 section 15.2.2).
        if flow.response is not None and flow.response.status_code != 101:
            self._settle(flow, Owed.RESPONSE)

    def error(self, flow: http.HTTPFlow) -> None:
        self._settle(flow, *Owed)

    def _settle(self, flow: http.HTTPFlow, *owed: Owed) -> None:
        if (client_limit := self._of_client.get(flow.client_conn.id)) is not None:
            client_limit.settle(*owed)

    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._move(data.client)

    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._move(data.client)

    def _move(self, client: connection.Client) -> None:
        if (client_limit := self._of_client.get(client.id)) is not None:
            client_limit.move()


def _lengthen_queues() -> None:
    """Let more than asyncio's 100 connections wait to be accepted: any more try again after 1, 3 and 7 s."""
    for instance in ctx.master.addons.get("proxyserver").servers:
        for listening in getattr(instance, "_servers", ()):
            for transport_socket in getattr(listening, "sockets", ()):
                with socket.socket(fileno=os.dup(transport_socket.fileno())) as sock:
                    sock.listen(BACKLOG)


def unread(top: layer.Layer | None, client: connection.Client) -> int:
    """Return how many of the client's bytes are unused in mitmproxy's layers, from `top` down."""
    total = 0
    while top is not None:
        waiting = [*top._paused_event_queue, *getattr(top, "_event_queue", ())]
        match top:
            case layer.NextLayer():
                waiting += top.events
                below = top.layer
            case HttpLayer():
                http1: Any = top.connections.get(client)
                total += len(getattr(http1, "buf", b""))
                streams = list(top.streams.values())
                waiting += itertools.chain.from_iterable(stream._paused_event_queue for stream in streams)
                below = next((stream.child_layer for stream in streams if stream.child_layer is not None), None)
            case _:
                total += len(getattr(top, "recv_buffer", b""))
                below = getattr(top, "child_layer", None) or _delegate(top)
        total += sum(_size(event, client) for event in waiting)
        top = below
    return total


def _delegate(top: layer.Layer) -> layer.Layer | None:
    """Return the layer that has taken over from `top`, which keeps no other reference to it."""
    handler = getattr(top._handle_event, "__self__", None)
    return handler if isinstance(handler, layer.Layer) and handler is not top else None


def _size(event: events.Event, client: connection.Client) -> int:
    match event:
        case events.DataReceived(connection=sender) if sender is client:
            return len(event.data)
        case RequestData():
            return len(event.data)
    return 0
