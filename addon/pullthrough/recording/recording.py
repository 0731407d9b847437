"""One blob being recorded: its readers, and its life from the first response to the published file.

Invariant: readers wait for bytes, never for a leader: a client that leaves changes nothing for others. When the
recording fails its readers get what is present and then the error; the partial stays for the next one.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from pullthrough.config.settings import Finish
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, DigestMismatch, StoreError, StoreUnwritable, UpstreamUnreachable
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.recording.counters import Ending
from pullthrough.recording.cursor import Cursor
from pullthrough.recording.fetcher import Fetcher
from pullthrough.recording.pulls import FAR
from pullthrough.recording.relay import Relay, Relays
from pullthrough.recording.slicing import MAX_SLICE, Demand, Slice, first_slice, next_slice
from pullthrough.recording.workroom import Workroom
from pullthrough.runtime.clock import steady
from pullthrough.runtime.shared_file import SharedFile
from pullthrough.upstream.data_stream import DataStream

_log = logging.getLogger(__name__)

IDLE_S: Final = 30.0
"""How long a recording without readers stays open: an Ollama client's probe and its parts are separate requests,
and its retries come after 1, 2, 4, 8 and 16 s (server/download.go)."""

LINGER_S: Final = 0.5
"""How long bytes under way keep coming after the last reader has gone: the next part may be asked for at once."""

UNKEPT_S: Final = 30.0
"""How long a blob that the disk had no room for is passed through before the disk is tried again."""


class Recording:
    """A blob being recorded. `assembly` is there once `ready` has returned."""

    assembly: Assembly
    _file: SharedFile
    _fetcher: Fetcher
    _blob_writer: BlobWriter

    def __init__(
        self,
        room: Workroom,
        digest: Digest,
        blob_source: BlobSource,
        *,
        on_end: Callable[["Recording"], None],
        wanted: bool = False,
        look: int = 0,
    ) -> None:
        """`on_end` is called once, when no reader can be added; `wanted` is whole even if nobody reads, else `look`."""
        self._look = MAX_SLICE if wanted else look
        self.over = asyncio.Event()
        self._wanted = wanted
        self._pulled = wanted  # somebody pulls the blob, and does not only look into it
        self.digest = digest
        self.blob_source = blob_source
        self._room = room
        self._on_end = on_end
        self._ingest = room.store.ingest(digest)
        self._cursors: set[Cursor] = set()
        self._ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self.started = time.monotonic()
        self._error: CacheError | None = None
        self._relays: Relays | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._ended = False
        self._closing: asyncio.Task[None] | None = None

    # --- readers

    async def ready(self) -> int:
        """Return the blob's size, once a response or an earlier partial has told it. Raises what it failed of."""
        return await asyncio.shield(self._ready)

    @property
    def size(self) -> int | None:
        """The blob's size, None while nothing has told it."""
        return self.assembly.size if hasattr(self, "assembly") else None

    @property
    def present(self) -> int:
        """How many of its bytes are here."""
        return self.assembly.present.size if hasattr(self, "assembly") else 0

    @property
    def readers(self) -> int:
        """How many read it now."""
        return len(self._cursors)

    def attach(self, start: int, stop: int) -> Cursor:
        """Return a cursor for a reader of `[start, stop)`. The recording must be ready; it may have ended meanwhile.

        StoreUnwritable if it cannot be written: then only `relay` has the bytes.
        """
        if isinstance(self._error, StoreUnwritable):
            raise self._error
        cursor = Cursor(self, self._file.acquire(), start, stop)
        if not self._cursors:
            self._fetcher.listen()
        self._cursors.add(cursor)
        self._watch_idleness()
        self.wake()
        return cursor

    def relay(self, start: int, stop: int) -> Relay:
        """Return the interval from upstream, past the disk."""
        if self._relays is None:
            self._relays = Relays(self.blob_source, self._room.counters, self._room.rate_limit, self.assembly.size)
        return Relay(self._relays, start, stop)

    def detach(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        self._watch_idleness()
        if not self._cursors and not self._ended:
            asyncio.get_running_loop().call_later(LINGER_S, self._stop_reading_ahead)

    def _stop_reading_ahead(self) -> None:
        """What was asked for ahead of readers that have gone is wanted by nobody."""
        if not self._cursors and not self._ended and not self._wanted_whole:
            self._fetcher.drop()

    def check(self) -> None:
        """Raise what the recording has failed of, if it has."""
        if self._error is not None:
            raise self._error

    def wake(self) -> None:
        """Put free connections to work."""
        if not self._ended and self._error is None:
            self._fetcher.wake()

    def rescue(self, position: int) -> None:
        """A reader waits for this byte: whoever should bring it and does not is relieved of it."""
        if not self._ended and self._error is None:
            self._fetcher.rescue(position)

    # --- life

    def start(self, stream: DataStream | None, *, after: "Recording | None") -> None:
        """Begin: from an earlier partial, from `stream` (a first response, ours from here on), or by asking.

        `after` is a recording of the same digest that has ended but may not have let go of its files.
        """
        self._spawn(self._begin(stream, after), "begin")

    async def _begin(self, stream: DataStream | None, after: "Recording | None") -> None:
        try:
            if after is not None:
                await after.closed()
            found = await self._room.threads.disk(self._ingest.resume, self.blob_source.permits)
            if found is not None:
                if await self._has_room(found[0]):
                    self._open(Assembly(*found))
                return
            stream = stream or await self.blob_source.open_first(self._first_slice)
            self.blob_source.expect(stream.validator)
            if await self._has_room(stream.length, self._ingest.begin):
                self._open(Assembly(stream.length))
                await self._fetcher.take(stream)
        finally:
            if stream is not None:
                stream.close()

    async def _has_room(self, size: int, begin: Callable[[int], None] | None = None) -> bool:
        """Make room for what is to come and `begin`; where that cannot be, clients are served past the disk."""
        try:
            whole = self._ingest.takes(size)
            await self._room.evictor.reserve(self.digest, whole if self._pulled else min(size, FAR), whole=whole)
            if begin is not None:
                await self._room.threads.disk(begin, size)
        except StoreUnwritable as error:
            self._give_up_keeping(size, error)
            return False
        self._ingest.reserves = self._pulled
        return True

    def _open(self, assembly: Assembly) -> None:
        assert self._ingest.file is not None
        room = self._room
        self.assembly = assembly
        self._file = self._ingest.file.acquire()
        self._blob_writer = BlobWriter(room.store, room.threads, self._ingest, assembly, self._rouse)
        self._fetcher = Fetcher(
            self.digest.short,
            assembly,
            self.blob_source,
            self._blob_writer,
            room.counters,
            room.rates,
            connections=room.rate_limit.connections(room.connections),
            choose=self._choose,
            spend=self._spend if room.rate_limit.is_limited else None,
            fail=self._fail,
        )
        self._ready.set_result(assembly.size)
        self._spawn(self._complete(), "hash")
        self._spawn(self._blob_writer.keep_flushed(), "flush")
        self._watch_idleness()
        self.wake()

    def _give_up_keeping(self, size: int, error: StoreUnwritable) -> None:
        """Clients are told the size and served past the disk; after UNKEPT_S the disk is tried again."""
        extra = self._ending(Ending.UNKEPT, error)
        _log.log(self._room.level_of_unkept(self.digest), "%s; passing through", error, extra=extra)
        self._error = error
        if self._ready.done():
            self._fetcher.drop()
            self._rouse(0, size + 1)
        else:
            self.assembly = Assembly(size)
            self._ready.set_result(size)
        asyncio.get_running_loop().call_later(UNKEPT_S, self._end)

    async def _complete(self) -> None:
        actual = await self._blob_writer.hash()
        sealed = await self._blob_writer.seal(actual)
        self.blob_source.prove()
        size = self.assembly.size
        _log.info(
            "recorded %s: %d bytes in %.2f s; fetched %.3f x; unhashed at the last byte %.1f %%; "
            "commit %.3f s, of it fsync %.3f s",
            self.digest.short,
            size,
            time.monotonic() - self.started,
            self._fetcher.fetched / size if size else 1,
            100 * sealed.unhashed / size if size else 0,
            sealed.commit_s,
            sealed.fsync_s,
            extra=self._ending(Ending.STORED),
        )
        self._end()

    def _choose(self, rate: float | None) -> Slice | None:
        if self._error is not None:
            return None
        return next_slice(
            self.assembly,
            [Demand(cursor.position, cursor.stop, cursor.fed) for cursor in self._cursors],
            rate=rate,
            connections=self._room.rate_limit.connections(self._room.connections),
            complete=self._wanted_whole,
            now=steady(),
        )

    def pull(self) -> None:
        """A client has shown that it pulls the blob: from now on it is recorded ahead of its readers."""
        pulled, self._pulled = self._pulled, True
        if not pulled and not self._ended and self._error is None:
            self._spawn(self._reserve_whole(), "reserve")

    def want(self) -> None:
        """Record all of the blob from now on, even if nobody reads."""
        self._wanted = True
        self.pull()
        if self.size is not None:
            self.wake()

    async def _reserve_whole(self) -> None:
        """Make room for all of the blob; where that cannot be, clients are served past the disk."""
        size = await self.ready()
        if self._error is None and await self._has_room(size):
            self.wake()

    @property
    def _wanted_whole(self) -> bool:
        """Whether bytes that no reader asks for are fetched too."""
        finish = self._room.finish
        is_half = finish is Finish.AUTO and self.assembly.present.size * 2 >= self.assembly.size
        return self._pulled and bool(self._cursors or self._wanted or finish is Finish.ALWAYS or is_half)

    def _first_slice(self, host: str) -> int:
        return first_slice(self._room.rates.of(host, steady()), self._look)

    def _rouse(self, start: int, stop: int) -> None:
        """Wake the readers that wait for these bytes."""
        for cursor in self._cursors:
            if start <= cursor.position < stop:
                cursor.rouse()

    def _spend(self, count: int) -> float:
        return self._room.rate_limit.spend(count, live=bool(self._cursors), now=time.monotonic())

    # --- ending

    def _watch_idleness(self) -> None:
        """Run the clock that closes a recording nobody reads, or stop it."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not self._cursors and not self._ended:
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._idle_over)

    def _idle_over(self) -> None:
        if self._fetcher.busy or self.assembly.complete:
            self._watch_idleness()
            return
        extra = self._ending(Ending.LEFT)
        _log.info("recording %s: left by all clients with %s", self.digest.short, self._extent(), extra=extra)
        self._end()

    def _fail(self, error: CacheError) -> None:
        if self._ended:
            return
        extra = self._ending(Ending.FAILED, error)
        _log.warning("recording %s failed with %s: %s", self.digest.short, self._extent(), error, extra=extra)
        self._error = error
        if not self._ready.done():
            self._ready.set_exception(error)
            # Perhaps nobody waits: then it has been logged, which is all there is to do.
            self._ready.exception()
        self._end()

    def _ending(self, result: Ending, error: CacheError | None = None) -> dict[str, object]:
        """Count how the recording ends; the fields of its line."""
        self._room.counters.ended[result] += 1
        fields = {
            "event": "recording",
            "digest": str(self.digest),
            "result": result,
            "bytes": self.present,
            "fetched": self._fetcher.fetched if hasattr(self, "_fetcher") else 0,
            "seconds": round(time.monotonic() - self.started, 3),
            "problem": str(error or ""),
        }
        return {"fields": fields}

    def _extent(self) -> str:
        return f"{self.present} of {self.size} bytes" if self.size is not None else "nothing"

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._idle is not None:
            self._idle.cancel()
        self.over.set()
        self._on_end(self)
        self._rouse(0, (self.size or 0) + 1)
        self._closing = asyncio.get_running_loop().create_task(self._close(), name=f"close {self.digest.short}")

    async def _close(self) -> None:
        """Stop every task, then let go of the files."""
        # The task that ended the recording may have called this, on a loop that runs tasks eagerly.
        await asyncio.sleep(0)
        self.blob_source.close()
        if hasattr(self, "_fetcher"):
            await self._fetcher.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "_file"):
            with contextlib.suppress(StoreError):
                await self._blob_writer.abandon()
            self._file.release()
        if self._error is not None and self._error.discards:
            # What it holds is the room that the next recording may need, or not of this blob.
            await self._room.threads.disk(self._ingest.discard)
        await self._room.threads.disk(self._ingest.close)
        self._room.evictor.release(self.digest)

    async def closed(self) -> None:
        """Wait until an ended recording has let go of its files."""
        if self._closing is not None:
            await asyncio.wait([self._closing])

    async def stop(self) -> None:
        """End now and keep the partial: the daemon is going down."""
        self._fail(UpstreamUnreachable("the cache is shutting down"))
        await self.closed()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._guard(work), name=f"{name} {self.digest.short}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except DigestMismatch as error:
            self._room.counters.mismatches += 1
            self._room.evictor.mismatches(self.digest)
            self.blob_source.mistrust()
            self._fail(error)
        except (CacheError, OSError) as error:
            self._fail(error if isinstance(error, CacheError) else StoreError(f"recording {self.digest}: {error}"))
