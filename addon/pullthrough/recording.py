"""One blob being recorded: its connections, its readers, its hash, its end.

Invariant: no byte is fetched by two connections at once, and nothing is published before all of it was hashed.
Readers wait for bytes, never for a leader: a client that leaves changes nothing for others. A failure is absorbed
while it can be; then readers get what is present and the error. Knows neither requests nor policy: who may read was
decided before.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from pullthrough import platform
from pullthrough.assembly import Assembly
from pullthrough.digest import Digest
from pullthrough.errors import (
    CacheError,
    DigestMismatch,
    SourceExpired,
    StoreError,
    UnexpectedResponse,
    UpstreamError,
    UpstreamUnreachable,
)
from pullthrough.ingest import Ingest, SharedFile
from pullthrough.scheduler import FIRST_SLICE, Demand, Slice, next_slice
from pullthrough.settings import Finish
from pullthrough.store import Store
from pullthrough.threads import Threads
from pullthrough.upstream import DataStream, Source, Upstream

_log = logging.getLogger(__name__)

HASH_PIECE: Final = 4 << 20
FLUSH_S: Final = 2.0
FLUSH_BYTES: Final = 256 << 20
IDLE_S: Final = 30.0
"""How long a recording without readers stays open: an Ollama client's probe and its parts are separate requests,
and its retries come after 1, 2, 4, 8 and 16 s (server/download.go)."""

GIVE_UP_S: Final = 60.0
"""Without one byte of progress for this long a recording fails; Ollama's own six tries take 63 s."""

BACKOFF_S: Final = 0.1
BACKOFF_LIMIT_S: Final = 5.0
RATE_WEIGHT: Final = 0.3

Obtain = Callable[[], Awaitable[Source]]


@dataclass
class Counters:
    """What the recorder has done since the start, in bytes or events."""

    upstream_bytes: int = 0
    recorded: int = 0
    mismatches: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Workroom:
    """What all recordings of a daemon share."""

    store: Store
    upstream: Upstream
    threads: Threads
    connections: int
    """Per recording."""
    finish: Finish
    counters: Counters = field(default_factory=Counters)


class Cursor:
    """One reader's place in a recording."""

    def __init__(self, recording: "Recording", start: int, stop: int) -> None:
        self.position = start
        self.stop = stop
        self.fed = time.monotonic()
        self._recording = recording
        self._file = recording.share()
        self.waiter: asyncio.Future[None] | None = None

    @property
    def descriptor(self) -> int:
        return self._file.descriptor

    async def wait(self, timeout_s: float) -> int:
        """How far bytes are present from `position`; `position` itself if none came within `timeout_s`.

        Raises what the recording failed of, once no byte is left to hand out.
        """
        assembly = self._recording.assembly
        present = assembly.present.stop_at(self.position)
        if present == self.position < self.stop:
            self._recording.check()
            self.waiter = asyncio.get_running_loop().create_future()
            self._recording.wake()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self.waiter
            self.waiter = None
            present = assembly.present.stop_at(self.position)
        return present

    def advance(self, position: int) -> None:
        """The bytes up to `position` have been handed out."""
        self.position = position
        self.fed = time.monotonic()

    def close(self) -> None:
        self._file.release()
        self._recording.detach(self)


class Recording:
    """A blob being recorded. Made and kept by `Recorder`; `ready` once its size is known."""

    assembly: Assembly

    def __init__(
        self, room: Workroom, digest: Digest, obtain: Obtain, *, on_end: Callable[["Recording"], None]
    ) -> None:
        """`obtain` asks for a source anew; `on_end` is called once, when no reader can be added any more."""
        self.digest = digest
        self.public = False
        self.obtain = obtain
        self.source: Source | None = None
        self._room = room
        self._on_end = on_end
        self._ingest: Ingest | None = None
        self._cursors: set[Cursor] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._keepers: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._grown = asyncio.Event()
        self._whole_only = False
        self._validator: str | None = None
        self._rate: float | None = None
        self._progress = time.monotonic()
        self._failures = 0
        self._error: CacheError | None = None
        self._obtaining: asyncio.Task[Source] | None = None
        self._unflushed = 0
        self._started = time.monotonic()
        self._fetched = 0
        self._idle: asyncio.TimerHandle | None = None
        self._large = asyncio.Event()
        self._closing: asyncio.Future[None] | None = None
        self.ended = False

    # --- what readers use

    async def ready(self) -> int:
        """The blob's size, once the first response or an earlier partial has told it. Raises what it failed of."""
        return await asyncio.shield(self._ready)

    def attach(self, start: int, stop: int) -> Cursor:
        """A cursor for a reader of `[start, stop)`; the recording must be ready."""
        if not self._cursors:
            # Silence is counted from when somebody began to listen.
            self._progress = time.monotonic()
        cursor = Cursor(self, start, stop)
        self._cursors.add(cursor)
        self._rest(idle=False)
        self.wake()
        return cursor

    def detach(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        if not self._cursors and not self.ended:
            self._rest(idle=True)

    def share(self) -> SharedFile:
        """The file, for one more holder. Only while the recording has not ended."""
        assert self._ingest is not None and self._ingest.file is not None
        return self._ingest.file.acquire()

    def check(self) -> None:
        """Raise what the recording has failed of, if it has."""
        if self._error is not None:
            raise self._error

    @property
    def wanted_whole(self) -> bool:
        """Whether bytes that no reader asks for are fetched too."""
        if self._cursors:
            return True
        match self._room.finish:
            case Finish.ALWAYS:
                return True
            case Finish.NEVER:
                return False
            case Finish.AUTO:
                return self.assembly.present.size * 2 >= self.assembly.size

    # --- starting

    def start(self, source: Source | None, stream: DataStream | None, *, after: "Recording | None" = None) -> None:
        """Begin: from an earlier partial, from `stream` (adopted), or by a first request to `source`.

        `after` is a recording of the same digest that has ended but may not have let go of its files.
        """
        self.source = source
        self._keep(self._begin(stream, after), "begin")

    async def _begin(self, stream: DataStream | None, after: "Recording | None") -> None:
        try:
            if after is not None:
                await after.closed()
            ingest = self._room.store.ingest(self.digest)
            found = await self._room.threads.disk(ingest.resume)
            if found is not None:
                self._ingest = ingest
                self.assembly = Assembly(*found)
                self._opened()
            else:
                await self._discover(ingest, stream)
                stream = None
        except (CacheError, OSError) as error:
            self._fail(error if isinstance(error, CacheError) else StoreError(f"recording {self.digest}: {error}"))
        finally:
            if stream is not None:
                stream.close()

    async def _discover(self, ingest: Ingest, stream: DataStream | None) -> None:
        """The first response tells the size; its bytes are the first slice."""
        if stream is None:
            stream = await self._first_stream()
        with contextlib.closing(stream):
            await self._room.threads.disk(ingest.begin, stream.length)
            self._ingest = ingest
            self._validator = stream.validator
            self._whole_only = stream.whole and stream.length > FIRST_SLICE
            self.assembly = Assembly(stream.length)
            taken = Slice(stream.start, stream.stop)
            if taken.start < taken.stop:
                self.assembly.claim(taken.start, taken.stop)
            self._opened()
            try:
                await self._receive(stream, taken)
            except UpstreamError as error:
                self._failed_once(error)
            finally:
                if taken.start < taken.stop:
                    self.assembly.release(taken.start, taken.stop)
        self.wake()

    async def _first_stream(self) -> DataStream:
        # Before the size is known no client has been answered yet: two tries fit into the control plane's deadline.
        for attempt in (0, 1):
            source = await self._get_source()
            try:
                return await self._room.upstream.open_range(
                    source, 0, FIRST_SLICE, expected_length=None, validator=None
                )
            except UpstreamError as error:
                if attempt or not isinstance(error, (SourceExpired, UpstreamUnreachable)):
                    raise
                self._forget_source(source)
        raise AssertionError("unreachable")

    def _opened(self) -> None:
        if not self._ready.done():
            self._ready.set_result(self.assembly.size)
        self._keep(self._hash(), "hash")
        self._keep(self._flush_at_intervals(), "flush")
        self._rest(idle=not self._cursors)
        self.wake()

    # --- fetching

    def wake(self) -> None:
        """Put free connections to work."""
        if self.ended or self._error is not None or not self._ready.done():
            return
        limit = 1 if self._whole_only else self._room.connections
        while len(self._workers) < limit and self._next() is not None:
            task = asyncio.get_running_loop().create_task(self._work(), name=f"fetch {self.digest.short}")
            if task.done():
                break
            self._workers.add(task)
            task.add_done_callback(self._workers.discard)
            if len(self._workers) > self.assembly.unclaimed // FIRST_SLICE:
                # Small rests are not worth a connection each.
                break

    def _next(self) -> Slice | None:
        demands = [Demand(cursor.position, cursor.stop, cursor.fed) for cursor in self._cursors]
        return next_slice(
            self.assembly,
            demands,
            rate=self._rate,
            connections=self._room.connections,
            complete=self.wanted_whole,
            now=time.monotonic(),
        )

    async def _work(self) -> None:
        # A worker starts on the loop's next turn, so that `wake` has counted it before it claims.
        await asyncio.sleep(0)
        while not self.ended and self._error is None and self._next() is not None:
            try:
                source = await self._get_source()
                async with self._room.upstream.slot(source):
                    taken = self._next()
                    if taken is None or self.ended:
                        return
                    if self._whole_only:
                        taken = Slice(*(self.assembly.next_free(0, self.assembly.size) or (0, 0)))
                    self.assembly.claim(taken.start, taken.stop)
                    try:
                        await self._fetch(source, taken)
                    finally:
                        self.assembly.release(taken.start, taken.stop)
            except SourceExpired as error:
                self._forget_source(source)
                await self._pause(error)
            except UpstreamError as error:
                await self._pause(error)
            except StoreError as error:
                self._fail(error)
                return

    async def _fetch(self, source: Source, taken: Slice) -> None:
        stream = await self._room.upstream.open_range(
            source,
            taken.start,
            taken.stop,
            expected_length=self.assembly.size,
            validator=self._validator,
        )
        with contextlib.closing(stream):
            self._validator = self._validator or stream.validator
            if stream.whole and (stream.start, stream.stop) != (taken.start, taken.stop):
                self._whole_only = True
            await self._receive(stream, taken)

    async def _receive(self, stream: DataStream, taken: Slice) -> None:
        """Write the stream's bytes; those that are here already are passed over."""
        assert self._ingest is not None
        offset = stream.start
        began = time.monotonic()
        try:
            async for data in stream.batches():
                stop = offset + len(data)
                self._room.counters.upstream_bytes += len(data)
                self._fetched += len(data)
                view = memoryview(data)
                for gap in list(self.assembly.present.missing(offset, stop)):
                    piece = view[gap[0] - offset : gap[1] - offset]
                    await self._room.threads.disk(self._ingest.write_at, gap[0], piece)
                    self._arrived(*gap)
                offset = stop
        finally:
            written = [
                interval
                for interval in _clip(self.assembly, taken.start, max(offset, taken.start))
                if interval[0] < interval[1]
            ]
            if written and self._ingest is not None:
                await self._room.threads.disk(self._ingest.mark, written)
        elapsed = time.monotonic() - began
        if elapsed > 0 and stream.stop - stream.start >= FIRST_SLICE // 8:
            rate = (stream.stop - stream.start) / elapsed
            self._rate = rate if self._rate is None else self._rate + RATE_WEIGHT * (rate - self._rate)

    def _arrived(self, start: int, stop: int) -> None:
        self.assembly.add(start, stop)
        self._progress = time.monotonic()
        self._failures = 0
        self._unflushed += stop - start
        self._grown.set()
        if self._unflushed >= FLUSH_BYTES:
            self._large.set()
        for cursor in self._cursors:
            if cursor.waiter is not None and not cursor.waiter.done() and start <= cursor.position < stop:
                cursor.waiter.set_result(None)

    async def _pause(self, error: UpstreamError) -> None:
        self._failed_once(error)
        delay = min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(self._failures, 10))
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311  # jitter

    def _failed_once(self, error: UpstreamError) -> None:
        self._failures += 1
        self._room.counters.retries += 1
        silent = time.monotonic() - self._progress
        _log.info("recording %s: %s; trying again (%.0f s without a byte)", self.digest.short, error, silent)
        if isinstance(error, UnexpectedResponse) and self._failures > 20:
            self._fail(error)
        elif silent > GIVE_UP_S:
            self._fail(error)

    # --- the source

    async def _get_source(self) -> Source:
        """The source, obtained once for all workers that miss it."""
        if self.source is not None:
            return self.source
        if self._obtaining is None:
            self._obtaining = asyncio.get_running_loop().create_task(self._obtain(), name="obtain source")
        return await asyncio.shield(self._obtaining)

    async def _obtain(self) -> Source:
        try:
            self.source = await self.obtain()
            return self.source
        finally:
            self._obtaining = None

    def _forget_source(self, source: Source) -> None:
        if self.source is source:
            self.source = None

    def offer(self, source: Source) -> None:
        """A client has just got this source from the registry: use it if ours is gone."""
        if self.source is None:
            self.source = source

    # --- hashing, flushing, committing

    async def _hash(self) -> None:
        assert self._ingest is not None and self._ingest.file is not None
        hasher = hashlib.sha256()
        descriptor, assembly = self._ingest.file.descriptor, self.assembly

        def update(offset: int, size: int) -> int:
            data = platform.read_at(descriptor, offset, size)
            hasher.update(data)
            return len(data)

        while assembly.hashed < assembly.size:
            size = min(HASH_PIECE, assembly.frontier - assembly.hashed)
            if size == 0:
                self._grown.clear()
                await self._grown.wait()
                continue
            count = await self._room.threads.hashing(update, assembly.hashed, size)
            if count == 0:
                self._fail(StoreError(f"recording {self.digest}: expected {assembly.size} bytes on disk, got fewer"))
                return
            assembly.hashed += count
        await self._commit(hasher.hexdigest())

    async def _flush_at_intervals(self) -> None:
        assert self._ingest is not None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._large.wait()
            self._large.clear()
            if self._unflushed:
                self._unflushed = 0
                await self._room.threads.disk(self._ingest.flush, self.assembly.present.copy())

    async def _commit(self, actual: str) -> None:
        """Every byte is here and hashed: publish, or put away."""
        assert self._ingest is not None
        store, ingest = self._room.store, self._ingest
        began = time.monotonic()
        try:
            if actual != self.digest.hex:
                raise DigestMismatch(str(self.digest), f"sha256:{actual}")
            await self._room.threads.disk(ingest.sync)
            synced = time.monotonic()
            await self._room.threads.disk(lambda: store.publish(ingest, public=self.public, now=time.time()))
        except DigestMismatch as error:
            self._room.counters.mismatches += 1
            path = await self._room.threads.disk(store.quarantine, ingest)
            _log.error("%s: quarantined as %s", error, path.name)
            self._fail(error)
        except StoreError as error:
            self._fail(error)
        else:
            self._room.counters.recorded += 1
            _log.info(
                "recorded %s: %d bytes in %.1f s, fetched %d (%.3f x); commit %.3f s, of it fsync %.3f s",
                self.digest.short,
                self.assembly.size,
                time.monotonic() - self._started,
                self._fetched,
                self._fetched / self.assembly.size if self.assembly.size else 1.0,
                time.monotonic() - began,
                synced - began,
            )
            self._end()

    # --- ending

    def _rest(self, *, idle: bool) -> None:
        """Start or stop the clock that closes a recording nobody reads."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if idle and not self.ended:
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._idle_over)
            self.wake()

    def _idle_over(self) -> None:
        self._idle = None
        if self._cursors or self.ended:
            return
        if self._workers or (self.assembly.complete and self._error is None):
            self._rest(idle=True)
        else:
            _log.info(
                "recording %s: left by all clients with %d of %d bytes; kept",
                self.digest.short,
                self.assembly.present.size,
                self.assembly.size,
            )
            self._end()

    def _fail(self, error: CacheError) -> None:
        """Readers get what is present and then this error; the partial stays for the next recording."""
        if self._error is not None or self.ended:
            return
        self._error = error
        _log.warning("recording %s failed: %s", self.digest.short, error)
        if not self._ready.done():
            self._ready.set_exception(error)
            # Nobody may be waiting: then the failure has been logged, which is all there is to do.
            self._ready.exception()
        self._end()

    def _end(self) -> None:
        if self.ended:
            return
        self.ended = True
        self._on_end(self)
        if self._idle is not None:
            self._idle.cancel()
        for cursor in self._cursors:
            if cursor.waiter is not None and not cursor.waiter.done():
                cursor.waiter.set_result(None)
        self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        """Stop every task of the recording, then let go of its files."""
        tasks = self._workers | self._keepers
        current = asyncio.current_task()
        for task in tasks:
            if task is not current:
                task.cancel()
        if self._obtaining is not None:
            self._obtaining.cancel()
        await asyncio.gather(*(task for task in tasks if task is not current), return_exceptions=True)
        if self._ingest is not None:
            await self._room.threads.disk(self._ingest.close)

    async def closed(self) -> None:
        """Wait until an ended recording has let go of its files."""
        if self._closing is not None:
            await asyncio.wait([self._closing])

    async def stop(self) -> None:
        """End now and keep the partial: the daemon is going down."""
        if not self.ended:
            self._error = self._error or UpstreamUnreachable("the cache is shutting down")
            if not self._ready.done():
                self._ready.set_exception(self._error)
                self._ready.exception()
            if self._ingest is not None and self._ingest.file is not None and not self.assembly.complete:
                with contextlib.suppress(StoreError):
                    await self._room.threads.disk(self._ingest.flush, self.assembly.present.copy())
            self._end()
        await self.closed()

    def _keep(self, work: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(self._guard(work))
        task.set_name(f"{name} {self.digest.short}")
        if not task.done():
            self._keepers.add(task)
            task.add_done_callback(self._keepers.discard)

    async def _guard(self, work: Awaitable[None]) -> None:
        try:
            await work
        except CacheError as error:
            self._fail(error)


def _clip(assembly: Assembly, start: int, stop: int) -> list[tuple[int, int]]:
    """What is present of `[start, stop)`."""
    result = []
    for gap_start, gap_stop in [*assembly.present.missing(start, stop), (stop, stop)]:
        result.append((start, gap_start))
        start = gap_stop
    return result
