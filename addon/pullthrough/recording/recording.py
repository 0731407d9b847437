"""One blob being recorded: its readers, and its life from the first response to the published file.

Invariant: readers wait for bytes, never for one another: a client that leaves changes nothing for the others. If the
recording fails, its readers get what is present and then the error; the partial stays for the next recording.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from pullthrough.config.settings import Finish
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, DigestMismatch, StoreError, StoreUnwritable, UpstreamUnreachable
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.recording.cursor import Cursor, Readers
from pullthrough.recording.fetcher import Fetcher
from pullthrough.recording.plan import Interest, Line, Plan
from pullthrough.recording.relay import Relay, Relays
from pullthrough.recording.room import Room
from pullthrough.recording.slicing import MAX_SLICE, first_slice
from pullthrough.recording.states import ENDINGS, TRANSITIONS, Event, State
from pullthrough.runtime.clock import steady
from pullthrough.runtime.shared_file import SharedFile
from pullthrough.upstream.data_stream import DataStream

_log = logging.getLogger(__name__)

IDLE_S: Final = 30.0
"""How long a recording without readers stays open: an Ollama client's probe and parts are separate requests, and its
retries come after 1, 2, 4, 8 and 16 s (server/download.go)."""

LINGER_S: Final = 0.5
"""How long current fetches continue after the last reader has gone: the next part may be requested at once."""

UNKEPT_S: Final = 30.0
"""How long a blob for which the disk had no room is passed through before the disk is tried again."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a recording that exist once its size is known and there is room for it."""

    plan: Plan
    file: SharedFile
    blob_writer: BlobWriter
    fetcher: Fetcher


class Recording:
    """A blob being recorded."""

    def __init__(
        self,
        digest: Digest,
        blob_source: BlobSource,
        room: Room,
        line: Line,
        finish: Finish,
        *,
        on_end: Callable[["Recording"], None],
        wanted: bool = False,
        look: int = 0,
    ) -> None:
        """`on_end` is called once, when the recording ends; `wanted` and `look` are as for `Recorder.open`."""
        self.digest = digest
        self.blob_source = blob_source
        self.state = State.BEGINNING
        self.over = asyncio.Event()
        self.size: int | None = None
        """The blob's size, None while unknown."""
        self._look = MAX_SLICE if wanted else look
        self._room = room
        self._line = line
        self._on_end = on_end
        self._cursors = Readers()
        self._interest = Interest(self._cursors, finish, is_wanted=wanted, is_pulled=wanted)
        self._parts: _Parts | None = None
        self._ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self.started = time.monotonic()
        self._error: CacheError | None = None
        self._relays: Relays | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None

    # --- readers

    async def ready(self) -> int:
        """Wait for the blob's size, from a response or an earlier partial. Raises the error if the recording fails."""
        return await asyncio.shield(self._ready)

    @property
    def present(self) -> int:
        """How many of the blob's bytes are here."""
        return self._parts.plan.assembly.present.size if self._parts is not None else 0

    @property
    def readers(self) -> int:
        """How many readers it has."""
        return len(self._cursors)

    def attach(self, start: int, stop: int) -> Cursor:
        """Return a cursor for a reader of `[start, stop)`. The recording must be ready; it may have ended meanwhile.

        Raises StoreUnwritable if the blob cannot be written: then only `relay` has the bytes.
        """
        if isinstance(self._error, StoreUnwritable):
            raise self._error
        assert self._parts is not None
        cursor = Cursor(self, self._parts.plan.assembly, self._parts.file.acquire(), start, stop)
        if not self._cursors:
            self._parts.plan.listen(steady())
        self._cursors.add(cursor)
        self._watch_idleness()
        self._parts.fetcher.wake()
        return cursor

    def relay(self, start: int, stop: int) -> Relay:
        """Return a relay of the interval from upstream, past the disk."""
        if self._relays is None:
            assert self.size is not None
            self._relays = Relays(self.blob_source, self._line, self.size)
        return Relay(self._relays, start, stop)

    def detach(self, cursor: Cursor) -> None:
        """Forget a reader that has gone."""
        self._cursors.discard(cursor)
        self._watch_idleness()
        if not self._cursors:
            asyncio.get_running_loop().call_later(LINGER_S, self._stop_reading_ahead)

    def _stop_reading_ahead(self) -> None:
        """Drop what was being fetched ahead of readers that have gone."""
        if (parts := self._parts) and not self._cursors and not self._interest.is_whole(parts.plan.assembly):
            parts.fetcher.drop()

    def check(self) -> None:
        """Raise the error with which the recording has failed, if it has."""
        if self._error is not None:
            raise self._error

    def miss(self, position: int) -> None:
        """Make sure that a connection fetches this byte, for which a reader waits."""
        if self._parts is not None:
            # There may be no connection: they end once all wanted bytes have been claimed.
            self._parts.fetcher.wake()
            self._parts.fetcher.rescue(position)

    def pull(self) -> None:
        """Record the blob ahead of its readers from now on: a client has shown that it pulls it."""
        pulled, self._interest.is_pulled = self._interest.is_pulled, True
        if not pulled and self.state in (State.BEGINNING, State.OPEN):
            self._spawn(self._reserve_whole(), "reserve")

    def want(self) -> None:
        """Record the whole blob from now on, even without readers."""
        self._interest.is_wanted = True
        self.pull()
        if self._parts is not None:
            self._parts.fetcher.wake()

    # --- beginning

    def start(self, stream: DataStream | None, *, after: "Recording | None") -> None:
        """Begin from an earlier partial, from `stream` (a first response, ours from here on), or by a new request.

        `after` is a recording of the same digest that has ended but may not have released its files.
        """
        self._spawn(self._begin(stream, after), "begin")

    async def _begin(self, stream: DataStream | None, after: "Recording | None") -> None:
        try:
            if after is not None:
                await after.closed()
            found = await self._room.resume(self.blob_source.permits)
            if found is not None:
                if await self._has_room(found[0]):
                    self._open(Assembly(*found))
                return
            stream = stream or await self.blob_source.open_first(self._first_slice)
            self.blob_source.expect(stream.validator)
            if await self._has_room(stream.length, begins=True):
                await self._open(Assembly(stream.length)).take(stream)
        finally:
            if stream is not None:
                stream.close()

    def _first_slice(self, host: str) -> int:
        return first_slice(self._line.rates.of(host, steady()), self._look)

    async def _has_room(self, size: int, *, begins: bool = False) -> bool:
        """Make room for the coming bytes; if that fails, serve clients past the disk and return False."""
        try:
            await self._room.make(size, is_pulled=self._interest.is_pulled, begins=begins)
        except StoreUnwritable as error:
            self._give_up_keeping(size, error)
            return False
        return True

    async def _reserve_whole(self) -> None:
        """Make room for the whole blob; if that fails, serve clients past the disk."""
        size = await self.ready()
        if self._parts is not None and self.state is State.OPEN and await self._has_room(size):
            self._parts.fetcher.wake()

    def _open(self, assembly: Assembly) -> Fetcher:
        """Start all parts; returns the fetcher, which takes the first response."""
        plan = Plan(assembly, self._interest, self._line, host=self.blob_source.host, now=steady())
        file, blob_writer = self._room.open(assembly, self._cursors.rouse)
        fetcher = Fetcher(self.digest.short, plan, self.blob_source, blob_writer)
        self._parts = parts = _Parts(plan, file, blob_writer, fetcher)
        self._pass(Event.OPENED)
        self._tell_size(assembly.size)
        self._spawn(self._complete(parts), "hash")
        self._spawn(blob_writer.keep_flushed(), "flush")
        self._spawn(fetcher.run(), "fetch")
        self._watch_idleness()
        fetcher.wake()
        return fetcher

    def _tell_size(self, size: int) -> None:
        self.size = size
        if not self._ready.done():
            self._ready.set_result(size)

    # --- ending

    def _pass(self, event: Event) -> bool:
        """Apply an event; returns whether it changes the state."""
        before, self.state = self.state, TRANSITIONS[self.state].get(event, self.state)
        if self._parts is not None:
            self._parts.plan.is_over |= self.state is not State.OPEN
        is_changed = self.state is not before
        if is_changed and event in ENDINGS:
            self._line.counters.ended[event] += 1
        return is_changed

    def _give_up_keeping(self, size: int, error: StoreUnwritable) -> None:
        """Tell clients the size and serve them past the disk; the disk can be tried again after UNKEPT_S."""
        if not self._pass(Event.UNKEPT):
            return
        level = self._room.disk.level_of_unkept(self.digest)
        _log.log(level, "%s; passing through", error, extra=self._fields(Event.UNKEPT, error))
        self._error = error
        if self._parts is not None:
            self._parts.fetcher.drop()
            self._cursors.rouse(0, size + 1)
        self._tell_size(size)
        asyncio.get_running_loop().call_later(UNKEPT_S, self._expire)

    def _expire(self) -> None:
        if self._pass(Event.EXPIRED):
            self._end()

    async def _complete(self, parts: _Parts) -> None:
        actual = await parts.blob_writer.hash()
        sealed = await parts.blob_writer.seal(actual)
        self.blob_source.prove()
        if not self._pass(Event.STORED):
            return
        size = parts.plan.assembly.size
        _log.info(
            "recorded %s: %d bytes in %.2f s; fetched %.3f x; unhashed at the last byte %.1f %%; "
            "commit %.3f s, of it fsync %.3f s",
            self.digest.short,
            size,
            time.monotonic() - self.started,
            parts.plan.fetched / size if size else 1,
            100 * sealed.unhashed / size if size else 0,
            sealed.commit_s,
            sealed.fsync_s,
            extra=self._fields(Event.STORED),
        )
        self._end()

    def _watch_idleness(self) -> None:
        """Start the timer that ends a recording without readers, or stop it."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not self._cursors and self.state is State.OPEN:
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._leave)

    def _leave(self) -> None:
        if self._parts is not None and (self._parts.fetcher.busy or self._parts.plan.assembly.complete):
            self._watch_idleness()
        elif self._pass(Event.LEFT):
            extra = self._fields(Event.LEFT)
            _log.info("recording %s: left by all clients with %s", self.digest.short, self._extent(), extra=extra)
            self._end()

    def _fail(self, error: CacheError) -> None:
        if not self._pass(Event.FAILED):
            return
        extra = self._fields(Event.FAILED, error)
        _log.warning("recording %s failed with %s: %s", self.digest.short, self._extent(), error, extra=extra)
        self._error = error
        if not self._ready.done():
            self._ready.set_exception(error)
            # Nothing may be waiting for it: mark it as retrieved. It has been logged above.
            self._ready.exception()
        self._end()

    def _fields(self, result: Event, error: CacheError | None = None) -> dict[str, object]:
        """Return the structured fields of the log line on how the recording ends."""
        fields = {
            "event": "recording",
            "digest": str(self.digest),
            "result": result,
            "bytes": self.present,
            "fetched": self._parts.plan.fetched if self._parts is not None else 0,
            "seconds": round(time.monotonic() - self.started, 3),
            "problem": str(error or ""),
        }
        return {"fields": fields}

    def _extent(self) -> str:
        return f"{self.present} of {self.size} bytes" if self.size is not None else "nothing"

    def _end(self) -> None:
        """Notify all waiting readers, and start closing."""
        self._watch_idleness()
        self.over.set()
        self._on_end(self)
        self._cursors.rouse(0, (self.size or 0) + 1)
        self._closing = asyncio.get_running_loop().create_task(self._close(), name=f"close {self.digest.short}")

    async def _close(self) -> None:
        """Stop every task, then release the files."""
        # On a loop that runs tasks eagerly, the task that ended the recording may be running this.
        await asyncio.sleep(0)
        self.blob_source.close()
        if self._parts is not None:
            await self._parts.fetcher.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._parts is not None:
            self._parts.file.release()
        await self._room.leave(self._parts.blob_writer if self._parts is not None else None, self._error)

    async def closed(self) -> None:
        """Wait until an ended recording has released its files."""
        if self._closing is not None:
            await asyncio.wait([self._closing])

    async def stop(self) -> None:
        """End now and keep the partial: the daemon is shutting down."""
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
            self._line.counters.mismatches += 1
            self._room.disk.evictor.mismatches(self.digest)
            self.blob_source.mistrust()
            self._fail(error)
        except (CacheError, OSError) as error:
            self._fail(error if isinstance(error, CacheError) else StoreError(f"recording {self.digest}: {error}"))
        except Exception as error:
            # A bug of ours: readers must not wait for ever.
            _log.exception("recording %s failed", self.digest.short)
            self._fail(StoreError(f"recording {self.digest}: {type(error).__name__}"))
