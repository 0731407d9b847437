"""relay: one response for readers at about the same place; against a supply that counts what is asked of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import wraps
from typing import Any, cast

import pytest

from pullthrough.core.errors import UnexpectedResponse, UpstreamUnreachable
from pullthrough.recording import relay as module
from pullthrough.recording import retry_policy
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.plan import Line
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.relay import Relay, Relays

MIB = 1 << 20
SIZE = 8 * MIB
BATCH = 64 << 10
BLOB = bytes(range(256)) * (SIZE // 256)


class Stream:
    """A response that brings BATCH bytes at a time while its supply lets it."""

    near = False

    def __init__(self, blob_source: "FakeSupply", start: int, stop: int) -> None:
        self.start = start
        self._stop = stop
        self._blob_source = blob_source

    async def batches(self) -> AsyncIterator[bytes]:
        for offset in range(self.start, self._stop, BATCH):
            await self._blob_source.gate.wait()
            if self._blob_source.failures:
                raise self._blob_source.failures.pop()
            await asyncio.sleep(0)
            self._blob_source.read += BATCH
            yield BLOB[offset : min(offset + BATCH, self._stop)]

    def close(self) -> None:
        self._blob_source.open_now -= 1


class FakeSupply:
    """Remembers which intervals were asked for."""

    def __init__(self, *failures: Exception) -> None:
        self.asked: list[tuple[int, int]] = []
        self.failures = list(failures)
        self.read = 0
        self.open_now = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def source(self) -> None:
        return None

    def failed(self, source: None, error: Exception, *, silent_s: float) -> None:
        pass

    def slot(self, source: None) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    async def open(self, source: None, start: int, stop: int, *, length: int) -> Stream:
        assert length == SIZE
        self.asked.append((start, stop))
        self.open_now += 1
        return Stream(self, start, stop)


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def relays(blob_source: FakeSupply) -> Relays:
    return Relays(cast(BlobSource, blob_source), Line(4, RateLimit(None)), SIZE)


async def drain(relay: Relay, stop: int | None = None) -> None:
    """Read to the end, or up to `stop`; every byte is the right one."""
    while relay.position < (stop or relay.stop):
        start = relay.position
        data = await relay.next(100_000, 1.0)
        assert data == BLOB[start : start + len(data)]


@on_loop
async def test_one_response_for_many() -> None:
    """Four readers of the same interval, one of them later, cost one response."""
    blob_source = FakeSupply()
    shared = relays(blob_source)
    first, *others = (Relay(shared, 100, SIZE - 7) for _ in range(4))
    await drain(first, 3 * MIB)
    await asyncio.gather(*(drain(relay) for relay in (first, *others)))
    assert blob_source.asked == [(100, SIZE - 7)]
    for relay in (first, *others):
        relay.close()
    await asyncio.sleep(0)
    assert (shared.lines, blob_source.open_now) == ([], 0)


@on_loop
async def test_who_falls_out_has_a_response_of_its_own() -> None:
    """Of a narrow window; and nothing more is kept than it holds."""
    blob_source = FakeSupply()
    shared = relays(blob_source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", MIB)
        fast, slow = Relay(shared, 0, SIZE), Relay(shared, 0, SIZE)
        await drain(slow, 50_000)
        await drain(fast, 5 * MIB)
        kept = sum(len(data) for line in shared.lines for data in line._kept)
        assert kept <= MIB + BATCH
        await asyncio.gather(drain(slow), drain(fast))
    assert blob_source.asked[0] == (0, SIZE)
    assert len(blob_source.asked) == 2
    fast.close()
    slow.close()


@on_loop
async def test_a_response_is_read_no_further_than_it_is_wanted() -> None:
    """A reader that takes nothing holds the response back."""
    blob_source = FakeSupply()
    relay = Relay(relays(blob_source), 0, SIZE)
    await drain(relay, 1)
    for _ in range(500):
        await asyncio.sleep(0)
    assert relay.position + module.AHEAD <= blob_source.read <= relay.position + module.AHEAD + 2 * BATCH
    relay.close()


@on_loop
async def test_other_ends() -> None:
    """A reader that needs more than the response brings goes on with another; one that needs less just ends."""
    blob_source = FakeSupply()
    shared = relays(blob_source)
    short, long = Relay(shared, 0, MIB), Relay(shared, 0, 2 * MIB)
    await asyncio.gather(drain(short), drain(long))
    assert sorted(blob_source.asked) == [(0, MIB), (MIB, 2 * MIB)]
    short.close()
    long.close()


@on_loop
async def test_the_leader_may_leave() -> None:
    """The others go on with its response; the last one ends it."""
    blob_source = FakeSupply()
    shared = relays(blob_source)
    leader, follower = Relay(shared, 0, SIZE), Relay(shared, 0, SIZE)
    await asyncio.gather(drain(leader, 2 * MIB), drain(follower, MIB))
    leader.close()
    await drain(follower)
    assert len(blob_source.asked) == 1
    follower.close()


@on_loop
async def test_failures() -> None:
    """One is tried again from the next byte; what does not end is raised to all readers."""
    blob_source = FakeSupply(UpstreamUnreachable("reset"))
    relay = Relay(relays(blob_source), 10, 2 * MIB)
    await drain(relay)
    assert blob_source.asked == [(10, 2 * MIB), (10, 2 * MIB)]
    relay.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry_policy, "MAX_UNEXPECTED", 0)
        blob_source = FakeSupply(*(UnexpectedResponse("lie") for _ in range(3)))
        shared = relays(blob_source)
        readers = [Relay(shared, 0, SIZE) for _ in range(2)]
        for result in await asyncio.gather(*map(drain, readers), return_exceptions=True):
            assert isinstance(result, UnexpectedResponse)


@on_loop
async def test_silence_is_told() -> None:
    """Nothing within the time: no byte, and the reader may look after its client."""
    blob_source = FakeSupply()
    blob_source.gate.clear()
    relay = Relay(relays(blob_source), 0, SIZE)
    assert await relay.next(100, 0.01) == b""
    blob_source.gate.set()
    await drain(relay, 1000)
    relay.close()
