"""Hashing and copying of many files at once, on every core, until told to stop.

Invariant: the hash that a copy returns is that of the bytes that were written, and nothing is still running when `each`
returns or raises, even by Ctrl-C. hashlib releases the interpreter lock, so threads are enough.
"""

import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from queue import Empty, SimpleQueue
from typing import Final

from pullthrough.runtime import platform

LOOK_S: Final = 0.5
"""How long to wait at a time: Ctrl-C just before an endless wait would be noticed only at its end."""
PIECE: Final = 1 << 20
"""Bytes per read: few enough to be still in the core's cache when they are hashed and written."""


class Stopped(Exception):
    """Another thread of the pool has failed, or the caller was interrupted."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """A range of an open file: `size` bytes from `offset` on."""

    descriptor: int
    offset: int
    size: int

    @classmethod
    def whole(cls, descriptor: int) -> "FileRange":
        return cls(descriptor, 0, os.fstat(descriptor).st_size)


class HashPool:
    """A pool of one thread per core."""

    def __init__(self, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        """`on_bytes` is called, in any thread, with the number of bytes newly hashed."""
        self._on_bytes = on_bytes
        self._stop = threading.Event()

    def each[T, R](
        self, items: Iterable[T], work: Callable[[T], R], done: Callable[[T, Callable[[], R]], object]
    ) -> None:
        """Call `work` with each item in the threads; call `done` in this one, with the item and its result's getter.

        An exception of `done` ends everything.
        """
        self._stop.clear()
        pool = ThreadPoolExecutor(platform.cores(), thread_name_prefix="ollama-cache-crew")
        try:
            futures: dict[Future[R], T] = {pool.submit(work, item): item for item in items}
            over: SimpleQueue[Future[R]] = SimpleQueue()
            for future in futures:
                future.add_done_callback(over.put)
            for _ in range(len(futures)):
                future = _first(over)
                done(futures[future], future.result)
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def hash(self, source: FileRange) -> str:
        """Return the hexadecimal sha256 of these bytes, or of as many as there are."""
        hasher = sha256()
        for data in self._pieces(source):
            hasher.update(data)
        return hasher.hexdigest()

    def pour(self, source: FileRange, sink: Callable[[bytes], object]) -> str:
        """Pass the bytes to `sink` in order, in one other thread, and return their hexadecimal sha256."""
        hasher = sha256()
        if source.size <= PIECE:
            for data in self._pieces(source):
                sink(data)
                hasher.update(data)
            return hasher.hexdigest()
        # One piece is written while the next is hashed: all that a second core can do for a single large blob.
        with ThreadPoolExecutor(1, thread_name_prefix="ollama-cache-writer") as writer:
            written: Future[object] | None = None
            with closing(self._pieces(source)) as pieces:
                for data in pieces:
                    if written is not None:
                        written.result()
                    written = writer.submit(sink, data)
                    hasher.update(data)
            if written is not None:
                written.result()
        return hasher.hexdigest()

    def copy(self, source: FileRange, target: int, *, reserve: Callable[[], object] = lambda: None) -> str:
        """Fill the empty file `target`, by reflink if possible, make it durable, and return its sha256.

        `reserve` is called before bytes are written, because they take room on the disk; a reflink takes none.
        """
        whole = source.offset == 0 and source.size == os.fstat(source.descriptor).st_size
        if whole and platform.reflink(source.descriptor, target):
            actual = self.hash(FileRange(target, 0, source.size))
        else:
            reserve()
            position = 0

            def write(data: bytes) -> None:
                nonlocal position
                platform.write_at(target, position, data)
                position += len(data)

            actual = self.pour(source, write)
        platform.sync_data(target)
        return actual

    def _pieces(self, source: FileRange) -> Generator[bytes]:
        offset, stop = source.offset, source.offset + source.size
        while offset < stop and (data := platform.read_at(source.descriptor, offset, min(PIECE, stop - offset))):
            if self._stop.is_set():
                raise Stopped
            yield data
            offset += len(data)
            self._on_bytes(len(data))


def _first[T](queue: SimpleQueue[T]) -> T:
    while True:
        try:
            return queue.get(timeout=LOOK_S)
        except Empty:
            continue
