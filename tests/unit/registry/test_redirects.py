"""redirects: where a client is sent that may ask past this proxy, and what that costs the registry."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.digest import Digest
from pullthrough.core.errors import Offline, UpstreamError, UpstreamRefused, UpstreamTimeout, UpstreamUnreachable
from pullthrough.core.routes import BlobRoute, canonical_path
from pullthrough.registry import redirects
from pullthrough.registry.grants import Grant, Grants
from pullthrough.registry.messages import Request
from pullthrough.registry.redirects import AHEAD, AHEAD_AT_ONCE, Redirects
from pullthrough.registry.signed_urls import SignedUrls
from pullthrough.upstream.client import DEADLINE_S, Upstream
from pullthrough.upstream.data_stream import Source
from tests.unit.registry.test_signed_urls import FakeLedger

REGISTRY = "registry.ollama.ai"
A = Digest("a" * 64)
NEW = {"user-agent": "ollama/0.41.0 (amd64 linux) Go/go1.27"}
BYPASSING = {"user-agent": "ollama/0.40.2 (amd64 linux) Go/go1.27"}


def signed(digest: Digest = A, *, age_s: float = 0.0, number: int = 0) -> str:
    date = datetime.fromtimestamp(time.time() - age_s, UTC).strftime("%Y%m%dT%H%M%SZ")
    query = f"X-Amz-Date={date}&X-Amz-Expires=86400&X-Amz-Signature={number:02x}"
    return f"https://{R2_HOST}{canonical_path(digest)}?{query}"


def request(headers: dict[str, str] = NEW, host: str = REGISTRY) -> Request:
    return Request("GET", "https", host, "/", headers, client="10.0.0.2", tunnelled=True)


class FakeGrants:
    """A registry that answers with `says`."""

    def __init__(self) -> None:
        self.says: Callable[[Digest], str | None] = signed
        self.error: UpstreamError | None = None
        self.known = True
        self.public = True
        self.asked: list[Digest] = []
        self.open = asyncio.Event()
        self.open.set()
        self.at_once = self.most_at_once = 0

    def is_public(self, *_: Any) -> bool:
        return self.known

    async def obtain(self, _request: Request, pair: BlobRoute, **_: Any) -> Grant:
        self.asked.append(pair.digest)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.open.wait()
            await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise self.error
        location = self.says(pair.digest)
        return Grant(Source(location or "https://x"), None, cast(Any, None), location, public=self.public)


class FakeUpstream:
    def __init__(self) -> None:
        self.down: set[str] = set()

    def is_up(self, host: str) -> bool:
        return host not in self.down

    def mark_down(self, host: str, _seconds: float) -> None:
        self.down.add(host)


class Scene:
    def __init__(self, **options: str) -> None:
        self.grants = FakeGrants()
        self.upstream = FakeUpstream()
        self.recorded: list[Digest] = []
        settings = parse_settings(options, dir=Path("/d"), certs=Path("/c"))
        self.addresses = SignedUrls(b"s" * 32, cast(Any, FakeLedger()), lambda _: True)
        self.redirects = Redirects(
            settings, cast(Upstream, self.upstream), cast(Grants, self.grants), self.addresses, self._record
        )

    async def _record(self, digest: Digest, _grant: Grant) -> None:
        self.recorded.append(digest)

    async def ask(self, headers: dict[str, str] = NEW, *, held: bool = True, digest: Digest = A) -> str | None:
        return await self.redirects.location(request(headers), BlobRoute("library/m", digest), held=held)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_the_registry_is_asked_once_in_half_a_day() -> None:
    """Whoever may have the blob shares the address; who may not, by what is known here, asks for himself."""

    async def scenario() -> None:
        scene = Scene()
        first = await scene.ask()
        assert first is not None and await scene.ask() == first
        assert scene.addresses.recognise(R2_HOST, first.removeprefix(f"https://{R2_HOST}"), now=time.time())
        scene.grants.known = False
        await scene.ask()
        assert scene.grants.asked == [A, A]

    run(scenario)


def test_a_fresh_one_is_asked_for() -> None:
    """Whoever comes again without having used the last one; where the registry is away, that one is all there is."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.says = lambda digest: signed(digest, number=len(scene.grants.asked))
        first = await scene.ask()
        second = await scene.redirects.location(request(), BlobRoute("library/m", A), held=True, fresh=True)
        assert second != first and await scene.ask() == second
        scene.grants.error = UpstreamUnreachable("gone")
        assert await scene.redirects.location(request(), BlobRoute("library/m", A), held=True, fresh=True) == second

    run(scenario)


def test_less_than_half_a_day_is_too_little() -> None:
    """A client that fetches past the cache cannot refresh an address within its pull."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.says = lambda digest: signed(digest, age_s=43_201, number=len(scene.grants.asked))
        assert await scene.ask() != await scene.ask()

    run(scenario)


def test_private_ones_are_not_shared() -> None:
    """What took credentials is asked for again by the next caller."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.public = False
        await scene.ask()
        await scene.ask()
        assert len(scene.grants.asked) == 2

    run(scenario)


def test_all_who_wait_share_one_question() -> None:
    """Forty machines that begin at nine."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.open.clear()
        waiting = [asyncio.ensure_future(scene.ask(held=False)) for _ in range(40)]
        await asyncio.sleep(0)
        scene.grants.open.set()
        assert len(set(await asyncio.gather(*waiting))) == len(scene.grants.asked) == 1

    run(scenario)


@pytest.mark.parametrize(
    "location",
    [
        pytest.param(None, id="bytes-and-no-redirect"),
        pytest.param(f"https://{R2_HOST}{canonical_path(A)}?size=1&expires=2&access=ab", id="another-caches-own"),
        pytest.param(f"http://10.0.0.9:9200{canonical_path(A)}", id="a-plain-port"),
        pytest.param("https://10.0.0.9/blob", id="an-address"),
        pytest.param("https://mirror/blob", id="a-machine-of-the-lan"),
        pytest.param(f"https://{REGISTRY}/blob?again", id="the-registry-itself"),
    ],
)
def test_nothing_signed_means_ours(location: str | None) -> None:
    """Then it is recorded as ever, since the registry has been asked."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.says = lambda _: location
        assert await scene.ask() is None
        assert scene.recorded == [A]

    run(scenario)


def test_a_foreign_host_is_handed_on(caplog: pytest.LogCaptureFixture) -> None:
    """Unchanged, with one warning that names it and nothing of the query; it is not recognised."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.says = lambda _: "https://cdn.example/blob?token=secret"
        assert await scene.ask() == await scene.ask() == "https://cdn.example/blob?token=secret"
        assert not scene.recorded
        assert scene.addresses.recognise("cdn.example", "/blob?token=secret", now=time.time()) is None

    run(scenario)
    warnings = [line for line in caplog.messages if "cdn.example" in line]
    assert len(warnings) == 1 and "cannot be cached" in warnings[0] and "secret" not in caplog.text


def test_a_second_registry_is_recognised() -> None:
    """hf.co sends to huggingface.co with a token of ten minutes: asked for anew each time, recognised for longer."""

    async def scenario() -> None:
        scene = Scene(registries="hf.co,huggingface.co", front="")
        target = f"/v2/a/b/blobs/{A}?__sign=jwt"
        scene.grants.says = lambda _: f"https://huggingface.co{target}"
        pair = BlobRoute("a/b", A)
        for _ in range(2):
            assert await scene.redirects.location(request(host="hf.co"), pair, held=True)
        assert len(scene.grants.asked) == 2
        found = scene.addresses.recognise("huggingface.co", target, now=time.time() + 3600)
        assert found is not None and found.digest == A

    run(scenario)


def test_an_address_of_a_second_registry_without_a_token() -> None:
    """It could not be told from any other request there."""

    async def scenario() -> None:
        scene = Scene(registries="hf.co,huggingface.co", front="")
        scene.grants.says = lambda _: f"https://huggingface.co/v2/a/b/blobs/{A}"
        assert await scene.redirects.location(request(host="hf.co"), BlobRoute("a/b", A), held=True) is None
        assert scene.recorded == [A]

    run(scenario)


@pytest.mark.parametrize("error", [UpstreamUnreachable("gone"), UpstreamTimeout("late"), Offline("offline")])
def test_the_registry_is_away(error: UpstreamError) -> None:
    """A remembered address with little left, else ours where the bytes are known, else the error."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.error = error
        assert await scene.ask() is None
        with pytest.raises(type(error)):
            await scene.ask(held=False)
        scene.upstream.down.clear()
        old = signed(age_s=80_000)
        expires = time.time() + 6_400
        scene.addresses.add(A, old, expires=expires, public=True, obtain=cast(Any, None), now=time.time())
        assert await scene.ask(held=False) == old
        scene.grants.known = False
        assert await scene.ask() is None

    run(scenario)


def test_a_registry_that_is_down_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next blobs of the same pull are answered at once; a client that is known to bypass waits longer."""
    monkeypatch.setattr(redirects, "REVALIDATE_TIMEOUT_S", 0.02)
    monkeypatch.setattr(redirects, "PATIENCE_S", 30.0)

    async def scenario() -> None:
        scene = Scene()
        scene.grants.open.clear()
        assert await scene.ask() is None
        assert await scene.ask() is None
        assert (len(scene.grants.asked), scene.upstream.down) == (1, {REGISTRY})
        scene.upstream.down.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scene.ask(BYPASSING), 0.3)

    run(scenario)


@pytest.mark.parametrize(
    ("status", "held", "ours"),
    [(404, True, True), (404, False, False), (401, True, False), (403, True, False), (429, True, True)],
)
def test_refusals(status: int, held: bool, ours: bool) -> None:
    """A registry's no is passed on; what it has withdrawn, or is too busy for, is served as it is stored."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.error = UpstreamRefused(status, ())
        with contextlib.nullcontext() if ours else pytest.raises(UpstreamRefused):
            assert await scene.ask(held=held) is None
        assert not scene.upstream.down

    run(scenario)


def digests(count: int) -> list[Digest]:
    return [Digest(f"{number:064x}") for number in range(count)]


async def prepared(scene: Scene, wanted: list[Digest]) -> None:
    scene.redirects.prepare(request(), "library/m", wanted)
    await asyncio.gather(*scene.redirects._ahead.values())
    await asyncio.sleep(0)


def test_addresses_are_obtained_ahead() -> None:
    """At most so many, four at a time, and none that is there; the client's own request asks no more."""

    async def scenario() -> None:
        scene = Scene()
        wanted = digests(AHEAD + 4)
        await prepared(scene, wanted)
        assert scene.grants.asked == wanted[:AHEAD]
        assert scene.grants.most_at_once == AHEAD_AT_ONCE
        assert await scene.ask(digest=wanted[0])
        await prepared(scene, wanted)
        assert scene.grants.asked == wanted

    run(scenario)


def test_the_client_joins_what_is_asked_ahead() -> None:
    """Its request for a layer waits for the answer that is on its way."""

    async def scenario() -> None:
        scene = Scene()
        scene.grants.open.clear()
        scene.redirects.prepare(request(), "library/m", [A])
        asking = asyncio.ensure_future(scene.ask(held=False))
        await asyncio.sleep(0.01)
        scene.grants.open.set()
        assert await asking and scene.grants.asked == [A]

    run(scenario)


@pytest.mark.parametrize("trouble", ["429", "away", "bytes"])
def test_ahead_ends_with_the_first_trouble(trouble: str) -> None:
    """A registry that has enough is left alone, and one that redirects nowhere is not asked for all blobs."""

    async def scenario() -> None:
        scene = Scene()
        errors = {"429": UpstreamRefused(429, ()), "away": UpstreamUnreachable("gone")}
        scene.grants.error = errors.get(trouble)
        scene.grants.says = lambda _: None
        wanted = digests(AHEAD)
        await prepared(scene, wanted)
        assert scene.grants.asked == wanted[:AHEAD_AT_ONCE]
        assert not scene.recorded, "expected no bytes of what no client has asked for"
        await prepared(scene, wanted)
        assert len(scene.grants.asked) == AHEAD_AT_ONCE * (2 if trouble == "away" else 1)
        scene.redirects.prepare(request(host="other.example"), "library/m", wanted)
        await asyncio.gather(*scene.redirects._ahead.values())
        assert len(scene.grants.asked) == AHEAD_AT_ONCE * (3 if trouble == "away" else 2)

    run(scenario)


def test_nothing_is_asked_ahead_offline() -> None:
    """Nor of a registry that is down."""

    async def scenario() -> None:
        scene = Scene(offline="true")
        await prepared(scene, [A])
        down = Scene()
        down.upstream.down.add(REGISTRY)
        await prepared(down, [A])
        assert scene.grants.asked == down.grants.asked == []

    run(scenario)


def test_a_hiccup_of_others_breaks_no_pull() -> None:
    """The registry was slow for somebody else: who is known to bypass has no use for ours, and asks all the same."""

    async def scenario() -> None:
        scene = Scene()
        scene.upstream.down.add(REGISTRY)
        assert await scene.ask() is None and not scene.grants.asked
        old = signed(age_s=80_000)
        scene.addresses.add(A, old, expires=time.time() + 6_400, public=True, obtain=cast(Any, None), now=time.time())
        assert await scene.ask(BYPASSING) == old and not scene.grants.asked
        scene.grants.known = False
        assert await scene.ask(BYPASSING) and scene.grants.asked == [A]

    run(scenario)


def test_a_registry_that_hangs_leaves_time_for_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole answer has a deadline of its own, which comes later."""
    assert redirects.PATIENCE_S <= DEADLINE_S - 4
    monkeypatch.setattr(redirects, "PATIENCE_S", 0.02)

    async def scenario() -> None:
        scene = Scene()
        scene.grants.open.clear()
        assert await scene.ask(BYPASSING) is None
        with pytest.raises(UpstreamTimeout):
            await scene.ask(BYPASSING, held=False)
        old = signed(age_s=80_000)
        scene.addresses.add(A, old, expires=time.time() + 6_400, public=True, obtain=cast(Any, None), now=time.time())
        scene.upstream.down.clear()
        assert await scene.ask(BYPASSING) == old

    run(scenario)
