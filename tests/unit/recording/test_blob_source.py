"""blob_source: the fleet's sources first, upstream's when they fail, and no validator across the two."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from pullthrough.core.errors import SourceExpired, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from pullthrough.fleet.nearby_sources import NearbySources
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.retry_policy import NEAR_SILENT_S
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.data_stream import Source

NEAR = Source("http://tier.example/blob", near=True)
GIVEN = Source("https://cdn.example/given")
OBTAINED = Source("https://cdn.example/obtained")


class FakeNearby:
    """Has one source, until it has failed."""

    def __init__(self, *, is_public: bool = True) -> None:
        self.is_public = is_public
        self.failures = 0

    async def source(self) -> Source | None:
        return NEAR if not self.failures else None

    def failed(self) -> None:
        self.failures += 1


class FakeUpstream:
    """Remembers the validators that responses were held against; what has expired is refused."""

    def __init__(self) -> None:
        self.validators: list[str | None] = []
        self.expired: list[Source] = []

    async def open_range(self, source: Source, start: int, stop: int, **asked: Any) -> Any:
        self.validators.append(asked["validator"])
        if source in self.expired:
            raise SourceExpired(403)

        class Stream:
            validator = None if source.near else '"v1"'

        Stream.source = source  # type: ignore[attr-defined]
        return Stream()


def supply_of(nearby: FakeNearby | None, *, given: Source | None = GIVEN) -> tuple[BlobSource, FakeUpstream, list[str]]:
    asked: list[str] = []
    upstream = FakeUpstream()

    async def obtain() -> Source:
        asked.append("upstream")
        if nearby is not None:
            nearby.is_public = True
        return OBTAINED

    blob_source = BlobSource(
        cast(Upstream, upstream), cast(Callable[[], Awaitable[Source]], obtain), given, cast(NearbySources, nearby)
    )
    return blob_source, upstream, asked


def test_a_late_failure_is_nobodys() -> None:
    """If all who wait for a source have left, its failure is not told as an error that was lost."""

    async def run() -> None:
        gate, lost = asyncio.Event(), list[Any]()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: lost.append(context))

        async def obtain() -> Source:
            await gate.wait()
            raise UpstreamUnreachable("reset")

        blob_source = BlobSource(cast(Upstream, FakeUpstream()), cast(Any, obtain), None, None)
        waiting = loop.create_task(blob_source.source())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        gate.set()
        for _ in range(3):
            await asyncio.sleep(0)
        del blob_source, waiting
        gc.collect()
        assert lost == []

    asyncio.run(run())


def test_fleet_first_then_what_was_given() -> None:
    """Upstream is not asked as long as anything else is at hand."""

    async def run() -> None:
        blob_source, _, asked = supply_of(FakeNearby())
        assert await blob_source.source() is NEAR
        blob_source.failed(NEAR, UpstreamUnreachable("reset"), silent_s=0.0)
        assert await blob_source.source() is GIVEN
        assert asked == []

    asyncio.run(run())


def test_unknown_blob_is_asked_for_upstream_first() -> None:
    """Only upstream's word makes a blob public; what it gave is kept for later."""

    async def run() -> None:
        blob_source, _, asked = supply_of(FakeNearby(is_public=False), given=None)
        assert await blob_source.source() is NEAR
        blob_source.failed(NEAR, UpstreamUnreachable("reset"), silent_s=0.0)
        assert await blob_source.source() is OBTAINED
        assert asked == ["upstream"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "silent_s", "kept"),
    [
        pytest.param(UpstreamTimeout("slow"), 0.0, True, id="one-slow-connection-among-others"),
        pytest.param(UpstreamTimeout("silent"), NEAR_SILENT_S, False, id="silent"),
        pytest.param(UpstreamUnreachable("reset"), 0.0, False, id="reset"),
    ],
)
def test_when_a_source_of_the_fleet_is_let_go(error: UpstreamError, silent_s: float, kept: bool) -> None:
    """And once only, however many connections fail with it."""

    async def run() -> None:
        nearby = FakeNearby()
        blob_source, _, _ = supply_of(nearby)
        source = await blob_source.source()
        for _ in range(16):
            blob_source.failed(source, error, silent_s=silent_s)
        assert ((await blob_source.source()) is NEAR, nearby.failures) == (kept, 0 if kept else 1)

    asyncio.run(run())


def test_sources_of_the_fleet_are_held_against_no_validator() -> None:
    """An object store's entity tag is not the CDN's; the CDN's holds as ever."""

    async def run() -> None:
        blob_source, upstream, _ = supply_of(FakeNearby())
        await blob_source.open(NEAR, 0, 1, length=None)
        await blob_source.open(GIVEN, 0, 1, length=None)
        await blob_source.open(GIVEN, 1, 2, length=None)
        await blob_source.open(NEAR, 2, 3, length=None)
        assert upstream.validators == [None, None, '"v1"', None]

    asyncio.run(run())


@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize("nearby", [None, FakeNearby])
def test_what_was_given_and_has_expired_is_obtained_again(nearby: type[FakeNearby] | None, is_eager: bool) -> None:
    """Also where the loop runs a new task at once, as mitmproxy's: the task is over before anybody has its name."""

    async def run() -> None:
        if is_eager:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        near = nearby() if nearby is not None else None
        blob_source, upstream, asked = supply_of(near)
        if near is not None:
            near.failures = 1
        source = await blob_source.source()
        assert (source, asked) == (GIVEN, [])
        upstream.expired.append(GIVEN)
        with pytest.raises(SourceExpired):
            await blob_source.open(source, 0, 1, length=None)
        assert (await blob_source.source(), asked) == (OBTAINED, ["upstream"])

    asyncio.run(run())


@pytest.mark.parametrize(("given_proves", "proven"), [(True, ["given"]), (False, [])])
def test_a_source_proves_only_what_came_from_it_alone(given_proves: bool, proven: list[str]) -> None:
    """Bytes that took credentials do not show that everybody gets the blob from the source that came after."""
    seen: list[str] = []

    async def scenario(*, expires: bool) -> list[str]:
        seen.clear()
        upstream = FakeUpstream()
        given = Source("https://cdn.example/given", proves=(lambda: seen.append("given")) if given_proves else None)

        async def obtain() -> Source:
            return Source("https://cdn.example/obtained", proves=lambda: seen.append("obtained"))

        blob_source = BlobSource(cast(Upstream, upstream), obtain, given)
        await blob_source.open(await blob_source.source(), 0, 1, length=2)
        if expires:
            upstream.expired.append(given)
            with pytest.raises(SourceExpired):
                await blob_source.open(given, 1, 2, length=2)
            await blob_source.open(await blob_source.source(), 1, 2, length=2)
        blob_source.prove()
        return seen

    assert asyncio.run(scenario(expires=False)) == proven
    assert asyncio.run(scenario(expires=True)) == []
