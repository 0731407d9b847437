"""Connection limits of the blob server's port: the allow-list, and how long a silent connection may stay.

Invariant: a client that is not allowed is turned away before its first byte is read. A connection whose request is
being answered is never closed here, and no request is refused: Ollama gives up after a few errors. `connection_limits`
says how many may be open; idle ones are closed first.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from pullthrough.net.connection_limits import ConnectionLimits, Slot

_log = logging.getLogger(__name__)

HEAD_S: Final = 10.0
"""How long the head of a connection's first request may take; that of a later one, as long as it may be idle."""

FIELD_BYTES: Final = 16 << 10
"""How long a field of a head may be. aiohttp's 8190 are too few for what some clients accept."""


@dataclass(eq=False, slots=True)
class Caller:
    """One connection."""

    slot: Slot
    patience: asyncio.TimerHandle
    """Closes the connection unless a request comes first."""


class AcceptPolicy(web.Server):
    """aiohttp's server, behind these limits."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        admits: Callable[[str], bool],
        limits: ConnectionLimits,
        **options: Any,
    ) -> None:
        """`admits` says whether an address is allowed; `answer` and `options` as web.Server takes them."""
        super().__init__(self._serve, logger=Brief(_log), max_field_size=FIELD_BYTES, **options)
        self._answer = answer
        self._admits = admits
        self._limits = limits
        self._callers: dict[object, Caller] = {}

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        # So that a writer is drained when nothing is left: sendfile goes past the transport's buffer.
        transport.set_write_buffer_limits(0)
        peer = transport.get_extra_info("peername")
        slot = self._limits.take(peer[0], transport.close) if peer is not None and self._admits(peer[0]) else None
        if slot is None:
            transport.close()
            return
        patience = asyncio.get_running_loop().call_later(HEAD_S, transport.close)
        self._callers[handler] = Caller(slot, patience)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        if (caller := self._callers.pop(handler, None)) is not None:
            caller.patience.cancel()
            caller.slot.release()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._callers.get(request.protocol)
        if caller is None:
            raise ConnectionResetError
        caller.patience.cancel()
        caller.slot.busy = True
        try:
            return await self._answer(request)
        finally:
            caller.slot.busy = False


class Brief(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's messages about requests that are not HTTP, without the traceback, which quotes the request line."""

    def log(self, level: int, msg: object, *args: object, **_: Any) -> None:
        self.logger.log(min(level, logging.WARNING), msg, *args)
