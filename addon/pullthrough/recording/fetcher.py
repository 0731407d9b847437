"""Fetch the slices of one blob over several connections, as its plan says, and handle their failures.

Invariant: a slice is claimed before it is requested, and released however its fetch ends. Failures are retried with
back-off while there is progress; after a long silence the fetch fails, and `run` raises the error.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Final

from pullthrough.core.errors import StoreError, UpstreamError, UpstreamTimeout, ValidatorChanged
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.recording.plan import Attempt, Plan
from pullthrough.recording.retry_policy import Backoff
from pullthrough.recording.slicing import Slice
from pullthrough.recording.states import Got, Ranges
from pullthrough.runtime.clock import steady
from pullthrough.upstream.data_client import PIECE
from pullthrough.upstream.data_stream import BATCH, DataStream

_log = logging.getLogger(__name__)

YIELD_S: Final = 0.5
"""How long a connection that was too slow leaves its slice to the others."""


class Fetcher:
    """The connections of one recording."""

    def __init__(self, name: str, plan: Plan, blob_source: BlobSource, blob_writer: BlobWriter) -> None:
        """`blob_writer` writes the bytes; `name` is for the log."""
        self._name = name
        self._plan = plan
        self._blob_source = blob_source
        self._blob_writer = blob_writer
        self._workers: set[asyncio.Task[None]] = set()
        self._scopes: dict[Attempt, asyncio.Timeout] = {}
        self._changed = asyncio.Event()
        """Set when `plan.ranges` may have changed, or an attempt or a connection has ended."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def busy(self) -> bool:
        """Whether a connection is at work."""
        return bool(self._workers)

    async def run(self) -> None:
        """Wait until fetching fails for good. Raises the error."""
        await self._failure

    def wake(self) -> None:
        """Start as many connections as there are slices for, within the limit."""
        while self._plan.wants_another(len(self._workers), steady()):
            task = asyncio.get_running_loop().create_task(self._work(), name=f"fetch {self._name}")
            self._workers.add(task)
            task.add_done_callback(self._end_work)

    def _end_work(self, task: asyncio.Task[None]) -> None:
        self._workers.discard(task)
        self._changed.set()
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)  # a bug of ours: nobody would bring the bytes that readers wait for

    def rescue(self, position: int) -> None:
        """End the silent connections that have claimed the byte at `position`, for which a reader waits."""
        for attempt in self._plan.overdue(position, steady()):
            self._plan.give_up(attempt)
            self._end_attempt(attempt)

    def drop(self) -> None:
        """End all current fetches without counting failures; bytes that have come stay."""
        for attempt in self._plan.attempts:
            attempt.is_dropped = True
            self._end_attempt(attempt)

    async def stop(self) -> None:
        """End all connections; what they have delivered stays."""
        self._plan.is_over = True
        workers = list(self._workers)
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def take(self, stream: DataStream) -> None:
        """Receive the first response, whose bytes no other connection has claimed."""
        got = _got(stream)
        claimed = self._plan.first_claim(stream.start, stream.stop, got)
        try:
            await self._attempt(claimed, lambda attempt: self._receive(stream, attempt, got))
        except UpstreamError as error:
            self._note(error)
        finally:
            self.wake()

    async def _work(self) -> None:
        # On loops that run tasks eagerly `wake` must count this one before it claims.
        await asyncio.sleep(0)
        backoff = Backoff()
        try:
            while self._plan.next(steady()) is not None:
                try:
                    await asyncio.sleep(self._plan.quiet_s(steady()))
                    await self._fetch_one()
                except ValidatorChanged as error:
                    await self._change_version(error)
                except UpstreamError as error:
                    self._note(error)
                    pause_s = backoff.fail(self._plan.heard, steady())
                    if isinstance(error, UpstreamTimeout) and self._plan.attempts:
                        # One that brings bytes now gets on better than a new connection.
                        pause_s = max(pause_s, YIELD_S)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter
        except StoreError as error:
            self._fail(error)

    async def _fetch_one(self) -> None:
        source = await self._blob_source.source()
        self._plan.host = source.host
        async with self._blob_source.slot(source):
            claimed = self._plan.next(steady())
            if claimed is None:
                return

            async def fetch(attempt: Attempt) -> None:
                size = self._plan.assembly.size
                stream = await self._blob_source.open(source, claimed.start, claimed.stop, length=size)
                self._plan.show_start(steady() - attempt.pace.began)
                with contextlib.closing(stream):
                    await self._receive(stream, attempt, _got(stream))

            try:
                await self._attempt(claimed, fetch)
            except UpstreamError as error:
                self._blob_source.failed(source, error, silent_s=steady() - self._plan.heard)
                raise

    async def _attempt(self, claimed: Slice, work: Callable[[Attempt], Awaitable[None]]) -> None:
        """Do `work` for a slice, and release it. Raises UpstreamTimeout if another connection is to take over."""
        attempt = self._plan.begin(claimed, steady())
        scope = self._scopes[attempt] = asyncio.timeout(None)
        try:
            async with scope:
                await work(attempt)
        except TimeoutError:
            if attempt.is_dropped:
                return
            silent = steady() - attempt.pace.heard
            raise UpstreamTimeout(f"too slow, no byte for {silent:.1f} s; another connection takes over") from None
        finally:
            self._plan.end(attempt)
            del self._scopes[attempt]
            self._changed.set()

    def _end_attempt(self, attempt: Attempt) -> None:
        """Make the attempt end with TimeoutError."""
        with contextlib.suppress(RuntimeError):  # it is ending already
            self._scopes[attempt].reschedule(asyncio.get_running_loop().time())

    async def _receive(self, stream: DataStream, attempt: Attempt, got: Got) -> None:
        """Write the stream's bytes, if they are of use."""
        is_of_use = self._plan.answer(attempt, stream.start, stream.stop, got)
        self._changed.set()
        self.wake()
        if not is_of_use:
            return
        began = steady()
        try:
            if got is Got.PART:
                await self._pour(stream, attempt)
            else:
                await self._sift(stream, attempt)
        finally:
            is_marked = got is Got.PART and attempt.position == stream.stop
            if attempt.position > stream.start and not is_marked:
                await self._blob_writer.mark(stream.start, attempt.position)
            host = stream.source.host if stream.source is not None else None
            now = steady()
            self._plan.show_rate(host, attempt.position - stream.start, now - began, now)

    async def _pour(self, stream: DataStream, attempt: Attempt) -> None:
        """Write the claimed range in a thread: no other connection brings its bytes."""
        loop = asyncio.get_running_loop()
        waits = self._plan.is_limited

        def write(offset: int, data: memoryview) -> None:
            self._blob_writer.put(offset, data)
            if offset + len(data) == stream.stop:
                self._blob_writer.mark_put(stream.start, stream.stop)
            told: Future[float] | None = Future() if waits else None
            loop.call_soon_threadsafe(self._note_landed, stream, attempt, offset, offset + len(data), told)
            if told is not None:
                stream.pause(told.result())

        await stream.pour(write, BATCH if waits else PIECE)

    def _note_landed(
        self, stream: DataStream, attempt: Attempt, start: int, stop: int, told: "Future[float] | None"
    ) -> None:
        attempt.position = stop
        self._blob_writer.landed(start, stop)
        pause = self._plan.come(attempt, stop - start, steady(), near=stream.near)
        if told is not None:
            told.set_result(pause)

    async def _sift(self, stream: DataStream, attempt: Attempt) -> None:
        """Write the bytes of a response that are not here yet: it is longer than the claim.

        While another connection finds out whether the source serves ranges, nothing is read beyond the claim.
        """
        plan = self._plan
        async for data in stream.batches():
            rest = memoryview(data)
            while rest and attempt.position < plan.reach(attempt):
                view = rest[: plan.reach(attempt) - attempt.position]
                rest = rest[len(view) :]
                await self._write_missing(attempt.position, view)
                attempt.position += len(view)
                if attempt.position == plan.reach(attempt) < attempt.stop:
                    await self._find_out()
            pause = plan.come(attempt, len(data), steady(), near=stream.near)
            if attempt.position == plan.reach(attempt) < attempt.stop:
                break
            if pause:
                await asyncio.sleep(pause)

    async def _write_missing(self, offset: int, data: memoryview) -> None:
        """Write those bytes of the data, which begins at `offset`, that are not here."""
        position = offset
        while (gap := self._plan.unwritten(position, offset + len(data))) is not None:
            start, position = gap
            self._plan.write(start, position)
            try:
                await self._blob_writer.write(start, data[start - offset : position - offset])
            finally:
                self._plan.written(start, position)

    async def _find_out(self) -> None:
        """Wait until it is known whether the source serves ranges, or until no connection is finding out."""
        await self._until(lambda: self._plan.ranges is not Ranges.UNKNOWN or not self._workers)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    async def _change_version(self, error: ValidatorChanged) -> None:
        """Begin again with the source's new version, once every other attempt has ended."""
        if self._plan.is_held or self._plan.is_over:
            return
        if not self._plan.restart():
            self._fail(error)
            return
        _log.warning("recording %s: %s; beginning again", self._name, error)
        for attempt in self._scopes:
            self._end_attempt(attempt)
        await self._until(lambda: not self._scopes)
        await self._blob_writer.begin_again()
        self._blob_source.expect(error.validator)
        self._plan.is_held = False
        self.wake()

    def _note(self, error: UpstreamError) -> None:
        """Count a failure; give up if another try would be in vain."""
        now = steady()
        silent = now - self._plan.heard
        _log.info("recording %s: %s; trying again (%.1f s without a byte)", self._name, error, silent)
        if self._plan.fail(error, now):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Stop requesting slices, and make `run` raise the error."""
        self._plan.is_over = True
        if not self._failure.done():
            self._failure.set_exception(error)


def _got(stream: DataStream) -> Got:
    if not stream.whole:
        return Got.PART
    return Got.WHOLE if stream.ranged else Got.UNASKED
