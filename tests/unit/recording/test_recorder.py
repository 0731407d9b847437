"""recorder: who is done with a recording that others have begun."""

import asyncio
from collections.abc import Callable, Coroutine
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest

from pullthrough.config.settings import Finish
from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError
from pullthrough.library.eviction import Evictor
from pullthrough.recording.plan import Line
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.recorder import Recorder
from pullthrough.runtime.executors import Threads
from pullthrough.store.ingest import Ingest
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.data_stream import Source

DATA = bytes(range(256)) * 16384  # 4 MiB
DIGEST = Digest(sha256(DATA).hexdigest())


class FakeUpstream:
    """Serves DATA by ranges."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(16)

    def slot(self, _: Source) -> asyncio.Semaphore:
        return self.slots

    async def open_range(self, source: Source, start: int, stop: int, **_: Any) -> Any:
        return FakeStream(source, start, min(stop, len(DATA)))


class FakeStream:
    """A response to a Range."""

    near, whole, ranged, validator, length = False, False, True, '"1"', len(DATA)

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.source, self.start, self.stop = source, start, stop

    async def pour(self, write: Callable[[int, memoryview], None], _: int) -> None:
        await asyncio.to_thread(write, self.start, memoryview(DATA)[self.start : self.stop])

    def close(self) -> None:
        """Nothing more is wanted."""


async def obtain() -> Source:
    return Source("https://r2.example/blob")


def play(folder: Path, scenario: Callable[[Store, Recorder], Coroutine[Any, Any, None]]) -> None:
    """Run the scenario on a store of its own."""
    store, threads = Store.open(folder / "store"), Threads()

    async def run() -> None:
        evictor = Evictor(store, threads, max_size=None, min_free=0)
        upstream = cast(Upstream, FakeUpstream())
        recorder = Recorder(store, evictor, upstream, threads, Line(4, RateLimit(None)), Finish.AUTO)
        try:
            await scenario(store, recorder)
        finally:
            await recorder.close()

    try:
        asyncio.run(run())
    finally:
        threads.close()
        store.close()


def test_what_is_wanted_is_recorded_whole_whoever_began(tmp_path: Path) -> None:
    """A client has only asked for the head when `warm` or a refresh asks for all of it."""

    async def scenario(store: Store, recorder: Recorder) -> None:
        begun = recorder.open(DIGEST, obtain=obtain)
        assert await begun.ready() == len(DATA)
        wanted = recorder.open(DIGEST, obtain=obtain, wanted=True)
        assert wanted is begun
        await asyncio.wait_for(wanted.over.wait(), 10)
        assert store.held(DIGEST) is not None

    play(tmp_path, scenario)


def test_what_is_wanted_while_it_begins(tmp_path: Path) -> None:
    """Before upstream has told the size."""

    async def scenario(store: Store, recorder: Recorder) -> None:
        begun = recorder.open(DIGEST, obtain=obtain)
        recorder.open(DIGEST, obtain=obtain, wanted=True)
        await asyncio.wait_for(begun.over.wait(), 10)
        assert store.held(DIGEST) is not None

    play(tmp_path, scenario)


def test_a_bug_fails_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for ever, and the log has the place."""

    def slip(*_arguments: object) -> None:
        raise ZeroDivisionError

    async def scenario(_: Store, recorder: Recorder) -> None:
        monkeypatch.setattr(Ingest, "mark", slip)
        recording = recorder.open(DIGEST, obtain=obtain, wanted=True)
        await asyncio.wait_for(recording.over.wait(), 10)
        with pytest.raises(StoreError, match="ZeroDivisionError"):
            recording.check()

    play(tmp_path, scenario)
    assert "in slip" in caplog.text
