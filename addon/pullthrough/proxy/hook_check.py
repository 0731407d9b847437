"""A check at the start, before any client is admitted, that mitmproxy calls the hooks that refuse.

If another version of mitmproxy calls a hook by another name, ours would silently never run. So each refusal is provoked
once, by connections that exist only in memory and go through mitmproxy's own handler and all addons.

Invariant: nothing is sent to any machine; if a hook is missing, at most to loopback.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from mitmproxy import ctx, version
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.proxy import layers, mode_servers
from mitmproxy.proxy.mode_specs import ProxyMode

from pullthrough.core.errors import SettingsError
from pullthrough.proxy.client_limits import HEAD_BYTES
from pullthrough.proxy.connection_hooks import ConnectionHooks

TRIAL_S: Final = 2.0
_OURS: Final = "trial.invalid"
_HERE: Final = ("127.0.0.1", 9)
"""Both ends of the connections; 9 is the discard port (RFC 863)."""
_QUIET: Final = ("mitmproxy", "mitmproxy.proxy.layers", "mitmproxy.proxy.server", "pullthrough")


async def check_hooks(connection_hooks: ConnectionHooks) -> None:
    """Raise SettingsError unless strangers, tunnels, requests, addresses and endless heads are refused.

    `connection_hooks` must not know the settings yet.
    """
    connection_hooks.rehearse(_OURS)
    plain = f"GET http://{_OURS}/ HTTP/1.1\r\nHost: elsewhere.invalid\r\nConnection: close\r\n\r\n".encode()
    inner = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    acts: tuple[tuple[str, bool, bytes, Callable[[bytes], bool]], ...] = (
        ("client_connected: a stranger", False, _connect(443), lambda said: said == b""),
        ("http_connect: a tunnel to port 22", True, _connect(22), lambda said: said.startswith(b"HTTP/1.1 403 ")),
        ("next_layer: a tunnel that is read", True, _connect(443) + inner, lambda said: said.count(b"HTTP/1.1 ") == 1),
        ("server_connect: a way to this machine", True, _connect(443) + inner, lambda _: connection_hooks.judged == 2),
        ("requestheaders: two names", True, plain, lambda said: said.startswith(b"HTTP/1.1 421 ")),
        ("an endless head", True, b"GET / HTTP/1.1\r\nX: " + bytes(4 * HEAD_BYTES), lambda said: said == b""),
    )
    levels = {name: logging.getLogger(name).level for name in _QUIET}
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        for what, admitted, sent, is_refused in acts:
            said, ended = await _play(connection_hooks, sent, admitted=admitted)
            if not ended or not is_refused(said):
                got = f"{said[:60]!r} from mitmproxy {version.VERSION}"
                raise SettingsError(f"{what}: expected a refusal, got {got}; another mitmproxy is needed")
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


async def _play(connection_hooks: ConnectionHooks, sent: bytes, *, admitted: bool) -> tuple[bytes, bool]:
    """Return what a client that sends these bytes receives, and whether its connection was then ended."""
    proxyserver: Proxyserver = ctx.master.addons.get("proxyserver")
    wire = _Wire()
    reader = wire.reader
    handler = mode_servers.ProxyConnectionHandler(
        ctx.master,
        reader,
        wire,
        ctx.options,
        ProxyMode.parse("regular"),
    )
    handler.layer = layers.modes.HttpProxy(handler.layer.context)
    connection_hooks.trial, connection_hooks.stranger = (handler.client, None) if admitted else (None, handler.client)
    reader.feed_data(sent)
    try:
        with proxyserver.register_connection(handler.client.id, handler):
            async with asyncio.timeout(TRIAL_S):
                await handler.handle_client()
    except TimeoutError:
        return bytes(wire.said), False
    finally:
        connection_hooks.trial = connection_hooks.stranger = None
    return bytes(wire.said), True


class _Wire:
    """A StreamWriter and its transport that lead nowhere."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.said = bytearray()
        self.transport = self
        self._closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return _HERE if name in ("peername", "sockname") else default

    def write(self, data: bytes) -> None:
        self.said += data

    async def drain(self) -> None:
        return

    def is_closing(self) -> bool:
        return self._closing

    def write_eof(self) -> None:
        return

    def close(self) -> None:
        """End the connection and tell the reader, as a transport does."""
        if not self._closing:
            self._closing = True
            self.reader.feed_eof()

    abort = close


def _connect(port: int) -> bytes:
    return f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
