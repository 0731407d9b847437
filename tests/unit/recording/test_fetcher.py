"""fetcher: whether a source knows Range is found out by one connection, and no byte is fetched for it twice."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import pytest

from pullthrough.config.settings import Finish
from pullthrough.core.errors import UpstreamUnreachable
from pullthrough.recording import plan, retry_policy, slicing
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.recording.fetcher import Fetcher
from pullthrough.recording.plan import Interest, Line, Plan
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.upstream.data_stream import DataStream, Source

SIZE, LIMIT, PIECE = 1000, 100, 60
SOURCE = Source("https://oci.example/blob")
DATA = bytes(index % 251 for index in range(SIZE))


class Stream:
    """A response with `[start, stop)`, in pieces."""

    near = False
    source = SOURCE

    def __init__(self, start: int, stop: int, *, whole: bool, ranged: bool = True) -> None:
        self.start, self.stop, self.whole, self.ranged = start, stop, whole, ranged
        self.given = 0

    def close(self) -> None:
        """Nothing more is wanted."""

    async def batches(self) -> AsyncGenerator[bytes]:
        for start in range(self.start, self.stop, PIECE):
            await asyncio.sleep(0)
            piece = DATA[start : min(start + PIECE, self.stop)]
            self.given += len(piece)
            yield piece

    async def pour(self, write: Callable[[int, memoryview], None], _: int) -> None:
        start = self.start
        async for piece in self.batches():
            write(start, memoryview(piece))
            start += len(piece)
        # As from a thread, whose end is heard of after its last piece.
        await asyncio.sleep(0)


class World:
    """A fetcher of DATA, in front of a source that answers a Range once `present` bytes are here."""

    def __init__(self, *, ignores_range: bool, present: int, fails: bool) -> None:
        self.written = bytearray(SIZE)
        self.complete = asyncio.Event()
        self.assembly = Assembly(SIZE)
        self._answer = asyncio.Event()
        self._awaited = present
        self._look()
        self._ignores_range = ignores_range
        self._fails = fails
        self._slot = asyncio.Semaphore(16)
        interest = Interest([], Finish.ALWAYS, is_wanted=True, is_pulled=True)
        self.plan = Plan(self.assembly, interest, Line(4, RateLimit(None)), host="", now=0.0)
        self.fetcher = Fetcher("test", self.plan, cast(BlobSource, self), cast(BlobWriter, self))

    # --- the supply

    host = SOURCE.host

    async def source(self) -> Source:
        return SOURCE

    def slot(self, _: Source) -> asyncio.Semaphore:
        return self._slot

    async def open(self, _: Source, start: int, stop: int, *, length: int) -> Any:
        await self._answer.wait()
        if self._fails:
            self._fails = False
            raise UpstreamUnreachable("not now")
        return Stream(0, length, whole=True) if self._ignores_range else Stream(start, stop, whole=False)

    def failed(self, *_: Any, **__: Any) -> None:
        """Upstream's is tried again."""

    # --- the recording, and its sealer

    async def write(self, offset: int, data: memoryview) -> None:
        self.put(offset, data)
        self.landed(offset, offset + len(data))

    def put(self, offset: int, data: memoryview) -> None:
        self.written[offset : offset + len(data)] = data

    def landed(self, start: int, stop: int) -> None:
        self.assembly.add(start, stop)
        self._look()

    def _look(self) -> None:
        if self.assembly.present.size >= self._awaited:
            self._answer.set()
        if self.assembly.complete:
            self.complete.set()

    async def mark(self, start: int, stop: int) -> None:
        """Nothing is kept of it."""

    def mark_put(self, start: int, stop: int) -> None:
        """Nothing is kept of it."""

    async def begin_again(self) -> None:
        raise AssertionError("expected one version")


def play(*, ignores_range: bool, present: int, fails: bool = False) -> tuple[int, int]:
    """Record from a first answer, the other connection being answered once so many bytes are here.

    How many bytes were taken, and how many of them from the first answer.
    """
    first = Stream(0, SIZE, whole=True, ranged=False)

    async def scenario() -> int:
        world = World(ignores_range=ignores_range, present=present, fails=fails)
        taking = asyncio.get_running_loop().create_task(world.fetcher.take(cast(DataStream, first)))
        # Once the first answer's bytes are claimed.
        await asyncio.sleep(0)
        world.fetcher.wake()
        await asyncio.wait_for(world.complete.wait(), 10)
        await taking
        await world.fetcher.stop()
        assert bytes(world.written) == DATA
        return world.plan.fetched

    return asyncio.run(scenario()), first.given


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_SLICE", LIMIT)
    monkeypatch.setattr(plan, "MIN_SLICE", 1)
    monkeypatch.setattr(slicing, "MIN_SLICE", 1)
    monkeypatch.setattr(slicing, "PROBE_SLICE", LIMIT)
    monkeypatch.setattr(retry_policy, "BACKOFF_S", 0.0)


@pytest.mark.parametrize("present", [0, 60, LIMIT], ids=["at once", "in time", "when the slice is here"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_source_that_ignores_range(present: int, fails: bool) -> None:
    """The first answer goes on, however late that is known; each byte comes once."""
    fetched, first = play(ignores_range=True, present=present, fails=fails)
    assert fetched == first == SIZE


def test_a_source_that_knows_range() -> None:
    """The first answer is let go behind its slice, and nothing more of it has been read."""
    fetched, first = play(ignores_range=False, present=LIMIT)
    assert first == 2 * PIECE
    assert fetched == SIZE + first - LIMIT


def test_a_bug_ends_the_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the bytes hears of an error that nobody expected."""

    async def scenario() -> None:
        world = World(ignores_range=False, present=0, fails=False)
        monkeypatch.setattr(world, "mark_put", lambda start, stop: 1 // 0)
        world.fetcher.wake()
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(world.fetcher.run(), 10)
        await world.fetcher.stop()

    asyncio.run(scenario())
