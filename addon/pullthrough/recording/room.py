"""The room on the disk for one blob that is being recorded: made before its bytes come, given back after.

Invariant: what is reserved counts in full until `leave`, and a partial that is of no use to the next recording goes.
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
    """Where all recordings of a daemon are kept."""

    def __init__(self, store: Store, evictor: Evictor, threads: Threads) -> None:
        self.store = store
        self.evictor = evictor
        self.threads = threads
        self._unkept: set[Digest] = set()

    def level_of_unkept(self, digest: Digest) -> int:
        """Return how loud it is said that the blob cannot be kept: a warning once."""
        level = logging.INFO if digest in self._unkept else logging.WARNING
        self._unkept.add(digest)
        return level


class Room:
    """For one recording. `resume` or `make` comes first."""

    def __init__(self, disk: Disk, digest: Digest) -> None:
        self.disk: Final = disk
        self._digest = digest
        self._ingest = disk.store.ingest(digest)

    async def resume(self, permits: Callable[[int], bool]) -> tuple[int, Intervals] | None:
        """Return the size and the bytes that an earlier recording has left, if the blob may be so long, and the disk
        answers.
        """
        if self.disk.store.is_silent:
            return None
        return await self.disk.threads.disk(self._ingest.resume, permits)

    async def make(self, size: int, *, is_pulled: bool, begins: bool = False) -> None:
        """Make room for a blob of `size` bytes, all of it if somebody pulls it; with `begins`, its file.

        StoreUnwritable where that cannot be.
        """
        if self.disk.store.is_silent:
            raise StoreUnwritable(f"recording {self._digest}: the disk does not answer")
        whole = self._ingest.takes(size)
        await self.disk.evictor.reserve(self._digest, whole if is_pulled else min(size, FAR), whole=whole)
        if begins:
            await self.disk.threads.disk(self._ingest.begin, size)
        self._ingest.reserves = is_pulled

    def open(self, assembly: Assembly, on_landed: Callable[[int, int], None]) -> tuple[SharedFile, BlobWriter]:
        """Return the file, to be released by the caller, and what writes it."""
        assert self._ingest.file is not None
        writer = BlobWriter(self.disk.store, self.disk.threads, self._ingest, assembly, on_landed)
        return self._ingest.file.acquire(), writer

    async def leave(self, blob_writer: BlobWriter | None, error: CacheError | None) -> None:
        """Make what has come durable, and let go of the rest: of all of it where the recording failed of the disk."""
        if blob_writer is not None:
            with contextlib.suppress(StoreError):
                await blob_writer.abandon()
        if error is not None and error.discards:
            # What it holds is the room that the next recording may need, or not of this blob.
            await self.disk.threads.disk(self._ingest.discard)
        await self.disk.threads.disk(self._ingest.close)
        self.disk.evictor.release(self._digest)
