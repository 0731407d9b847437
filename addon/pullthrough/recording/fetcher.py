"""Fetch the slices of one blob over several connections, and absorb what goes wrong with them.

Invariant: a slice is claimed before it is asked for and released however its fetch ends, so no byte is fetched by two
connections at once; a failure is retried with back-off while there is progress, and given up after a silence.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from pullthrough.core.errors import CacheError, StoreError, UpstreamError, UpstreamTimeout, ValidatorChanged
from pullthrough.core.intervals import Intervals
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.recording.counters import Counters
from pullthrough.recording.retry_policy import LEARN, RATE_WEIGHT, Pace, Patience, Ranges, Rates, backoff_s
from pullthrough.recording.slicing import MAX_SLICE, MIN_SLICE, Slice
from pullthrough.runtime.clock import steady
from pullthrough.upstream.data_client import PIECE
from pullthrough.upstream.data_stream import BATCH, DataStream, ThreadStream

_log = logging.getLogger(__name__)

MAX_RESTARTS: Final = 3
"""Changes of version: then the source cannot make up its mind."""


@dataclass(eq=False)
class _Attempt:
    """One connection at work on one slice."""

    extent: Slice
    whole: bool = False
    position: int = 0
    """Up to where its bytes are written."""
    pace: Pace = field(default_factory=lambda: Pace(steady()))
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
        blob_source: BlobSource,
        blob_writer: BlobWriter,
        counters: Counters,
        rates: Rates,
        *,
        connections: int,
        choose: Callable[[float | None], Slice | None],
        spend: Callable[[int], float] | None,
        fail: Callable[[CacheError], None],
    ) -> None:
        """`blob_writer` takes the bytes; `rates` are those of all hosts. `choose` names the next slice for a connection
        that delivers so many bytes/s; `spend`, where there is a limit, says how long to wait before reading more after
        so many bytes.
        """
        self.fetched = 0
        self._name = name
        self._assembly = assembly
        self._blob_source = blob_source
        self._counters = counters
        self._rates = rates
        self._connections = connections
        self._choose = choose
        self._blob_writer = blob_writer
        self._spend = spend
        self._fail = fail
        self._workers: set[asyncio.Task[None]] = set()
        self._attempts: set[_Attempt] = set()
        self._rate: float | None = None
        self._ranges = Ranges.YES
        self._patience = Patience(steady())
        self._tried = asyncio.Event()
        """Set when what is known of ranges may have changed, or a connection is no more."""
        self._restarts = 0
        self._landing = Intervals()
        self._held = False
        """Nothing new is asked for: the recording has ended, or is being begun again."""

    @property
    def busy(self) -> bool:
        return bool(self._workers)

    def listen(self) -> None:
        """Somebody has begun to wait: silence is counted from now."""
        self._patience.listen(steady())

    def wake(self) -> None:
        """Put as many connections to work as there are slices for."""
        limit = self._connections if self._ranges is Ranges.YES else 1
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
        usual, silent_s, now = self._usual, self._patience.silent_s, steady()
        for attempt in self._attempts:
            holds = attempt.extent.start <= position < attempt.extent.stop
            if holds and attempt.pace.is_silent(usual, silent_s, now):
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
        if limit is not None:
            self._ranges = Ranges.UNKNOWN
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
        """Return whether a connection should go to work now."""
        served_whole = self._ranges is Ranges.NO and any(attempt.whole for attempt in self._attempts)
        return not self._held and not served_whole and self._choose(self._usual) is not None

    @property
    def _usual(self) -> float | None:
        """Bytes a second of one connection; None while that is not known."""
        return self._rate or self._rates.of(self._blob_source.host, steady())

    async def _work(self) -> None:
        # On loops that run tasks eagerly `wake` must count this one before it claims.
        await asyncio.sleep(0)
        tries, failed_at = 0, 0.0
        try:
            while self._wanted():
                try:
                    await asyncio.sleep(self._patience.quiet_s(steady()))
                    await self._fetch_one()
                except ValidatorChanged as error:
                    await self._change_version(error)
                except UpstreamError as error:
                    self._note(error)
                    tries = 1 if self._patience.heard > failed_at else tries + 1
                    failed_at = steady()
                    await asyncio.sleep(backoff_s(tries) * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter
        except StoreError as error:
            self._fail(error)

    async def _fetch_one(self) -> None:
        source = await self._blob_source.source()
        async with self._blob_source.slot(source):
            taken = self._choose(self._usual) if self._wanted() else None
            if taken is None:
                return
            self._assembly.claim(taken.start, taken.stop)

            async def fetch(attempt: _Attempt) -> None:
                stream = await self._blob_source.open(source, taken.start, taken.stop, length=self._assembly.size)
                with contextlib.closing(stream):
                    before, self._ranges = self._ranges, LEARN[self._ranges, stream.whole]
                    self._tried.set()
                    if stream.whole and any(other.whole for other in self._attempts):
                        return
                    if before is Ranges.UNKNOWN:
                        self.wake()
                    await self._receive(stream, attempt)

            try:
                await self._attempt(taken, fetch)
            except UpstreamError as error:
                self._blob_source.failed(source, error, silent_s=steady() - self._patience.heard)
                raise

    async def _attempt(self, taken: Slice, work: Callable[[_Attempt], Awaitable[None]]) -> None:
        """Do `work` for the claimed slice and release it. Raises UpstreamTimeout if another connection is to do it."""
        begun = self._assembly.versions.now()
        attempt = _Attempt(taken)
        self._attempts.add(attempt)
        try:
            async with attempt.scope:
                await work(attempt)
        except TimeoutError:
            if attempt.is_dropped:
                return
            silent = steady() - attempt.pace.heard
            raise UpstreamTimeout(f"too slow, no byte for {silent:.1f} s; another connection takes over") from None
        finally:
            self._attempts.discard(attempt)
            if not begun.is_over:
                self._assembly.release(taken.start, taken.stop)
            attempt.over.set()

    async def _receive(self, stream: DataStream, attempt: _Attempt, limit: int | None = None) -> None:
        """Hand on the stream's bytes, but those that are here already (of a response longer than was asked for).

        Up to `limit`, unless this turns out to be the one connection that the source is good for: while another one is
        finding out, nothing is read beyond.
        """
        attempt.whole = stream.whole
        attempt.extent = Slice(stream.start, limit or stream.stop)
        attempt.position = stream.start
        if stream.whole and limit is None:
            self._ranges = Ranges.NO
        began = steady()
        try:
            if isinstance(stream, ThreadStream) and not stream.whole:
                await self._pour(stream, attempt)
            else:
                await self._sift(stream, attempt, limit)
        finally:
            if attempt.position > stream.start:
                await self._blob_writer.mark(stream.start, attempt.position)
            self._learn_rate(stream, attempt.position - stream.start, steady() - began)

    async def _pour(self, stream: ThreadStream, attempt: _Attempt) -> None:
        """Let a thread write what was claimed: nobody else brings it."""
        loop = asyncio.get_running_loop()
        waits = self._spend is not None

        def write(offset: int, data: memoryview) -> None:
            self._blob_writer.put(offset, data)
            told: Future[float] | None = Future() if waits else None
            loop.call_soon_threadsafe(self._note_landed, stream, attempt, offset, offset + len(data), told)
            if told is not None:
                stream.pause(told.result())

        await stream.pour(write, BATCH if waits else PIECE)

    def _note_landed(
        self, stream: DataStream, attempt: _Attempt, start: int, stop: int, told: "Future[float] | None"
    ) -> None:
        attempt.position = stop
        self._blob_writer.landed(start, stop)
        pause = self._note_progress(stream, attempt, stop - start)
        if told is not None:
            told.set_result(pause)

    def _note_progress(self, stream: DataStream, attempt: _Attempt, count: int) -> float:
        """Bytes have come; returns for how long to read no more."""
        self._counters.take(stream, count)
        self.fetched += count
        now = steady()
        self._patience.hear(now)
        attempt.pace.bring(count, now)
        pause = self._spend(count) if self._spend is not None else 0.0
        if pause:
            attempt.pace.hold_back(now + pause)  # not silent: held back by ourselves
        return pause

    async def _sift(self, stream: DataStream, attempt: _Attempt, limit: int | None) -> None:
        """Write what of a response is not here already: it is longer than what was claimed."""
        async for data in stream.batches():
            rest = memoryview(data)
            while rest:
                if limit is not None and self._ranges is Ranges.NO:
                    limit, attempt.extent = None, Slice(stream.start, stream.stop)
                view = rest[: None if limit is None else limit - attempt.position]
                rest = rest[len(view) :]
                await self._write_missing(attempt.position, view)
                attempt.position += len(view)
                if attempt.position == limit:
                    await self._find_out()
                    if self._ranges is not Ranges.NO:
                        break
            pause = self._note_progress(stream, attempt, len(data))
            if attempt.position == limit and self._ranges is not Ranges.NO:
                break
            if pause:
                await asyncio.sleep(pause)

    async def _write_missing(self, offset: int, data: memoryview) -> None:
        """Write what of the data, which begins at `offset`, is not here."""
        position = offset
        while (gap := self._free_to_write(position, offset + len(data))) is not None:
            start, position = gap
            self._landing.add(start, position)
            try:
                await self._blob_writer.write(start, data[start - offset : position - offset])
            finally:
                self._landing.remove(start, position)

    def _learn_rate(self, stream: DataStream, count: int, elapsed: float) -> None:
        """What was too slow counts as well: so a line that has become slow is not taken for slow connections."""
        if elapsed <= 0 or count < MIN_SLICE:
            return
        rate = count / elapsed
        self._rate = rate if self._rate is None else self._rate + RATE_WEIGHT * (rate - self._rate)
        if stream.source is not None:
            self._rates.show(stream.source.host, rate, steady())

    async def _find_out(self) -> None:
        """Return when it is known whether the source knows Range, or when no connection is finding out."""
        while self._ranges is Ranges.UNKNOWN and self._workers:
            self._tried.clear()
            await self._tried.wait()

    def _free_to_write(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the first part of the interval that is neither present nor just being written: no byte is written
        twice.

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
        await self._blob_writer.begin_again()
        self._blob_source.expect(error.validator)
        self._held = False
        self.wake()

    def _note(self, error: UpstreamError) -> None:
        """Count a failure; give up when nothing speaks for another try."""
        self._counters.retries += 1
        now = steady()
        silent = now - self._patience.heard
        _log.info("recording %s: %s; trying again (%.1f s without a byte)", self._name, error, silent)
        if self._patience.fail(error, now) or error.discards:
            self._fail(error)
