"""Bytes of one interval straight from upstream, kept nowhere: what is left when the store cannot be written.

Invariant: bytes come in order and without gaps, from responses that were checked like a recording's; at most one
response's buffer is in memory. A failure is tried again from the next byte. Knows no store and no other reader.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

from pullthrough.budget import Budget
from pullthrough.errors import UnexpectedResponse, UpstreamError
from pullthrough.fetcher import BACKOFF_LIMIT_S, BACKOFF_S, GIVE_UP_S, MAX_UNEXPECTED, Counters
from pullthrough.supply import Supply

_log = logging.getLogger(__name__)


class Relay:
    """The interval `[start, stop)` of a blob of `size` bytes. `close` it, whatever happens."""

    def __init__(self, supply: Supply, counters: Counters, budget: Budget, start: int, stop: int, size: int) -> None:
        self._supply = supply
        self._counters = counters
        self._budget = budget
        self._stop = stop
        self._size = size
        self._bytes = self._fetch(start)
        self._rest = memoryview(b"")
        self._next: asyncio.Task[bytes] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def next(self, limit: int, wait_s: float) -> bytes:
        """At most `limit` of the next bytes; b"" if none came within `wait_s`. UpstreamError when all is in vain."""
        if not self._rest:
            if self._next is None:
                self._next = asyncio.get_running_loop().create_task(self._advance(), name="relay")
            await asyncio.wait([self._next], timeout=wait_s)
            if not self._next.done():
                return b""
            task, self._next = self._next, None
            self._rest = memoryview(task.result())
        piece, self._rest = self._rest[:limit], self._rest[limit:]
        return bytes(piece)

    def close(self) -> None:
        """Let go of the response."""
        if self._next is not None:
            self._next.cancel()
        else:
            self._closing = asyncio.get_running_loop().create_task(self._bytes.aclose(), name="close relay")

    async def _advance(self) -> bytes:
        return await anext(self._bytes)

    async def _fetch(self, position: int) -> AsyncGenerator[bytes]:
        heard, failures = time.monotonic(), 0
        while position < self._stop:
            try:
                source = await self._supply.source()
                async with self._supply.slot(source):
                    stream = await self._supply.open(source, position, self._stop, length=self._size)
                    offset = stream.start
                    with contextlib.closing(stream):
                        async for data in stream.batches():
                            self._counters.upstream_bytes += len(data)
                            # Of a source that ignores Range only the interval is handed on.
                            piece = data[max(0, position - offset) : max(0, self._stop - offset)]
                            offset += len(data)
                            if piece:
                                position += len(piece)
                                heard, failures = time.monotonic(), 0
                                yield piece
                            if position >= self._stop:
                                return
                            await asyncio.sleep(self._budget.spend(len(data), live=True, now=time.monotonic()))
            except UpstreamError as error:
                failures += 1
                self._counters.retries += 1
                silent = time.monotonic() - heard
                if silent > GIVE_UP_S or (isinstance(error, UnexpectedResponse) and failures > MAX_UNEXPECTED):
                    raise
                _log.info("passing through: %s; trying again (%.1f s without a byte)", error, silent)
                await asyncio.sleep(min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(failures - 1, 10)))
