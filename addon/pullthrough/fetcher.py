"""Fetch the slices of one blob over several connections, and absorb what goes wrong with them.

Invariant: a slice is claimed before it is asked for and released however its fetch ends, so no byte is fetched by
two connections at once; a failure is retried with back-off while there is progress, and given up after a silence.
Knows neither readers nor files: it is told what to fetch next and hands bytes on.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from pullthrough.assembly import Assembly
from pullthrough.errors import CacheError, StoreError, UnexpectedResponse, UpstreamError
from pullthrough.scheduler import MIN_SLICE, Slice
from pullthrough.supply import Supply
from pullthrough.upstream import DataStream

_log = logging.getLogger(__name__)

GIVE_UP_S: Final = 60.0
"""Without one byte of progress for this long a recording fails; Ollama's own six tries take 63 s."""

MAX_UNEXPECTED: Final = 20
"""Wrong answers in a row: a source that lies does not get better by asking."""

BACKOFF_S: Final = 0.1
BACKOFF_LIMIT_S: Final = 5.0
RATE_WEIGHT: Final = 0.3


@dataclass
class Counters:
    """What recordings have done since the start of the daemon."""

    upstream_bytes: int = 0
    retries: int = 0
    mismatches: int = 0


class Fetcher:
    """The connections of one recording."""

    def __init__(
        self,
        name: str,
        assembly: Assembly,
        supply: Supply,
        counters: Counters,
        *,
        connections: int,
        choose: Callable[[float | None], Slice | None],
        accept: Callable[[int, memoryview], Awaitable[None]],
        finish: Callable[[int, int], Awaitable[None]],
        fail: Callable[[CacheError], None],
    ) -> None:
        """`choose` names the next slice for a connection that delivers so many bytes/s; `accept` writes bytes at an
        offset and adds them to the assembly; `finish` is told the interval that one response has delivered.
        """
        self.fetched = 0
        self._name = name
        self._assembly = assembly
        self._supply = supply
        self._counters = counters
        self._connections = connections
        self._choose = choose
        self._accept = accept
        self._finish = finish
        self._fail = fail
        self._workers: set[asyncio.Task[None]] = set()
        self._rate: float | None = None
        self._whole_only = False
        self._failures = 0
        self._heard = time.monotonic()
        self._stopped = False

    @property
    def busy(self) -> bool:
        return bool(self._workers)

    def listen(self) -> None:
        """Somebody has begun to wait: silence is counted from now."""
        self._heard = time.monotonic()

    def wake(self) -> None:
        """Put as many connections to work as there are slices for."""
        limit = 1 if self._whole_only else self._connections
        # Those that have just been started have not claimed yet, but each will take this much at least.
        worth = -(-self._assembly.unclaimed // MIN_SLICE)
        while not self._stopped and len(self._workers) < min(limit, worth) and self._choose(self._rate) is not None:
            task = asyncio.get_running_loop().create_task(self._work(), name=f"fetch {self._name}")
            self._workers.add(task)
            task.add_done_callback(self._workers.discard)

    async def stop(self) -> None:
        """End all connections; what they have delivered stays."""
        self._stopped = True
        workers = list(self._workers)
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def take(self, stream: DataStream) -> None:
        """Take in the first response, whose bytes nobody else has claimed."""
        taken = Slice(stream.start, stream.stop)
        self._whole_only = stream.whole
        if taken.start < taken.stop:
            self._assembly.claim(taken.start, taken.stop)
        try:
            await self._receive(stream)
        except UpstreamError as error:
            self._note(error)
        finally:
            self._assembly.release(taken.start, taken.stop)
            self.wake()

    async def _work(self) -> None:
        # On loops that run tasks eagerly `wake` must count this one before it claims.
        await asyncio.sleep(0)
        try:
            while not self._stopped and self._choose(self._rate) is not None:
                try:
                    await self._fetch_one()
                except UpstreamError as error:
                    self._note(error)
                    delay = min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(self._failures, 10))
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter
        except StoreError as error:
            self._fail(error)

    async def _fetch_one(self) -> None:
        source = await self._supply.source()
        async with self._supply.slot(source):
            taken = self._choose(self._rate)
            if taken is None or self._stopped:
                return
            self._assembly.claim(taken.start, taken.stop)
            try:
                stream = await self._supply.open(source, taken.start, taken.stop, length=self._assembly.size)
                with contextlib.closing(stream):
                    self._whole_only = self._whole_only or stream.whole
                    await self._receive(stream)
            finally:
                self._assembly.release(taken.start, taken.stop)

    async def _receive(self, stream: DataStream) -> None:
        """Hand on the stream's bytes, but those that are here already (of a response longer than was asked for)."""
        offset = stream.start
        began = time.monotonic()
        try:
            async for data in stream.batches():
                self._counters.upstream_bytes += len(data)
                self.fetched += len(data)
                view = memoryview(data)
                for start, stop in list(self._assembly.present.missing(offset, offset + len(data))):
                    await self._accept(start, view[start - offset : stop - offset])
                offset += len(data)
                self._heard = time.monotonic()
                self._failures = 0
        finally:
            if offset > stream.start:
                await self._finish(stream.start, offset)
        elapsed = time.monotonic() - began
        if elapsed > 0 and stream.stop - stream.start >= MIN_SLICE:
            rate = (stream.stop - stream.start) / elapsed
            self._rate = rate if self._rate is None else self._rate + RATE_WEIGHT * (rate - self._rate)

    def _note(self, error: UpstreamError) -> None:
        """Count a failure; give up when nothing speaks for another try."""
        self._failures += 1
        self._counters.retries += 1
        silent = time.monotonic() - self._heard
        _log.info("recording %s: %s; trying again (%.1f s without a byte)", self._name, error, silent)
        if silent > GIVE_UP_S or (isinstance(error, UnexpectedResponse) and self._failures > MAX_UNEXPECTED):
            self._fail(error)
