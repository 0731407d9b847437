"""Send an addon-made response from a `Reader`, piece by piece, through mitmproxy's own HTTP layer.

mitmproxy sends a response that an addon made from memory in one piece. Here a subclass of its HTTP layer yields a
blocking hook per piece instead: the hook (answered by `Mouth`) waits until the client has taken what was written,
takes the next piece from the reader and returns it. Memory stays at a few pieces per client.

Invariant: a body is either sent whole, or the connection is closed with FIN short of its Content-Length (a held one:
before its head), which lets Ollama keep what it has (server/download.go: an unexpected EOF keeps progress, a reset does
not). Leans on mitmproxy internals that `check_internals` looks at. Knows no registry and no store.
"""

import asyncio
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from mitmproxy import flow as mitmflow
from mitmproxy import http, version
from mitmproxy.addonmanager import AddonManager
from mitmproxy.connection import ConnectionState
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import ClientTLSLayer
from mitmproxy.proxy.layers.http import DropStream, HttpLayer, HTTPMode, HttpStream, SendHttp
from mitmproxy.proxy.layers.http._events import ErrorCode, ResponseData, ResponseHeaders, ResponseProtocolError
from mitmproxy.proxy.layers.http._hooks import HttpErrorHook, HttpResponseHook
from mitmproxy.proxy.layers.http._upstream_proxy import HttpUpstreamProxy

from pullthrough.errors import CacheError, SettingsError
from pullthrough.reader import CLIENT_STALL_S, WAIT_S, FileSpan, Memory, Pending, Reader, read_span

_log = logging.getLogger(__name__)

PIECE: Final = 512 << 10
"""Bytes per hook. Larger pieces cost less CPU per byte and make everybody else on the loop wait longer."""

PIECES_PER_PASS: Final = 1
"""Encrypting a piece takes 2 ms and more: so many are made before everybody else on the loop is looked after. With 3
the loop is half as late again, and nothing is faster."""


@dataclass
class Transfer:
    """One body on its way to one client."""

    flow: http.HTTPFlow
    reader: Reader
    held: bool = False
    """The head goes out only when all bytes are there."""
    piece: bytes | bytearray | None = None
    """The next bytes to send; None when there are none: see `problem`."""
    problem: str = ""
    """Why the body ends before its time; "" when it does not."""
    client_lost: bool = False
    sent: int = 0
    began: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        self.reader.close()


Transfers = MutableMapping[str, Transfer]
"""By flow id: mitmproxy may deep-copy what lies in a flow's own metadata."""


@dataclass
class PieceHook(commands.StartHook):
    """Asks for the next piece of a transfer; the layer is paused until it has been answered."""

    name = "ollama_cache_piece"
    transfer: Transfer


class CachingStream(HttpStream):
    """An HTTP exchange whose response body may come from a transfer."""

    def __init__(self, context: Context, stream_id: int, transfers: Transfers) -> None:
        super().__init__(context, stream_id)
        self._transfers = transfers

    def send_response(self, already_streamed: bool = False) -> layer.CommandGenerator[None]:
        transfer = None if already_streamed else self._transfers.get(self.flow.id)
        if transfer is None:
            yield from super().send_response(already_streamed)
        else:
            yield from self._send_transfer(transfer)

    def _send_transfer(self, transfer: Transfer) -> layer.CommandGenerator[None]:
        assert self.flow.response
        client = self.context.client
        if transfer.held:
            yield PieceHook(transfer)
            if (yield from self.check_killed(True)):
                return
        if not transfer.problem:
            yield SendHttp(ResponseHeaders(self.stream_id, self.flow.response, False), client)
        while not transfer.problem:
            yield PieceHook(transfer)
            # The client may have gone while the hook waited; mitmproxy queues that, or loses it when the
            # connection's task was cancelled by a failed write: the hook has then seen the connection missing.
            if (yield from self.check_killed(True)):
                return
            if transfer.piece is None:
                break
            yield SendHttp(ResponseData(self.stream_id, transfer.piece), client)  # type: ignore[arg-type]
            transfer.piece = None
        if transfer.problem:
            self.flow.error = mitmflow.Error(transfer.problem)
            yield HttpErrorHook(self.flow)
            code = ErrorCode.CLIENT_DISCONNECTED if transfer.client_lost else ErrorCode.KILL
            yield SendHttp(ResponseProtocolError(self.stream_id, transfer.problem, code), client)
            self.flow.live = False
            self.client_state = self.server_state = self.state_errored
            yield DropStream(self.stream_id)
            return
        self.flow.response.timestamp_end = time.time()
        yield HttpResponseHook(self.flow)
        self.server_state = self.state_done
        if self.client_state == self.state_done:
            yield from self.flow_done()


class CachingLayer(HttpLayer):
    """mitmproxy's HTTP layer, with streams of our kind."""

    def __init__(self, context: Context, mode: HTTPMode, transfers: Transfers) -> None:
        super().__init__(context, mode)
        self._transfers = transfers

    def make_stream(self, stream_id: int) -> layer.CommandGenerator[None]:
        stream = CachingStream(self.context.fork(), stream_id, self._transfers)
        self.streams[stream_id] = stream
        yield from self.event_to_child(stream, events.Start())


def replace_http_layer(top: layer.Layer, transfers: Transfers) -> layer.Layer:
    """The layer stack below `top` with its stock HTTP layer, if it ends in one, replaced by ours.

    A new layer enters itself into its context's stack, so the stock one is taken out there: mitmproxy compares the
    stack's length when it decides what comes next.
    """
    parent: layer.Layer | None = None
    current: layer.Layer | None = top
    while current is not None and type(current) is not HttpLayer:
        parent, current = current, getattr(current, "child_layer", None)
    if current is None:
        return top
    stack = current.context.layers
    stack.remove(current)
    ours = CachingLayer(current.context, current.mode, transfers)
    if parent is None:
        return ours
    parent.child_layer = ours  # type: ignore[attr-defined]
    return top


class Handler(Protocol):
    """What of mitmproxy's connection handler is used."""

    client: "mitmclient"

    async def drain_writers(self) -> None: ...


class mitmclient(Protocol):  # only a shape
    state: ConnectionState


class Turns:
    """Lets so many go on in each pass of the event loop, the others in the next ones, first come, first served."""

    def __init__(self, per_pass: int) -> None:
        self._per_pass = per_pass
        self._left = per_pass
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._renewing = False

    async def take(self) -> None:
        """Return when it is the caller's turn."""
        if self._left <= 0 or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        else:
            self._left -= 1
            self._renew_soon()

    def _renew_soon(self) -> None:
        if not self._renewing:
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._renewing = False
        self._left = self._per_pass
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        if self._left < self._per_pass:
            self._renew_soon()


class Mouth:
    """Answers `PieceHook`: backpressure from the client, bytes from the reader."""

    def __init__(self, find_handler: Callable[[str], Handler | None]) -> None:
        """`find_handler` looks a live client connection up by its id."""
        self._find_handler = find_handler
        self._turns = Turns(PIECES_PER_PASS)

    async def fill(self, transfer: Transfer) -> None:
        """Set `transfer.piece`, or `problem`, or neither at the end of the body, or when a held one need not wait."""
        transfer.piece = None
        handler = self._find_handler(transfer.flow.client_conn.id)
        if handler is None:
            _lose(transfer, "client disconnected")
            return
        try:
            # mitmproxy's own `tcp_timeout` does not run during a hook.
            async with asyncio.timeout(CLIENT_STALL_S):
                await handler.drain_writers()
        except TimeoutError:
            _lose(transfer, f"client took no byte for {CLIENT_STALL_S:.0f} s")
            return
        await self._turns.take()
        reader = transfer.reader
        try:
            while not reader.done:
                if (
                    not handler.client.state & ConnectionState.CAN_READ
                    or self._find_handler(transfer.flow.client_conn.id) is not handler
                ):
                    _lose(transfer, "client disconnected")
                    return
                if transfer.held:
                    if await reader.whole(WAIT_S):
                        transfer.held = False
                        return
                    continue
                span = await reader.next(PIECE, WAIT_S)
                match span:
                    case FileSpan():
                        try:
                            transfer.piece = await read_span(span)
                        except OSError:
                            reader.on_unreadable()
                            raise
                    case Memory():
                        transfer.piece = span.data
                    case Pending():
                        continue
                transfer.sent += len(transfer.piece)
                return
        except (CacheError, OSError) as error:
            transfer.problem = str(error)


def _lose(transfer: Transfer, why: str) -> None:
    transfer.problem = why
    transfer.client_lost = True


def check_internals() -> None:
    """SettingsError unless mitmproxy is of the generation whose internals this module was written for."""
    found = version.VERSION
    if not found.startswith("12.") or tuple(int(part) for part in found.split(".")[:3]) < (12, 2, 3):
        raise SettingsError(f"expected mitmproxy >=12.2.3,<13, got {found}")
    expected: dict[Callable[..., object], list[str]] = {
        HttpStream.__init__: ["self", "context", "stream_id"],
        HttpStream.send_response: ["self", "already_streamed"],
        HttpStream.check_killed: ["self", "emit_error_hook"],
        HttpStream.flow_done: ["self"],
        HttpLayer.__init__: ["self", "context", "mode"],
        HttpLayer.make_stream: ["self", "stream_id"],
        HttpLayer.event_to_child: ["self", "child", "event"],
        ClientTLSLayer.tls_interact: ["self"],
        AddonManager.trigger_event: ["self", "event"],
        AddonManager.trigger: ["self", "event"],
        AddonManager._iter_hooks: ["self", "addon", "event"],
        HttpUpstreamProxy.make: ["ctx", "send_connect"],
        HttpUpstreamProxy.on_handshake_error: ["self", "err"],
    }
    for function, names in expected.items():
        parameters = list(inspect.signature(function).parameters)
        if parameters != names:
            raise SettingsError(
                f"expected {function.__qualname__}({', '.join(names)}) in mitmproxy {found}, "
                f"got ({', '.join(parameters)}): another mitmproxy is needed"
            )
