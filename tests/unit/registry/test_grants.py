"""grants: what of an answer is a registry's yes, to whom it counts, and what it takes back."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.digest import EMPTY, Digest
from pullthrough.core.errors import (
    Disagreement,
    NotTheRegistry,
    SourceExpired,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pullthrough.core.routes import BlobRoute, canonical_path
from pullthrough.registry import grants
from pullthrough.registry.grants import Grants, attempts
from pullthrough.registry.messages import Request
from pullthrough.upstream.data_stream import Source

HOST = "registry.ollama.ai"
A = Digest("a" * 64)
PAIR = BlobRoute("library/m", A)
OURS = f"https://{R2_HOST}{canonical_path(A)}?X-Amz-Signature=00"
ELSEWHERE = "https://cdn.example/blob"
TOKEN = "Bearer secret"


def request(authorization: str | None = None) -> Request:
    headers = {"user-agent": "ollama/0.34.4"} | ({"authorization": authorization} if authorization else {})
    return Request("GET", "https", HOST, "/", headers, client="10.0.0.2")


class FakeStore:
    """What is known of one blob."""

    def __init__(self) -> None:
        self.public = False
        self.denied: list[str] = []
        self.claims: set[int] = set()
        self.is_over = False
        self.held_size: int | None = None

    def blob(self, _digest: Digest) -> Any:
        return SimpleNamespace(public=self.public)

    def is_member(self, *_: Any) -> bool:
        return self.public

    def moment(self, *_: Any) -> Any:
        return SimpleNamespace(is_over=self.is_over)

    def confirm_public(self, *_: Any) -> None:
        self.public = True

    def deny(self, _host: str, repository: str) -> bool:
        self.denied.append(repository)
        return True

    def repositories(self, _digest: Digest) -> list[tuple[str, str]]:
        return [(HOST, PAIR.repository)] if self.public else []

    def open_blob(self, _digest: Digest) -> None:
        return None

    def held(self, _digest: Digest) -> Any:
        return SimpleNamespace(size=self.held_size) if self.held_size is not None else None

    def manifests_of(self, *_: Any, private: bool) -> dict[int, Any]:
        assert private
        return {size: SimpleNamespace(claim=lambda _digest, size=size: size) for size in self.claims}


class FakeStream:
    """A response with these bytes from the start."""

    source = None
    start = 0

    def __init__(self, data: bytes) -> None:
        self.data, self.length, self.closed = data, len(data), False

    async def first(self, count: int) -> bytes:
        self.closed = True
        return self.data[:count]

    def close(self) -> None:
        self.closed = True


class FakeUpstream:
    """A registry that redirects to `location`, or gives `stream`; behind a redirect there is `behind`."""

    def __init__(self) -> None:
        self.location = OURS
        self.stream: FakeStream | None = None
        self.behind: list[FakeStream | Exception] = []
        self.refusals: dict[str | None, int] = {}
        self.asked: list[str | None] = []
        self.impostors = SimpleNamespace(
            disagreeing=lambda _host, what, _detail: Disagreement(what),
            displaced=lambda _host, what: NotTheRegistry(what),
        )

    async def obtain(self, _host: str, _repository: str, _digest: Digest, headers: Any, **_: Any) -> Any:
        authorization = headers.get("Authorization")
        self.asked.append(authorization)
        if (status := self.refusals.get(authorization)) is not None:
            raise UpstreamRefused(status, [])
        return Source(self.location), self.stream

    async def open_range(self, *_: Any, **__: Any) -> FakeStream:
        match self.behind.pop(0):
            case FakeStream() as stream:
                return stream
            case Exception() as error:
                raise error


class Scene:
    def __init__(self) -> None:
        self.store, self.upstream = FakeStore(), FakeUpstream()
        settings = parse_settings({}, dir=Path("/d"), certs=Path("/c"))
        self.grants = Grants(settings, self.store, self.upstream)  # type: ignore[arg-type]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(grants, "PAUSES_S", (0.0,))
    return Scene()


def test_the_blob_hosts_own_address_is_a_yes_to_everybody(scene: Scene) -> None:
    """No byte is looked at, and no credentials are used that nobody asked for."""
    grant = asyncio.run(scene.grants.obtain(request(TOKEN), PAIR))
    assert (grant.location, grant.public, grant.source.proves) == (OURS, True, None)
    assert scene.upstream.asked == [None]
    assert scene.grants.is_public(HOST, PAIR) and scene.grants.holds(request(), PAIR)


def test_what_took_credentials_counts_for_them_alone(scene: Scene) -> None:
    """The repository is private from now on, and another token has to ask for itself."""
    scene.upstream.refusals[None] = 401
    grant = asyncio.run(scene.grants.obtain(request(TOKEN), PAIR))
    assert not grant.public and scene.store.denied[0] == PAIR.repository and not scene.store.public
    assert scene.grants.holds(request(TOKEN), PAIR)
    assert not scene.grants.holds(request("Bearer other"), PAIR) and not scene.grants.holds(request(), PAIR)


def test_a_refusal_of_all_tries(scene: Scene) -> None:
    """The last one is told: it is the answer to the caller's own credentials."""
    scene.upstream.refusals |= {None: 401, TOKEN: 403}
    with pytest.raises(UpstreamRefused) as caught:
        asyncio.run(scene.grants.obtain(request(TOKEN), PAIR))
    assert caught.value.status_hint == 403 and scene.upstream.asked == [None, TOKEN]


def test_too_many_requests_are_no_refusal(scene: Scene) -> None:
    """429 says nothing of who may have the blob: no second try, and nothing becomes private."""
    scene.upstream.refusals[None] = 429
    with pytest.raises(UpstreamRefused):
        asyncio.run(scene.grants.obtain(request(TOKEN), PAIR))
    assert (scene.upstream.asked, scene.store.denied) == ([None], [])


def test_a_yes_that_a_refusal_has_overtaken(scene: Scene) -> None:
    """What was asked before the refusal does not make the blob public again."""
    scene.store.is_over = True
    asyncio.run(scene.grants.obtain(request(), PAIR))
    assert not scene.store.public


def test_an_unknown_blob_counts_once_all_of_it_has_come(scene: Scene) -> None:
    """A redirect elsewhere is looked behind; what is there may be a page, until its digest is right."""
    scene.upstream.location = ELSEWHERE
    scene.upstream.behind = [FakeStream(b"bytes")]
    grant = asyncio.run(scene.grants.obtain(request(), PAIR))
    assert not scene.store.public and grant.source.proves is not None
    grant.source.proves()
    assert scene.store.public


def test_a_claimed_size_is_proof_enough(scene: Scene) -> None:
    """A manifest of the repository claims the size, and what comes has it."""
    scene.store.claims = {5}
    scene.upstream.location, scene.upstream.behind = ELSEWHERE, [FakeStream(b"bytes")]
    grant = asyncio.run(scene.grants.obtain(request(), PAIR))
    assert scene.store.public and grant.source.proves is None


def test_a_blob_that_came_while_the_registry_was_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is no proof: what came with credentials meanwhile would become public by any page of that length."""
    real = scene.upstream.obtain

    async def obtain(*arguments: Any, **options: Any) -> Any:
        scene.store.held_size = 5
        return await real(*arguments, **options)

    monkeypatch.setattr(scene.upstream, "obtain", obtain)
    scene.upstream.stream = FakeStream(b"lying")
    grant = asyncio.run(scene.grants.obtain(request(), PAIR))
    assert not scene.store.public and grant.source.proves is not None


def test_another_length_than_claimed_is_somebody_elses_answer(scene: Scene) -> None:
    """It grants nothing, and the response is given up."""
    scene.store.claims = {6}
    page = FakeStream(b"a login page")
    scene.upstream.location, scene.upstream.behind = ELSEWHERE, [page]
    with pytest.raises(Disagreement, match="another length"):
        asyncio.run(scene.grants.obtain(request(), PAIR))
    assert page.closed and not scene.store.public


@pytest.mark.parametrize(
    ("behind", "raised"),
    [
        ([SourceExpired(403, [])], UpstreamRefused),
        ([SourceExpired(403, what="text/html")], NotTheRegistry),
        ([UpstreamTimeout("a"), UpstreamUnreachable("b")], UpstreamUnreachable),
    ],
)
def test_behind_a_redirect(scene: Scene, behind: list[FakeStream | Exception], raised: type[Exception]) -> None:
    """A refusal there is the registry's, a page is nobody's, and what fails is tried again."""
    scene.upstream.location, scene.upstream.behind = ELSEWHERE, behind
    with pytest.raises(raised):
        asyncio.run(scene.grants.obtain(request(), PAIR))
    assert behind == [] and not scene.store.public


def test_a_caller_is_sent_only_where_a_blob_has_come_from(scene: Scene) -> None:
    """The first redirect to a host is looked behind, later ones are handed on as they are."""
    scene.upstream.location, scene.upstream.behind = ELSEWHERE, [FakeStream(b"bytes")]
    for _ in range(2):
        grant = asyncio.run(scene.grants.obtain(request(), PAIR, hands_on=lambda _location: True))
        assert grant.location == ELSEWHERE
    assert scene.upstream.behind == []


def test_a_source_for_everybody(scene: Scene) -> None:
    """Any repository that has the blob in public gives one; nobody's token is used."""
    with pytest.raises(UpstreamUnreachable, match="no repository is known"):
        asyncio.run(scene.grants.source(A))
    scene.store.public = True
    assert asyncio.run(scene.grants.source(A)).url == OURS
    assert scene.upstream.asked == [None]


def test_a_source_again_for_who_was_granted_it(scene: Scene) -> None:
    """In public where that is possible, else with the credentials that were used before."""
    scene.upstream.refusals[None] = 401

    async def scenario() -> None:
        grant = await scene.grants.obtain(request(TOKEN), PAIR)
        scene.upstream.asked.clear()
        assert (await grant.again()).url == OURS

    asyncio.run(scenario())
    assert scene.upstream.asked[-1] == TOKEN


def test_the_places_that_are_remembered_are_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that was likely somewhere is asked for there; of many, the first are forgotten."""
    monkeypatch.setattr(grants, "MOST_LIKELY", 1)
    first, second = (Digest(letter * 64) for letter in "bc")
    scene.upstream.location = ELSEWHERE
    for digest in (first, second):
        scene.upstream.behind = [FakeStream(b"bytes")]
        asyncio.run(scene.grants.obtain(request(), BlobRoute("library/m", digest)))
    with pytest.raises(UpstreamUnreachable, match="no repository is known"):
        asyncio.run(scene.grants.source(first))
    scene.upstream.behind = [FakeStream(b"bytes")]
    assert asyncio.run(scene.grants.source(second)).url == ELSEWHERE


def test_sums_are_proof_of_a_known_length_only(scene: Scene) -> None:
    """Sums of an unknown blob at another host count once its bytes have come."""
    since = scene.grants.moment(HOST, PAIR)
    unknown = scene.grants.sums(HOST, PAIR, None, Source(ELSEWHERE), 5, since=since)
    assert unknown.proves is not None and unknown.sizes == {5} and not scene.store.public
    assert scene.grants.sums(HOST, PAIR, None, Source(OURS), 5, since=since).proves is None and scene.store.public
    scene.store.claims = {6}
    with pytest.raises(Disagreement):
        scene.grants.sums(HOST, PAIR, None, Source(OURS), 5, since=since)


def test_the_empty_blob_has_its_length() -> None:
    """Whatever a registry says of it."""
    scene = Scene()
    assert scene.grants.told(HOST, BlobRoute("library/m", EMPTY), 0) == 0
    with pytest.raises(Disagreement):
        scene.grants.told(HOST, BlobRoute("library/m", EMPTY), 1)


def test_tries() -> None:
    """The anonymous one first, and the only one where there are no credentials."""
    assert [authorization for authorization, _ in attempts(request())] == [None]
    tried = list(attempts(request(TOKEN)))
    assert [authorization for authorization, _ in tried] == [None, TOKEN]
    assert "Authorization" not in tried[0][1] and tried[1][1]["Authorization"] == TOKEN
