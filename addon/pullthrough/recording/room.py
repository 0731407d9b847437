"""Disk space for one blob that is being recorded: made before its bytes come, given back afterwards.

Invariant: what is reserved counts in full until `leave`, and a partial that the next recording cannot use is removed.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, StoreError, StoreUnwritable
from pullthrough.core.intervals import Intervals
from pullthrough.library.eviction import Evictor
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.recording.pulls import FAR
from pullthrough.runtime.executors import Threads
from pullthrough.runtime.shared_file import SharedFile
from pullthrough.store.store import Store


class Disk:
    """The disk on which a daemon keeps all its recordings."""

    def __init__(self, store: Store, evictor: Evictor, threads: Threads) -> None:
        self.store = store
        self.evictor = evictor
        self.threads = threads
        self._unkept: set[Digest] = set()

    def level_of_unkept(self, digest: Digest) -> int:
        """Return the log level of the message that the blob cannot be kept: a warning only the first time."""
        level = logging.INFO if digest in self._unkept else logging.WARNING
        self._unkept.add(digest)
        return level


class Room:
    """The disk space of one recording. Call `resume` or `make` first."""

    def __init__(self, disk: Disk, digest: Digest) -> None:
        self.disk: Final = disk
        self._digest = digest
        self._ingest = disk.store.ingest(digest)

    async def resume(self, permits: Callable[[int], bool]) -> tuple[int, Intervals] | None:
        """Return the size and the bytes that an earlier recording has left.

        None if there are none, if `permits` rejects the size, or if the disk does not answer.
        """
        if self.disk.store.is_silent:
            return None
        return await self.disk.threads.disk(self._ingest.resume, permits)

    async def make(self, size: int, *, is_pulled: bool, begins: bool = False) -> None:
        """Make room for a blob of `size` bytes, for all of it if `is_pulled`; with `begins`, make its file.

        Raises StoreUnwritable if that fails.
        """
        if self.disk.store.is_silent:
            raise StoreUnwritable(f"recording {self._digest}: the disk does not answer")
        whole = self._ingest.takes(size)
        await self.disk.evictor.reserve(self._digest, whole if is_pulled else min(size, FAR), whole=whole)
        if begins:
            await self.disk.threads.disk(self._ingest.begin, size)
        self._ingest.reserves = is_pulled

    def open(self, assembly: Assembly, on_landed: Callable[[int, int], None]) -> tuple[SharedFile, BlobWriter]:
        """Return the file, which the caller releases, and its writer."""
        assert self._ingest.file is not None
        writer = BlobWriter(self.disk.store, self.disk.threads, self._ingest, assembly, on_landed)
        return self._ingest.file.acquire(), writer

    async def leave(self, blob_writer: BlobWriter | None, error: CacheError | None) -> None:
        """Make what has come durable, and release the rest; remove the partial if `error` says so (`discards`)."""
        if blob_writer is not None:
            with contextlib.suppress(StoreError):
                await blob_writer.abandon()
        if error is not None and error.discards:
            # The partial takes space that the next recording may need, or its bytes are not this blob's.
            await self.disk.threads.disk(self._ingest.discard)
        if self._ingest.file is not None:
            await self.disk.threads.disk(self._ingest.close)
        self.disk.evictor.release(self._digest)
