"""Hash what has been assembled, keep the journal, and publish the blob once it is whole and right.

Invariant: the hash reads the file as it is on disk, in order, once; nothing is published before its digest is
compared. Bytes that were already there are hashed again, at low priority.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pullthrough.core.errors import DigestMismatch, StoreError
from pullthrough.core.intervals import Intervals
from pullthrough.recording.assembly import Assembly
from pullthrough.runtime.executors import Threads
from pullthrough.store.blob_files import BlobFile
from pullthrough.store.ingest import Ingest
from pullthrough.store.store import Store

_log = logging.getLogger(__name__)

HASH_PIECE: Final = 256 << 10
"""Bytes that stay in a core's cache between reading and hashing."""
# The most that one call in the thread hashes: each call waits for the event loop twice, which on a busy machine costs
# more than the hashing itself.
HASH_STRETCH: Final = 64 << 20
# A call at low priority may take ten times as long, and the daemon's shutdown waits for it.
REHASH_STRETCH: Final = 16 << 20
HELD_BACK: Final = 1 << 20
"""Bytes at the end of a blob found without proof, which no client gets before its digest is verified."""
FLUSH_S: Final = 2.0
FLUSH_BYTES: Final = 256 << 20
FLUSH_TIME_S: Final = 1.0
"""The longest that a flush should take: some disks do nothing else meanwhile, and block readers and writers."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """The durations of a commit and its fsync (seconds), and the bytes still unhashed when the last byte came."""

    commit_s: float
    fsync_s: float
    unhashed: int


class BlobWriter:
    """The writer of one assembly, from its first byte to the published blob."""

    def __init__(
        self,
        store: Store,
        threads: Threads,
        ingest: Ingest,
        assembly: Assembly,
        on_landed: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """`on_landed` is called with each interval that has been written."""
        self._on_landed = on_landed
        self._store = store
        self._threads = threads
        self._ingest = ingest
        self._assembly = assembly
        self._found = assembly.present.copy()
        """The bytes that were already there: of an earlier recording, or of a file found among the blobs."""
        if ingest.in_place:
            assembly.shown = max(0, assembly.size - HELD_BACK)
        self._grown = asyncio.Event()
        self._much = asyncio.Event()
        # Bytes that were already there may not be durable yet.
        self._unflushed = assembly.present.size
        self.flush_bytes = ingest.stretch
        """The number of unflushed bytes that triggers a flush."""
        self._unhashed = 0
        self._journal = asyncio.Lock()

    async def write(self, offset: int, data: memoryview) -> None:
        """Write bytes that have arrived. Raises StoreUnwritable if the disk refuses."""
        await self._threads.disk(self.put, offset, data)
        self.landed(offset, offset + len(data))

    def put(self, offset: int, data: memoryview) -> None:
        """Write bytes that have arrived, in a thread; they count once they have `landed`. Raises StoreUnwritable."""
        self._ingest.write_at(offset, data)

    def landed(self, start: int, stop: int) -> None:
        """Note that the bytes have been written."""
        self._assembly.add(start, stop)
        if self._assembly.complete:
            self._unhashed = self._assembly.size - self._assembly.hashed
        self._grown.set()
        self._unflushed += stop - start
        if self._unflushed >= self.flush_bytes:
            self._much.set()
        self._on_landed(start, stop)

    async def mark(self, start: int, stop: int) -> None:
        """Journal the present bytes of `[start, stop)`."""
        present = self._assembly.present.within(start, stop)
        await self._threads.disk(self._ingest.mark, present)

    def mark_put(self, start: int, stop: int) -> None:
        """Journal bytes all of which have been `put`, in a thread."""
        self._ingest.mark([(start, stop)])

    async def keep_flushed(self) -> None:
        """Make what is written durable, for ever: every FLUSH_S seconds, or when a flush would take FLUSH_TIME_S."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._much.wait()
            await self.flush()

    async def flush(self) -> None:
        """Make what is written durable now."""
        self._much.clear()
        async with self._journal:
            if self._unflushed and self._ingest.file is not None:
                count, self._unflushed = self._unflushed, 0
                began = time.monotonic()
                await self._threads.disk(self._ingest.flush, self._assembly.present.copy())
                rate = count / max(time.monotonic() - began, 1e-3)
                self.flush_bytes = min(FLUSH_BYTES, max(self._ingest.stretch, int(rate * FLUSH_TIME_S)))

    async def abandon(self) -> None:
        """Unless the blob is complete, make what is written durable and give back the space reserved for the rest."""
        if self._assembly.complete or self._ingest.file is None:
            return
        await self.flush()
        await self._threads.disk(self._ingest.give_back, self._assembly.present.copy())

    async def begin_again(self) -> None:
        """Forget every byte, in memory and in the journal."""
        async with self._journal:
            await self._threads.disk(self._ingest.begin_again)
            self._assembly.begin_again()
            self._found = Intervals()
        self._grown.set()

    async def hash(self) -> str:
        """Hash the prefix as it grows; returns the blob's hexadecimal sha256."""
        while (actual := await self._hash_version()) is None:
            pass
        return actual

    async def _hash_version(self) -> str | None:
        """Do what `hash` does; returns None if the assembly was begun again meanwhile."""
        assert self._ingest.file is not None
        hasher = hashlib.sha256()
        file, assembly = self._ingest.file, self._assembly
        begun = assembly.versions.now()

        buffer = memoryview(bytearray(min(HASH_PIECE, assembly.size)))

        def update(start: int, stop: int) -> int:
            offset = start
            while offset < stop and (count := file.read_into(buffer[: stop - offset], offset)):
                hasher.update(buffer[:count])
                offset += count
            return offset

        while assembly.hashed < assembly.size:
            if assembly.frontier == assembly.hashed:
                self._grown.clear()
                await self._grown.wait()
                if begun.is_over:
                    return None
                continue
            if (found := self._found.stop_at(assembly.hashed)) > assembly.hashed:
                stop = min(found, assembly.hashed + REHASH_STRETCH)
                hashed = await self._threads.rehashing(update, assembly.hashed, stop)
            else:
                stop = min(assembly.frontier, assembly.hashed + HASH_STRETCH)
                hashed = await self._threads.hashing(update, assembly.hashed, stop)
            if begun.is_over:
                return None
            assembly.hashed = hashed
            if assembly.hashed < stop:
                raise StoreError(
                    f"recording {self._ingest.digest}: expected {assembly.size} bytes on disk, got {assembly.hashed}"
                )
        return hasher.hexdigest()

    async def seal(self, actual: str) -> Sealed:
        """Publish the blob if `actual` is its digest. Raises DigestMismatch, after quarantining it, if not."""
        began = time.monotonic()
        digest = self._ingest.digest
        arranged = self._assembly.size if self._ingest.finished_path == self._ingest.partial_path else 0
        while arranged < self._assembly.size:
            arranged = await self._threads.disk(self._ingest.arrange, arranged)
        if actual != digest.hex:
            path = await self._threads.disk(self._store.quarantine, self._ingest)
            self._store.disown(digest)
            _log.error("expected %s, got sha256:%s: quarantined as %s", digest, actual, path.name)
            raise DigestMismatch(str(digest), f"sha256:{actual}")
        async with self._journal:
            placed, synced = await self._threads.disk(self._place)
        self._store.publish(digest, placed, now=time.time())
        self._assembly.shown = self._assembly.size
        return Sealed(time.monotonic() - began, synced - began, self._unhashed)

    def _place(self) -> tuple[BlobFile, float]:
        """Make the bytes durable and move them among the blobs; returns the file, and when they became durable.

        Raises StoreUnwritable if the disk refuses.
        """
        # All in one call in the thread: for a small blob, each call costs as much as the work itself.
        self._ingest.sync()
        synced = time.monotonic()
        placed = self._store.place(self._ingest.digest, self._ingest.finished_path)
        self._ingest.forget()
        with contextlib.suppress(OSError):  # a late error of the journal, which is no longer of use
            self._ingest.close()
        return placed, synced
