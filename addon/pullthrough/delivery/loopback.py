"""A private listener for bodies that leave through mitmproxy.

A flow that stays with mitmproxy (what comes by `http://`, under a registry's name, in TLS to the proxy itself, or
where sockets cannot be taken) is re-pointed here once its request has been decided, and mitmproxy streams what it
gets. That is slower than a thread of its own, and relies only on what mitmproxy documents.

Invariant: it listens on loopback only; a body is given once, to the request that names its unguessable path, and was
decided for the client it goes to.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from pullthrough.delivery.accept_policy import Brief
from pullthrough.delivery.aiohttp_body import send
from pullthrough.delivery.byte_sender import Sending
from pullthrough.delivery.byte_threads import ByteThreads
from pullthrough.recording.reader import Reader

_log = logging.getLogger(__name__)

SHUTDOWN_S: Final = 0.5
PATIENCE_S: Final = 30.0
"""How long a body waits to be asked for: as long as mitmproxy may take to connect."""


@dataclass(frozen=True, slots=True)
class _Body:
    reader: Reader
    note: Callable[[Sending], object]
    patience: asyncio.TimerHandle


class Loopback:
    """A listener that gives bodies between `open` and `close`."""

    def __init__(self, threads: ByteThreads) -> None:
        self._threads = threads
        self._bodies: dict[str, _Body] = {}
        self._runner = web.ServerRunner(
            web.Server(self._give, access_log=None, logger=Brief(_log)), shutdown_timeout=0.5
        )
        self.address = ("127.0.0.1", 0)
        """Where it listens."""

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = self._runner.addresses[0][:2]

    async def close(self) -> None:
        """Stop giving bodies, and end those that are being sent."""
        for path in list(self._bodies):
            self._withdraw(path)
        await self._runner.cleanup()

    def offer(self, reader: Reader, note: Callable[[Sending], object]) -> str:
        """Return a path that gives the reader's bytes, once. The reader is ours; `note` is told how it ended."""
        path = f"/{secrets.token_urlsafe(32)}"
        patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._withdraw, path)
        self._bodies[path] = _Body(reader, note, patience)
        return path

    def _take(self, path: str) -> _Body | None:
        body = self._bodies.pop(path, None)
        if body is not None:
            body.patience.cancel()
        return body

    def _withdraw(self, path: str) -> None:
        body = self._take(path)
        if body is not None:
            body.reader.close()
            body.note(Sending(problem="client disconnected"))

    async def _give(self, request: web.BaseRequest) -> web.StreamResponse:
        body = self._take(request.path)
        if body is None:
            return web.Response(status=404)
        response = web.StreamResponse()
        response.content_length = body.reader.stop - body.reader.start
        sending = Sending(problem="client disconnected")
        try:
            await response.prepare(request)
            await send(request, response, body.reader, sending, self._threads)
        finally:
            body.reader.sent = sending.sent
            body.reader.close()
            body.note(sending)
        if sending.problem:
            response.force_close()
        return response
