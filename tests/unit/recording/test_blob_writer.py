"""blob_writer: what an earlier daemon has written is hashed again, and nobody who is being served waits for that."""

import asyncio
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.intervals import Intervals
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.runtime.executors import Threads
from pullthrough.store.ingest import Ingest
from pullthrough.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.close()


class Watched(Threads):
    """Threads that tell what was hashed where."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[tuple[str, int, int]] = []

    async def hashing(self, work: Callable[[int, int], int], start: int, stop: int) -> int:  # type: ignore[override]
        self.visits.append(("new", start, stop))
        return await super().hashing(work, start, stop)

    async def rehashing(self, work: Callable[[int, int], int], start: int, stop: int) -> int:  # type: ignore[override]
        self.visits.append(("found", start, stop))
        return await super().rehashing(work, start, stop)


def found(store: Store, content: bytes, *intervals: tuple[int, int]) -> tuple[Ingest, Assembly]:
    """A recording that goes on where an earlier daemon was killed."""
    ingest = store.ingest(Digest(hashlib.sha256(content).hexdigest()))
    ingest.begin(len(content))
    for start, stop in intervals:
        ingest.write_at(start, content[start:stop])
    ingest.mark(intervals)
    ingest.close()
    resumed = ingest.resume()
    assert resumed is not None
    return ingest, Assembly(*resumed)


def test_what_was_found_is_hashed_behind_what_comes(store: Store) -> None:
    """A resumed blob's bytes stand back, and those that come do not; together they are the digest."""
    content = bytes(range(48))
    threads = Watched()

    async def main() -> None:
        ingest, assembly = found(store, content, (0, 16), (32, 40))
        blob_writer = BlobWriter(store, threads, ingest, assembly)
        hashing = asyncio.get_running_loop().create_task(blob_writer.hash())
        for start, stop in ((16, 32), (40, 48)):
            while assembly.hashed < start:  # noqa: ASYNC110 -- the hash tells nobody how far it is
                await asyncio.sleep(0)
            await blob_writer.write(start, memoryview(content)[start:stop])
        await blob_writer.seal(await hashing)
        ingest.close()
        assert store.held(ingest.digest) is not None

    asyncio.run(main())
    threads.close()
    assert threads.visits == [("found", 0, 16), ("new", 16, 40), ("new", 40, 48)]


def test_a_slow_disk_is_flushed_often(store: Store, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes at once as it makes durable in a second, within bounds: it may do nothing else meanwhile."""
    now, speed = [0.0], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def main() -> None:
        ingest = store.ingest(Digest("0" * 64))
        ingest.stretch = 8 << 20
        ingest.begin(1 << 30)
        blob_writer = BlobWriter(store, threads, ingest, Assembly(1 << 30))
        count, position = blob_writer.flush_bytes, 0

        def flush(_present: Intervals) -> None:
            now[0] += count / speed[0]

        monkeypatch.setattr(ingest, "flush", flush)
        for speed[0], expected in ((100e6, int(100e6)), (5e6, 8 << 20), (1e9, 256 << 20)):
            blob_writer.landed(position, position + count)
            await blob_writer.flush()
            position, count = position + count, blob_writer.flush_bytes
            assert abs(count - expected) <= 1
        ingest.close()

    asyncio.run(main())


def test_bytes_of_another_version_are_not_found(store: Store) -> None:
    """What comes after beginning again is as new as any."""
    content = bytes(range(48))
    threads = Watched()

    async def main() -> None:
        ingest, assembly = found(store, content, (8, 40))
        blob_writer = BlobWriter(store, threads, ingest, assembly)
        await blob_writer.begin_again()
        await blob_writer.write(0, memoryview(content))
        await blob_writer.seal(await blob_writer.hash())
        ingest.close()

    asyncio.run(main())
    threads.close()
    assert threads.visits == [("new", 0, 48)]


def test_a_live_recording_does_not_wait_for_old_bytes(store: Store, threads: Threads) -> None:
    """Its commit comes while the hashing of what was found goes on."""
    content = bytes(range(48))

    async def main() -> None:
        gate = threading.Event()
        old = [asyncio.get_running_loop().create_task(threads.rehashing(gate.wait)) for _ in range(8)]
        await asyncio.sleep(0)
        try:
            ingest, assembly = found(store, content)
            blob_writer = BlobWriter(store, threads, ingest, assembly)
            async with asyncio.timeout(60):
                await blob_writer.write(0, memoryview(content))
                await blob_writer.seal(await blob_writer.hash())
            ingest.close()
            assert not any(task.done() for task in old)
        finally:
            gate.set()
            await asyncio.gather(*old)

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a nice value for each thread")
def test_only_old_bytes_are_hashed_at_low_priority(threads: Threads) -> None:
    """The nice value is the thread's, not the daemon's."""

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def main() -> list[int]:
        return [await kind(niceness) for kind in (threads.rehashing, threads.hashing, threads.disk)]

    usual = niceness()
    assert asyncio.run(main()) == [max(10, usual), usual, usual]
