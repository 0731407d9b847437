"""Who comes in at the blob server's port, and for how long who says nothing may stay.

Invariant: a stranger is sent away before its first byte is looked at. A connection whose request is being answered is
never closed from here, and no request is refused: Ollama gives up after a few errors. Of one address only so many may
be open; those that wait go first, and those that watch a page. Knows connections and no answer.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

_log = logging.getLogger(__name__)

HEAD_S: Final = 10.0
"""How long the head of a connection's first request may take; that of a later one, as long as it may be idle."""
PER_ADDRESS: Final = 1024
"""Connections of one address: sixty Ollamas behind one router, with sixteen parts each."""


@dataclass(eq=False, slots=True)
class Caller:
    """One connection."""

    address: str
    transport: asyncio.Transport
    patience: asyncio.TimerHandle
    """Closes it, unless it asks for something first."""
    is_served: bool = False
    """It has asked, and is being answered."""


class Door(web.Server):
    """aiohttp's server, with someone at its door."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        admits: Callable[[str], bool],
        **options: Any,
    ) -> None:
        """`admits` says of an address whether it may come in; `answer` and `options` as web.Server takes them."""
        super().__init__(self._serve, logger=Brief(_log), **options)
        self._answer = answer
        self._admits = admits
        self._callers: dict[object, Caller] = {}
        self._of_address: dict[str, dict[Caller, None]] = {}
        """The callers of each address, the oldest first."""

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        # So that a writer is drained when nothing is left: sendfile goes past the transport's buffer.
        transport.set_write_buffer_limits(0)
        peer = transport.get_extra_info("peername")
        if peer is None or not self._admits(peer[0]):
            transport.close()
            return
        patience = asyncio.get_running_loop().call_later(HEAD_S, transport.close)
        caller = self._callers[handler] = Caller(peer[0], transport, patience)
        callers = self._of_address.setdefault(caller.address, {})
        callers[caller] = None
        if len(callers) > PER_ADDRESS:
            leaving = next(one for one in callers if not one.is_served)  # the new one, if it is no other
            del callers[leaving]
            leaving.transport.close()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        caller = self._callers.pop(handler, None)
        if caller is None:
            return
        caller.patience.cancel()
        callers = self._of_address.get(caller.address, {})
        callers.pop(caller, None)
        if not callers:
            self._of_address.pop(caller.address, None)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._callers.get(request.protocol)
        if caller is None:
            raise ConnectionResetError
        caller.patience.cancel()
        caller.is_served = True
        try:
            return await self._answer(request)
        finally:
            caller.is_served = False


class Brief(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp says of requests that are no HTTP, without the traceback: it quotes the request line."""

    def log(self, level: int, msg: object, *args: object, **_: Any) -> None:
        self.logger.log(min(level, logging.WARNING), msg, *args)
