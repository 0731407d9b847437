"""Fetch the slices of one blob over several connections, and absorb what goes wrong with them.

Invariant: a slice is claimed before it is asked for and released however its fetch ends, so no byte is fetched by
two connections at once; a failure is retried with back-off while there is progress, and given up after a silence.
Knows neither readers nor files: it is told what to fetch next and hands bytes on.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pullthrough.assembly import Assembly
from pullthrough.clock import steady
from pullthrough.datastream import DataStream
from pullthrough.errors import (
    CacheError,
    StoreError,
    UnexpectedResponse,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    ValidatorChanged,
)
from pullthrough.intervals import Intervals
from pullthrough.scheduler import MAX_SLICE, MIN_SLICE, Slice
from pullthrough.supply import Supply

_log = logging.getLogger(__name__)

GIVE_UP_S: Final = 60.0
"""Without one byte of progress for this long a recording fails; Ollama's own six tries take 63 s."""

SILENT_S: Final = 3.0
"""A connection that has brought no byte for this long while a reader waits for its slice loses the slice to another
one: clients of v0.1.23-v0.5.7 wait 5 s. Doubled by each failure in a row, up to eightfold: the line may be slow."""

MAX_UNEXPECTED: Final = 20
"""Wrong answers in a row: a source that lies does not get better by asking."""

MAX_RESTARTS: Final = 3
"""Changes of version: then the source cannot make up its mind."""

BACKOFF_S: Final = 0.1
BACKOFF_LIMIT_S: Final = 2.0
RETRY_AFTER_LIMIT_S: Final = 10.0
"""Clients wait 30 s for a byte: upstream's wish for peace is granted up to a third of it."""

RATE_WEIGHT: Final = 0.3


class Ending(StrEnum):
    """How a recording ends."""

    STORED = "stored"
    FAILED = "failed"
    LEFT = "left"
    """By all clients."""
    UNKEPT = "unkept"
    """For want of room."""


@dataclass
class Counters:
    """What recordings have done since the start of the daemon."""

    upstream_bytes: int = 0
    near_bytes: int = 0
    """From the fleet's own sources."""
    retries: int = 0
    mismatches: int = 0
    restarts: int = 0
    ended: Counter[Ending] = field(default_factory=Counter)

    def take(self, stream: DataStream, count: int) -> None:
        """So many bytes of the stream have come."""
        if stream.near:
            self.near_bytes += count
        else:
            self.upstream_bytes += count


@dataclass(eq=False)
class _Attempt:
    """One connection at work on one slice."""

    extent: Slice
    whole: bool = False
    heard: float = field(default_factory=steady)
    scope: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    over: asyncio.Event = field(default_factory=asyncio.Event)
    is_dropped: bool = False
    """Nobody wants it any more."""

    def stop(self) -> None:
        """Let it end with TimeoutError."""
        with contextlib.suppress(RuntimeError):  # it is just ending
            self.scope.reschedule(asyncio.get_running_loop().time())


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
        spend: Callable[[int], float],
        begin_again: Callable[[], Awaitable[None]],
        fail: Callable[[CacheError], None],
    ) -> None:
        """`choose` names the next slice for a connection that delivers so many bytes/s; `accept` writes bytes at an
        offset and adds them to the assembly; `finish` is told the interval that one response has delivered; `spend`
        says how long to wait before reading more after so many bytes; `begin_again` empties the assembly.
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
        self._spend = spend
        self._begin_again = begin_again
        self._fail = fail
        self._workers: set[asyncio.Task[None]] = set()
        self._attempts: set[_Attempt] = set()
        self._rate: float | None = None
        self._whole_only = False
        self._untried = False
        """Whether the source knows Range is not known: one connection is to find out."""
        self._tried = asyncio.Event()
        """Set when that may have changed, or the connection is no more."""
        self._failures = 0
        self._restarts = 0
        self._heard = steady()
        self._quiet_until = 0.0
        self._landing = Intervals()
        self._held = False
        """Nothing new is asked for: the recording has ended, or is being begun again."""

    @property
    def busy(self) -> bool:
        return bool(self._workers)

    def listen(self) -> None:
        """Somebody has begun to wait: silence is counted from now."""
        self._heard = steady()

    def wake(self) -> None:
        """Put as many connections to work as there are slices for."""
        limit = 1 if self._whole_only or self._untried else self._connections
        # Those that have just been started have not claimed yet, but each will take this much at least.
        worth = -(-self._assembly.unclaimed // MIN_SLICE)
        while len(self._workers) < min(limit, worth) and self._wanted():
            task = asyncio.get_running_loop().create_task(self._work(), name=f"fetch {self._name}")
            self._workers.add(task)
            task.add_done_callback(self._end_work)

    def _end_work(self, task: asyncio.Task[None]) -> None:
        self._workers.discard(task)
        self._tried.set()

    def rescue(self, position: int) -> None:
        """A reader waits for the byte at `position`: a silent connection that has it claimed loses it."""
        silent_s = SILENT_S * 2 ** min(self._failures, 3)
        for attempt in self._attempts:
            if attempt.extent.start <= position < attempt.extent.stop and steady() - attempt.heard >= silent_s:
                attempt.stop()

    def drop(self) -> None:
        """End what is being fetched now, which is no failure; what has come stays."""
        for attempt in self._attempts:
            attempt.is_dropped = True
            attempt.stop()

    async def stop(self) -> None:
        """End all connections; what they have delivered stays."""
        self._held = True
        workers = list(self._workers)
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def take(self, stream: DataStream) -> None:
        """Take in the first response, whose bytes nobody else has claimed.

        One that was asked for without Range says nothing of whether the source knows it. So it counts as a slice,
        while another connection tries; where that gets the whole too, this one goes on.
        """
        limit = None if stream.ranged or stream.stop <= MAX_SLICE else MAX_SLICE
        self._untried = limit is not None
        taken = Slice(stream.start, limit or stream.stop)
        if taken.start < taken.stop:
            self._assembly.claim(taken.start, taken.stop)
        try:
            await self._attempt(taken, lambda attempt: self._receive(stream, attempt, limit))
        except UpstreamError as error:
            self._note(error)
        finally:
            self.wake()

    def _wanted(self) -> bool:
        """Whether a connection should go to work now."""
        served_whole = self._whole_only and any(attempt.whole for attempt in self._attempts)
        return not self._held and not served_whole and self._choose(self._rate) is not None

    async def _work(self) -> None:
        # On loops that run tasks eagerly `wake` must count this one before it claims.
        await asyncio.sleep(0)
        tries, failed_at = 0, 0.0
        try:
            while self._wanted():
                try:
                    await asyncio.sleep(max(0.0, self._quiet_until - steady()))
                    await self._fetch_one()
                except ValidatorChanged as error:
                    await self._change_version(error)
                except UpstreamError as error:
                    self._note(error)
                    tries = 1 if self._heard > failed_at else tries + 1
                    failed_at = steady()
                    delay = min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(tries - 1, 10))
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter
        except StoreError as error:
            self._fail(error)

    async def _fetch_one(self) -> None:
        source = await self._supply.source()
        async with self._supply.slot(source):
            taken = self._choose(self._rate) if self._wanted() else None
            if taken is None:
                return
            self._assembly.claim(taken.start, taken.stop)

            async def fetch(attempt: _Attempt) -> None:
                stream = await self._supply.open(source, taken.start, taken.stop, length=self._assembly.size)
                with contextlib.closing(stream):
                    if stream.whole:
                        self._whole_only = True
                        self._tried.set()
                        if any(other.whole for other in self._attempts):
                            return
                    elif self._untried:
                        self._untried = False
                        self._tried.set()
                        self.wake()
                    await self._receive(stream, attempt)

            try:
                await self._attempt(taken, fetch)
            except UpstreamError as error:
                self._supply.failed(source, error, silent_s=steady() - self._heard)
                raise

    async def _attempt(self, taken: Slice, work: Callable[[_Attempt], Awaitable[None]]) -> None:
        """Do `work` for the claimed slice and release it. UpstreamTimeout if another connection is to do it."""
        generation = self._assembly.generation
        attempt = _Attempt(taken)
        self._attempts.add(attempt)
        try:
            async with attempt.scope:
                await work(attempt)
        except TimeoutError:
            if attempt.is_dropped:
                return
            silent = steady() - attempt.heard
            raise UpstreamTimeout(f"no byte for {silent:.1f} s; another connection takes over") from None
        finally:
            self._attempts.discard(attempt)
            if self._assembly.generation == generation:
                self._assembly.release(taken.start, taken.stop)
            attempt.over.set()

    async def _receive(self, stream: DataStream, attempt: _Attempt, limit: int | None = None) -> None:
        """Hand on the stream's bytes, but those that are here already (of a response longer than was asked for).

        Up to `limit`, unless this turns out to be the one connection that the source is good for: while another one is
        finding out, nothing is read beyond.
        """
        attempt.whole = stream.whole
        attempt.extent = Slice(stream.start, limit or stream.stop)
        self._whole_only = self._whole_only or (stream.whole and limit is None)
        offset = stream.start
        began = steady()
        try:
            async for data in stream.batches():
                self._counters.take(stream, len(data))
                self.fetched += len(data)
                rest = memoryview(data)
                while rest:
                    if limit is not None and self._whole_only:
                        limit, attempt.extent = None, Slice(stream.start, stream.stop)
                    view = rest[: None if limit is None else limit - offset]
                    rest, position = rest[len(view) :], offset
                    while (gap := self._free_to_write(position, offset + len(view))) is not None:
                        start, position = gap
                        self._landing.add(start, position)
                        try:
                            await self._accept(start, view[start - offset : position - offset])
                        finally:
                            self._landing.remove(start, position)
                    offset += len(view)
                    if offset == limit:
                        await self._find_out()
                        if not self._whole_only:
                            break
                self._heard = attempt.heard = steady()
                self._failures = 0
                if offset == limit and not self._whole_only:
                    break
                if pause := self._spend(len(data)):
                    # Not silent: held back by ourselves.
                    attempt.heard += pause
                    await asyncio.sleep(pause)
        finally:
            if offset > stream.start:
                await self._finish(stream.start, offset)
        elapsed = steady() - began
        if elapsed > 0 and offset - stream.start >= MIN_SLICE:
            rate = (offset - stream.start) / elapsed
            self._rate = rate if self._rate is None else self._rate + RATE_WEIGHT * (rate - self._rate)

    async def _find_out(self) -> None:
        """Return when it is known whether the source knows Range, or when no connection is finding out."""
        while self._untried and not self._whole_only and self._workers:
            self._tried.clear()
            await self._tried.wait()

    def _free_to_write(self, start: int, stop: int) -> tuple[int, int] | None:
        """The first part of the interval that is neither present nor just being written: no byte is written twice.

        A response that is longer than was asked for may overlap with others, and may differ from them.
        """
        missing = self._assembly.present.missing(start, stop)
        return next((free for gap in missing for free in self._landing.missing(*gap)), None)

    async def _change_version(self, error: ValidatorChanged) -> None:
        """Begin again with the source's new version, once every other connection has let go."""
        if self._held:
            return
        self._restarts += 1
        self._counters.restarts += 1
        if self._restarts > MAX_RESTARTS:
            self._fail(error)
            return
        _log.warning("recording %s: %s; beginning again", self._name, error)
        self._held = True
        others = list(self._attempts)
        for attempt in others:
            attempt.stop()
        for attempt in others:
            await attempt.over.wait()
        await self._begin_again()
        self._supply.expect(error.validator)
        self._held = False
        self.wake()

    def _note(self, error: UpstreamError) -> None:
        """Count a failure; give up when nothing speaks for another try."""
        self._failures += 1
        self._counters.retries += 1
        now = steady()
        silent = now - self._heard
        if isinstance(error, UpstreamRefused):
            self._quiet_until = max(self._quiet_until, now + min(error.retry_after_s, RETRY_AFTER_LIMIT_S))
        _log.info("recording %s: %s; trying again (%.1f s without a byte)", self._name, error, silent)
        lies = isinstance(error, UnexpectedResponse) and self._failures > MAX_UNEXPECTED
        if silent > GIVE_UP_S or lies or error.discards:
            self._fail(error)
