"""The data plane: connections to the blob host, and the bodies of the plain ports, sent from threads.

The event loop decides and the threads move bytes: what they share is made, opened and closed here.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from pullthrough.config.settings import Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.delivery.blob_connection import BlobConnection, Service
from pullthrough.delivery.byte_sender import LoopCalls
from pullthrough.delivery.byte_threads import ByteThreads, ceiling
from pullthrough.delivery.loopback import Loopback
from pullthrough.delivery.outlets import Buffers
from pullthrough.delivery.pass_through import Way
from pullthrough.delivery.tls_contexts import TlsContext
from pullthrough.delivery.tls_outlet import TlsOutlet
from pullthrough.registry.messages import Answer, Request
from pullthrough.runtime import platform
from pullthrough.upstream.client import Upstream

GRACE_S: Final = 0.5
"""How long bodies may continue when the cache stops."""


class Delivery:
    """The server of connections that are handed to it, between `open` and `close`."""

    def __init__(
        self,
        settings: Settings,
        answer: Callable[[Request], Coroutine[Any, Any, Answer | None]],
        requests: RequestLog,
        tls: TlsContext,
        upstream: Upstream,
    ) -> None:
        """`answer` is the registry's core; requests that it does not answer go where `upstream` leads."""
        self.threads = ByteThreads(ceiling(platform.descriptors(), platform.free_memory()))
        """The threads that serve connections and send bodies."""
        self.loopback = Loopback(self.threads)
        """The source of bodies for connections that no thread serves."""
        self._buffers = Buffers()
        host = settings.blob_host
        way = Way(host, settings.endpoint(host), upstream.dialer, upstream.loop, settings.offline)
        self._service = Service(host, answer, LoopCalls(asyncio.get_running_loop()), requests, tls, way)
        self._is_open = False

    async def open(self) -> None:
        """Serve connections from now on."""
        self.threads.open()
        await self.loopback.open()
        self._is_open = True

    async def close(self) -> None:
        """Give bodies GRACE_S to finish, then end all connections. May be called twice, and without `open`."""
        if self._is_open:
            self._is_open = False
            await asyncio.to_thread(self.threads.close, GRACE_S)
            await self.loopback.close()

    def serve(
        self,
        sock: socket.socket,
        client: str,
        early: bytes,
        *,
        tunnelled: bool,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Serve a client of the blob host on its socket, which is ours from here on.

        `early` is what has been read of its handshake; `tunnelled` whether it waits for the answer
        to a CONNECT. `on_close` is called on the loop when the connection has ended: until then it takes its place
        among the client's connections.
        """
        out = TlsOutlet(sock, self._buffers, early)
        connection = BlobConnection(self._service, client, out, tunnelled=tunnelled, on_close=on_close)
        if self._is_open:
            self.threads.start(connection)
        else:
            connection.close()
