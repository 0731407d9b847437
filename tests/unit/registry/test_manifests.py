"""manifests: stored or asked for, relayed or kept; against an upstream and a store that only remember."""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from multidict import CIMultiDict

from pullthrough.config.options import parse_settings
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.digest import Digest
from pullthrough.core.errors import (
    AddressRefused,
    CacheError,
    UnexpectedResponse,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.records import ManifestRecord, Name, Version
from pullthrough.core.routes import ManifestRoute
from pullthrough.registry import manifests
from pullthrough.registry.freshness import DOWN_S, REVALIDATE_TIMEOUT_S
from pullthrough.registry.manifests import Manifests
from pullthrough.registry.messages import Answer, Request
from pullthrough.runtime.clock import Epoch, Moment
from pullthrough.store.store import Store
from pullthrough.upstream.client import DEADLINE_S, Response, Upstream

HOST = "registry.ollama.ai"
ROUTE = ManifestRoute("library/tiny", "latest")
NAME = Name(HOST, ROUTE.repository, ROUTE.reference)
TARGET = "/v2/library/tiny/manifests/latest"
NOW = 50_000.0  # Unix seconds
UPTIME = 700.0  # monotonic seconds at the same moment
LIFETIME = 300.0
VARY = ("Vary", "Accept")
TYPE = "text/plain; charset=utf-8"  # as the registry really sends it


def manifest(letter: str) -> bytes:
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{letter * 64}", "size": 1}
    return json.dumps({"schemaVersion": 2, "layers": [layer]}).encode()


OLD, NEW = manifest("a"), manifest("b")
PORTAL = b"<html>please log in</html>"


def response(status: int, body: bytes = b"", **fields: str) -> Response:
    return Response(status, CIMultiDict({name.replace("_", "-"): value for name, value in fields.items()}), body)


GRANTED = response(200, NEW, Content_Type=TYPE, Set_Cookie="a=b", ETag='"x"')
CHALLENGE = 'Bearer realm="https://registry.ollama.ai/token"'
DENIED = response(401, b"{}", WWW_Authenticate=CHALLENGE, Content_Type="application/json")


class FakeUpstream:
    """Gives prepared answers in turn, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: Response | CacheError) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, str, dict[str, str], float]] = []
        self.down = 0.0
        self.marked: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.head = response(405)
        self.heads = 0

    async def ask(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        if method == "HEAD":
            self.heads += 1
            return self.head
        self.asked.append((method, host, target, dict(headers), timeout_s))
        await self.gate.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, CacheError):
            raise answer
        return answer

    def down_until(self, host: str) -> float:
        assert host == HOST
        return self.down

    def mark_down(self, host: str, seconds: float) -> None:
        assert host == HOST
        self.marked.append(seconds)


class FakeStore:
    """A dictionary."""

    def __init__(self) -> None:
        self.kept: dict[Name, ManifestRecord] = {}
        self.denials = Epoch()

    def manifests(self) -> dict[Name, ManifestRecord]:
        return self.kept

    def manifest(self, name: Name) -> ManifestRecord | None:
        return self.kept.get(name)

    def manifest_by_digest(self, host: str, repository: str, digest: Digest) -> ManifestRecord | None:
        for name, record in self.kept.items():
            if (name.host, name.repository, record.digest) == (host, repository, digest.hex):
                return record
        return None

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        self.kept[name] = record

    def moment(self, host: str, repository: str) -> Moment:
        return self.denials.now((host, repository))

    def manifests_of(self, host: str, repository: str) -> dict[Name, ManifestRecord]:
        return {name: record for name, record in self.kept.items() if name.place == (host, repository)}

    def drop_manifest(self, name: Name) -> None:
        del self.kept[name]

    def drop_model(self, name: Name) -> None:
        for each in (name, name.twin):
            self.kept.pop(each, None)

    def touch(self, name: Name, now: float) -> None:
        if name in self.kept:
            self.kept[name] = self.kept[name]._replace(pulled=now)

    def deny(self, host: str, repository: str) -> bool:
        self.denials.advance((host, repository))
        changed = False
        for name, record in self.kept.items():
            if (name.host, name.repository) == (host, repository) and not record.denied:
                self.kept[name] = record._replace(denied=True)
                changed = True
        return changed


class World:
    """The manifests of a cache, at a time of its own."""

    def __init__(
        self,
        *answers: Response | CacheError,
        stored_ago: float | None = None,
        oldest: Version | None = None,
        **options: str,
    ) -> None:
        self.upstream = FakeUpstream(*answers)
        self.store = FakeStore()
        if stored_ago is not None:
            record = ManifestRecord.parse(OLD, TYPE, now=NOW - stored_ago)
            assert record is not None
            self.store.put_manifest(NAME, record._replace(oldest=oldest))
        settings = parse_settings({"manifest_lifetime": "5m", **options}, dir=Path("/d"), certs=Path("/c"))
        self.manifests = Manifests(settings, cast(Store, self.store), cast(Upstream, self.upstream))

    async def get(self, method: str = "GET", route: ManifestRoute = ROUTE, **headers: str) -> Answer:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.manifests.answer(Request(method, "https", HOST, TARGET, fields), route)

    def ask(self, method: str = "GET", route: ManifestRoute = ROUTE, **headers: str) -> Answer:
        return asyncio.run(self.get(method, route, **headers))

    @property
    def stored(self) -> tuple[bytes, float] | None:
        record = self.store.manifest(NAME)
        return (record.body, record.confirmed) if record is not None else None


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks stand still."""
    monkeypatch.setattr(manifests, "time", SimpleNamespace(time=lambda: NOW, monotonic=lambda: UPTIME))


def expected(body: bytes, *cache: Any, status: int = 200, **more: Any) -> Answer:
    return Answer(status, CacheStatus(*cache, **more), (("Content-Type", TYPE), VARY), body, len(body))


# --- nothing stored


def test_a_first_request_is_asked_and_stored() -> None:
    """Upstream's bytes and type, untouched; of its other fields nothing."""
    world = World(GRANTED)
    assert world.ask() == expected(NEW, Outcome.MISS, True, False, 200)
    assert world.stored == (NEW, NOW)
    assert world.upstream.asked == [("GET", HOST, TARGET, {"Accept": DOCKER_TYPE}, DEADLINE_S)]


def test_a_type_is_made_up_only_if_there_is_none() -> None:
    """A registry that names no type gave what was asked for."""
    world = World(response(200, NEW))
    assert world.ask().headers == (("Content-Type", DOCKER_TYPE), VARY)


def test_upstream_learns_the_version_of_the_client_and_nothing_else() -> None:
    """User-Agent gates some models; cookies, Accept and addresses are the client's own affair."""
    world = World(GRANTED)
    world.ask(user_agent="ollama/0.9.9 (amd64 linux)", cookie="a=b", accept="*/*", x_forwarded_for="10.0.0.1")
    assert [asked[3] for asked in world.upstream.asked] == [
        {"User-Agent": "ollama/0.9.9 (amd64 linux)", "Accept": DOCKER_TYPE}
    ]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_head_is_get_without_a_body(method: str, first: bool) -> None:
    """HEAD is answered from a GET, with the length of the body it leaves out and the digest that Ollama reads."""
    world = World(GRANTED)
    if not first:
        world.ask()
    answer = world.ask(method)
    digest = ("ollama-content-digest", hashlib.sha256(NEW).hexdigest())
    assert answer.headers == (("Content-Type", TYPE), VARY, *((digest,) if method == "HEAD" else ()))
    assert (answer.body, answer.length) == (NEW if method == "GET" else b"", len(NEW))
    assert [asked[0] for asked in world.upstream.asked] == ["GET"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412, 429, 500, 503])
def test_a_refusal_is_relayed_and_not_stored(status: int) -> None:
    """As upstream said it, its body too, without the fields that are about a connection or a session."""
    refusal = response(status, OLD, Content_Type="text/plain", Retry_After="7", Set_Cookie="a=b", Connection="close")
    world = World(refusal, GRANTED)
    answer = world.ask()
    fields = (("Content-Type", "text/plain"), ("Retry-After", "7"))
    assert answer == Answer(status, CacheStatus(Outcome.MISS, forward_status=status), fields, OLD, len(OLD))
    assert world.stored is None
    assert world.ask().body == NEW


def test_a_refusal_to_head_has_no_body() -> None:
    """But its length."""
    answer = World(DENIED).ask("HEAD")
    assert (answer.status, answer.body, answer.length) == (401, b"", 2)
    assert ("WWW-Authenticate", CHALLENGE) in answer.headers


def test_a_page_is_no_manifest() -> None:
    """A captive portal's 200 is told in our words, and nothing of it is handed on or stored."""
    world = World(response(200, PORTAL, Content_Type="text/plain"))
    answer = world.ask()
    assert answer.status == 504
    assert isinstance(answer.body, bytes) and b"expected a manifest, got 200 text/plain" in answer.body
    assert PORTAL not in answer.body
    assert world.stored is None


def test_a_document_of_another_kind_is_relayed_and_not_stored() -> None:
    """A registry may have what is not known here."""
    world = World(response(200, b'{"schemaVersion": 9}', Content_Type="application/json"))
    answer = world.ask()
    assert (answer.status, answer.body) == (200, b'{"schemaVersion": 9}')
    assert answer.cache == CacheStatus(Outcome.MISS, forward_status=200)
    assert world.stored is None


def test_a_failure_without_words_gets_ours() -> None:
    """What came with it was somebody's page, and has been left out."""
    answer = World(response(503, b"", Retry_After="7")).ask()
    assert answer.status == 503
    assert ("Retry-After", "7") in answer.headers
    assert isinstance(answer.body, bytes) and b"upstream answered 503" in answer.body


@pytest.mark.parametrize(
    "error",
    [
        UpstreamUnreachable("registry.ollama.ai: name resolution failed: no such host"),
        UpstreamTimeout("no answer in time"),
        UnexpectedResponse("expected at most 8388608 bytes, got more"),
        AddressRefused("expected a public address, got 10.0.0.1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_answer_and_nothing_stored(error: CacheError) -> None:
    """504 and an error document of the registry's shape that names the manifest and the cause."""
    world = World(error)
    answer = world.ask()
    assert (answer.status, answer.cache) == (504, CacheStatus(Outcome.MISS, detail="upstream-failed"))
    assert answer.headers == (("Content-Type", "application/json"),)
    assert isinstance(answer.body, bytes)
    assert answer.length == len(answer.body)
    (problem,) = json.loads(answer.body)["errors"]
    assert problem["code"] == "MANIFEST_UNKNOWN"
    assert problem["message"] == f"{NAME} is not recorded and upstream cannot be asked: {error}"
    # There is no copy to serve meanwhile, so that the next request asks again.
    assert world.upstream.marked == []


# --- a copy is stored


@pytest.mark.parametrize(
    ("stored_ago", "down_for", "offline", "cache"),
    [
        pytest.param(0.0, None, "false", CacheStatus(Outcome.HIT), id="just confirmed"),
        pytest.param(LIFETIME - 1, None, "false", CacheStatus(Outcome.HIT), id="fresh"),
        pytest.param(LIFETIME - 1, 5.0, "true", CacheStatus(Outcome.HIT), id="fresh, whatever is with upstream"),
        pytest.param(LIFETIME, 5.0, "false", CacheStatus(Outcome.HIT, detail="stale"), id="stale, upstream is down"),
        pytest.param(1e9, None, "true", CacheStatus(Outcome.HIT, detail="stale"), id="stale, offline"),
    ],
)
def test_served_unasked(stored_ago: float, down_for: float | None, offline: str, cache: CacheStatus) -> None:
    """A fresh copy, and a stale one while upstream cannot be asked."""
    world = World(GRANTED, stored_ago=stored_ago, offline=offline)
    if down_for is not None:
        world.upstream.down = UPTIME + down_for
    answer = world.ask()
    assert (answer.status, answer.body, answer.cache) == (200, OLD, cache)
    assert world.upstream.asked == []


@pytest.mark.parametrize(
    ("stored_ago", "down_for"),
    [
        pytest.param(LIFETIME, None, id="stale at its lifetime"),
        pytest.param(LIFETIME, -1.0, id="upstream may be asked again"),
        pytest.param(-60.0, None, id="confirmed in the future"),
    ],
)
def test_revalidated(stored_ago: float, down_for: float | None) -> None:
    """A stale copy waits three seconds for upstream, and gives way to what it says."""
    world = World(GRANTED, stored_ago=stored_ago)
    world.upstream.down = 0.0 if down_for is None else UPTIME + down_for
    assert world.ask() == expected(NEW, Outcome.STALE, True, False, 200)
    assert world.stored == (NEW, NOW)
    assert [asked[4] for asked in world.upstream.asked] == [REVALIDATE_TIMEOUT_S]


def test_an_unchanged_manifest_is_fresh_again() -> None:
    """The same bytes again: the next request is not asked."""
    world = World(response(200, OLD, Content_Type=TYPE), stored_ago=LIFETIME)
    assert world.ask() == expected(OLD, Outcome.STALE, True, False, 200)
    assert world.ask() == expected(OLD, Outcome.HIT)
    assert len(world.upstream.asked) == 1


@pytest.mark.parametrize("error", [UpstreamUnreachable("reset"), UpstreamTimeout("late")])
def test_no_answer_to_a_revalidation(error: CacheError) -> None:
    """The stored copy, however old; and upstream is left alone for a while."""
    world = World(error, stored_ago=1e9)
    assert world.ask() == expected(OLD, Outcome.STALE, detail="upstream-failed")
    assert world.stored == (OLD, NOW - 1e9)
    assert world.upstream.marked == [DOWN_S]


@pytest.mark.parametrize("status", [302, 400, 404, 408, 421, 429, 500, 502, 503, 504])
def test_a_model_that_is_withdrawn_or_cannot_be_told(status: int) -> None:
    """Served stale: what was pulled once can be pulled again. Upstream did answer, so it counts as up."""
    world = World(response(status, b"gone"), stored_ago=LIFETIME)
    assert world.ask() == expected(OLD, Outcome.STALE, forward_status=status, detail="stale")
    assert world.stored == (OLD, NOW - LIFETIME)
    assert world.upstream.marked == []


@pytest.mark.parametrize("status", [401, 403, 412])
def test_a_refusal_of_this_caller(status: int) -> None:
    """It may be gated by version or by account: the stored copy is not for everybody any more."""
    world = World(response(status, b"no", Content_Type="text/plain"), stored_ago=LIFETIME)
    answer = world.ask()
    assert (answer.status, answer.body) == (status, b"no")
    assert answer.cache == CacheStatus(Outcome.STALE, forward_status=status)


def test_an_answer_that_is_none_to_a_revalidation() -> None:
    """The stored copy, too."""
    world = World(UnexpectedResponse("expected gzip, got noise"), stored_ago=LIFETIME)
    assert world.ask() == expected(OLD, Outcome.STALE, detail="upstream-failed")


# --- versions of clients


def test_an_older_client_is_not_served_unasked() -> None:
    """Upstream refuses some models to it; the refusal changes nothing for those who were granted the manifest."""
    world = World(response(412, b"update Ollama"), stored_ago=0, oldest=(0, 10, 0))
    answer = world.ask(user_agent="ollama/0.9.9 (amd64 linux)")
    assert (answer.status, answer.body, answer.cache) == (
        412,
        b"update Ollama",
        CacheStatus(Outcome.STALE, forward_status=412),
    )
    for agent in ("ollama/0.10.0 (amd64 linux)", "ollama/0.11.0", "curl/8.5.0", "ollama/0.0.0"):
        assert world.ask(user_agent=agent) == expected(OLD, Outcome.HIT)
    assert len(world.upstream.asked) == 1


@pytest.mark.parametrize(
    ("body", "oldest", "agent", "granted"),
    [
        pytest.param(OLD, (0, 10, 0), "ollama/0.9.9", (0, 9, 9), id="the same to an older one"),
        pytest.param(OLD, (0, 10, 0), "ollama/0.34.0", (0, 10, 0), id="the same to a newer one"),
        pytest.param(OLD, (0, 10, 0), "curl/8.5.0", (0, 10, 0), id="the same to another client"),
        pytest.param(OLD, None, "ollama/0.34.0", (0, 34, 0), id="the same, the first time to an Ollama"),
        pytest.param(NEW, (0, 10, 0), "ollama/0.34.0", (0, 34, 0), id="another manifest"),
        pytest.param(NEW, (0, 10, 0), "curl/8.5.0", None, id="another manifest to another client"),
    ],
)
def test_the_oldest_version_is_remembered(
    body: bytes, oldest: Version | None, agent: str, granted: Version | None
) -> None:
    """What was granted to a version is granted to newer ones, as long as the bytes are the same."""
    world = World(response(200, body, Content_Type=TYPE), stored_ago=LIFETIME, oldest=oldest)
    assert world.ask(user_agent=agent).body == body
    assert world.store.kept[NAME].oldest == granted


# --- asked for by digest


def by_digest(body: bytes, repository: str = ROUTE.repository) -> ManifestRoute:
    return ManifestRoute(repository, f"sha256:{hashlib.sha256(body).hexdigest()}")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_digest_names_the_same_for_ever(method: str) -> None:
    """Stored under any tag it is served, however old."""
    world = World(GRANTED, stored_ago=1e9)
    answer = world.ask(method, by_digest(OLD))
    assert (answer.status, answer.cache, answer.length) == (200, CacheStatus(Outcome.HIT), len(OLD))
    assert world.upstream.asked == []


def test_a_digest_is_asked_for_and_stored() -> None:
    """Where this repository is not known to have it; that another one has it says nothing."""
    world = World(GRANTED, stored_ago=0)
    route = by_digest(NEW)
    assert world.ask(route=route) == expected(NEW, Outcome.MISS, True, False, 200)
    assert world.ask(route=route) == expected(NEW, Outcome.HIT)
    assert [asked[2] for asked in world.upstream.asked] == [f"/v2/{ROUTE.repository}/manifests/{route.reference}"]
    world.ask(route=by_digest(NEW, "library/other"))
    assert len(world.upstream.asked) == 2


def test_other_bytes_than_the_digest_says() -> None:
    """They are not handed on as what they are not, and not stored."""
    world = World(GRANTED)
    route = by_digest(OLD)
    answer = world.ask(route=route)
    assert answer.status == 504
    assert isinstance(answer.body, bytes)
    got = hashlib.sha256(NEW).hexdigest()
    assert f"@{route.reference}: expected a manifest with this digest, got sha256:{got}" in answer.body.decode()
    assert world.store.kept == {}


# --- credentials


def test_authorization_is_not_sent_before_it_is_needed() -> None:
    """client2 sends it always: the anonymous answer is the one for everybody."""
    world = World(GRANTED)
    assert world.ask(authorization="Bearer t").status == 200
    assert ["Authorization" in asked[3] for asked in world.upstream.asked] == [False]
    assert world.stored == (NEW, NOW)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_only_this_caller_gets_is_not_stored(status: int) -> None:
    """Denied to nobody in particular, granted to the caller: relayed, and asked for again the next time."""
    world = World(response(status), GRANTED, response(status), response(status, b"no"))
    answer = world.ask(authorization="Bearer t", user_agent="ollama/1")
    assert (answer.status, answer.body, answer.cache) == (200, NEW, CacheStatus(Outcome.MISS, forward_status=200))
    assert [asked[3].get("Authorization") for asked in world.upstream.asked] == [None, "Bearer t"]
    assert all(asked[3]["User-Agent"] == "ollama/1" for asked in world.upstream.asked)
    assert all(asked[3]["Accept"] == DOCKER_TYPE for asked in world.upstream.asked)
    assert world.stored is None
    assert world.ask().status == status


def test_what_only_this_caller_gets_is_not_mixed_up_with_the_stored_copy() -> None:
    """A model that has become private, and another one: its owner gets the new one, which nobody else does."""
    world = World(response(401), GRANTED, stored_ago=LIFETIME)
    answer = world.ask(authorization="Bearer t")
    assert (answer.status, answer.body, answer.cache) == (200, NEW, CacheStatus(Outcome.STALE, forward_status=200))
    assert world.stored != (NEW, NOW)


@pytest.mark.parametrize("status", [400, 412, 429, 500])
def test_credentials_do_not_answer_every_refusal(status: int) -> None:
    """Only what tells an anonymous caller "not you" is asked again in a name."""
    world = World(response(status), GRANTED)
    assert world.ask(authorization="Bearer t").status == status
    assert len(world.upstream.asked) == 1


def test_a_caller_without_credentials_gets_the_challenge() -> None:
    """It says where a token can be had."""
    world = World(DENIED)
    assert ("WWW-Authenticate", CHALLENGE) in world.ask().headers
    assert len(world.upstream.asked) == 1


# --- together


def test_equal_requests_are_one() -> None:
    """Three clients, one request, one answer; a client of another version asks for itself."""

    async def main() -> None:
        world = World(GRANTED)
        world.upstream.gate.clear()
        clients = [asyncio.create_task(world.get(user_agent="ollama/1")) for _ in range(3)]
        clients.append(asyncio.create_task(world.get(user_agent="ollama/2")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(world.upstream.asked) == 2
        world.upstream.gate.set()
        answers = await asyncio.gather(*clients)
        assert [answer.body for answer in answers] == [NEW] * 4
        assert [answer.cache.collapsed for answer in answers] == [False, True, True, False]
        assert all(answer.cache.stored for answer in answers)
        assert len(world.upstream.asked) == 2

    asyncio.run(main())


@pytest.mark.parametrize("stored_ago", [None, LIFETIME], ids=["nothing stored", "a copy stored"])
def test_a_request_has_a_deadline(monkeypatch: pytest.MonkeyPatch, stored_ago: float | None) -> None:
    """Whatever upstream's own limits do, the client is answered in time."""
    monkeypatch.setattr(manifests, "DEADLINE_S", 0.01)

    async def main() -> Answer:
        world = World(GRANTED, stored_ago=stored_ago)
        world.upstream.gate.clear()
        return await world.get()

    answer = asyncio.run(main())
    if stored_ago is None:
        assert answer.status == 504
        assert isinstance(answer.body, bytes)
        assert b"no answer in time" in answer.body
    else:
        assert answer == expected(OLD, Outcome.STALE, detail="upstream-failed")


# --- what becomes private, and what is no answer


@pytest.mark.parametrize("status", [401, 403])
def test_a_manifest_that_is_refused_to_all_becomes_private(status: int) -> None:
    """From then on it is nobody's while upstream is away, until upstream grants it to an anonymous request again."""
    world = World(
        response(status), UpstreamUnreachable("x"), response(200, OLD, Content_Type=TYPE), stored_ago=LIFETIME
    )
    assert world.ask().status == status
    assert world.ask().status == 504
    assert world.ask().body == OLD
    assert world.store.kept[NAME].denied is False


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("then", [response(404), response(429), response(500), UpstreamUnreachable("x")], ids=repr)
def test_credentials_are_no_way_to_a_copy_that_has_just_become_private(
    status: int, then: Response | CacheError
) -> None:
    """Refused to everybody, and upstream does not grant it to this caller either: no stale copy for him."""
    world = World(response(status), then, stored_ago=LIFETIME)
    answer = world.ask(authorization="Bearer wrong")
    assert answer.status == (then.status if isinstance(then, Response) else 504)
    assert answer.body != OLD


def test_a_model_that_is_hidden_and_not_withdrawn_is_private() -> None:
    """404 to everybody and 200 to its owner: it is there, and not for everybody."""
    world = World(response(404), GRANTED, UpstreamUnreachable("x"), stored_ago=LIFETIME)
    assert world.ask(authorization="Bearer t").body == NEW
    assert world.ask().status == 504


def test_a_withdrawn_manifest_is_not_private() -> None:
    """404 may be a mistake of the registry's: the copy is served on."""
    world = World(response(404), stored_ago=LIFETIME)
    assert world.ask().body == OLD
    assert world.store.kept[NAME].denied is False


def test_a_page_that_is_no_manifest_does_not_replace_one() -> None:
    """A captive portal answers 200 too: who has a copy keeps it."""
    world = World(response(200, PORTAL), stored_ago=LIFETIME)
    assert world.ask().body == OLD
    assert world.stored == (OLD, NOW - LIFETIME)


# --- revalidation by digest


def confirming(body: bytes, field: str = "ollama-content-digest", prefix: str = "") -> Response:
    return Response(200, CIMultiDict({field: prefix + hashlib.sha256(body).hexdigest()}), b"")


@pytest.mark.parametrize(
    "head", [confirming(OLD), confirming(OLD, "Docker-Content-Digest", "sha256:")], ids=["ollama", "oci"]
)
def test_the_same_digest_needs_no_body(head: Response) -> None:
    """HEAD says that nothing has changed: fresh again, with the type that is stored."""
    world = World(GRANTED, stored_ago=LIFETIME)
    world.upstream.head = head
    assert world.ask() == expected(OLD, Outcome.STALE, True, False, 200)
    assert (world.upstream.heads, world.upstream.asked, world.stored) == (1, [], (OLD, NOW))
    assert world.ask() == expected(OLD, Outcome.HIT)


@pytest.mark.parametrize(
    "head",
    [confirming(NEW), response(200), response(404), response(405), response(503)],
    ids=["another digest", "no digest", "404", "405", "503"],
)
def test_any_other_head_takes_a_get(head: Response, caplog: pytest.LogCaptureFixture) -> None:
    """Only a digest that is told and the same is believed; a moved tag is logged with both."""
    world = World(GRANTED, stored_ago=LIFETIME)
    world.upstream.head = head
    with caplog.at_level("INFO"):
        assert world.ask() == expected(NEW, Outcome.STALE, True, False, 200)
    old, new = (hashlib.sha256(body).hexdigest() for body in (OLD, NEW))
    assert f"{NAME} moved: sha256:{old} -> sha256:{new}" in caplog.messages


def test_a_gated_client_asks_in_full() -> None:
    """Whether HEAD is gated by version too is not known: only a GET tells."""
    world = World(response(412), stored_ago=0, oldest=(0, 10, 0))
    world.upstream.head = confirming(OLD)
    assert world.ask(user_agent="ollama/0.9.9").status == 412
    assert world.upstream.heads == 0


# --- policy


def test_a_withdrawn_manifest_is_dropped_where_that_is_wanted() -> None:
    """The 404 is passed on, and nothing is left to serve."""
    world = World(response(404, b"gone"), stored_ago=LIFETIME, withdrawn="drop")
    answer = world.ask()
    assert (answer.status, answer.body) == (404, b"gone")
    assert world.stored is None


def test_lifetimes_by_pattern() -> None:
    """The first pattern that matches the name counts, in any of its spellings."""
    for pattern in ("tiny*", "library/tiny:latest", f"{HOST}/library/*"):
        world = World(GRANTED, stored_ago=LIFETIME + 10, manifest_lifetime=f"1s,{pattern}=1h,*=0")
        assert world.ask() == expected(OLD, Outcome.HIT)
    world = World(GRANTED, stored_ago=2, manifest_lifetime="1h,other*=1d,*:latest=1s")
    assert world.ask().body == NEW


def test_a_copy_that_turns_private_is_not_served_stale() -> None:
    """Denied to everybody, and upstream fails for the owner: nobody gets the copy."""
    world = World(response(401), response(503, b"busy"), stored_ago=LIFETIME)
    answer = world.ask(authorization="Bearer t")
    assert (answer.status, answer.body) == (503, b"busy")


def test_pulls_are_noted() -> None:
    """GET is a pull, HEAD and refusals are not."""
    world = World(GRANTED)
    world.ask("HEAD")
    assert world.store.kept[NAME].pulled == 0
    world.ask()
    assert world.store.kept[NAME].pulled == NOW
    world.ask(route=by_digest(NEW))
    assert world.store.kept[NAME].pulled == NOW


def test_the_newest_client_speaks_for_the_cache() -> None:
    """What the background asks with: the newest Ollama seen, in this run or in an earlier one."""
    world = World(GRANTED, stored_ago=0, oldest=(0, 5, 7))
    assert world.manifests.newest_agent == "ollama/0.5.7"
    for agent in ("ollama/0.10.1 (amd64 linux) Go/go1.26", "curl/8", "ollama/0.9.0", "ollama/0.0.0", ""):
        world.ask(user_agent=agent)
    assert world.manifests.newest_agent == "ollama/0.10.1 (amd64 linux) Go/go1.26"
    assert World(GRANTED).manifests.newest_agent == ""


def test_an_absurd_client_does_not_speak_for_the_cache() -> None:
    """Neither now, nor where a store has kept what such a one was granted."""
    world = World(GRANTED, stored_ago=0, oldest=(999, 0, 0))
    for agent in ("ollama/0.40.1", "ollama/999999.0.0", "ollama/2.0.0"):
        world.ask(user_agent=agent)
    assert world.manifests.newest_agent == "ollama/0.40.1"


def test_a_refusal_overtakes_a_yes() -> None:
    """Upstream granted it, and refused the repository before that answer was here: nothing is stored."""

    async def main() -> None:
        world = World(GRANTED, stored_ago=LIFETIME)
        world.upstream.gate.clear()
        asking = asyncio.create_task(world.get())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(world.upstream.asked) == 1
        world.store.deny(HOST, ROUTE.repository)
        world.upstream.gate.set()
        assert (await asking).body == NEW
        assert world.store.kept[NAME].denied
        assert world.stored == (OLD, NOW - LIFETIME)

    asyncio.run(main())


@pytest.mark.parametrize(("is_here", "denied"), [(True, False), (False, False), (True, True)])
def test_a_tag_moves_when_what_it_names_is_ready(is_here: bool, denied: bool) -> None:
    """It stays while something is not, and for good if the repository turns private meanwhile."""
    world = World(GRANTED, stored_ago=1000)
    asked: list[bytes] = []

    async def is_ready(record: ManifestRecord) -> bool:
        asked.append(record.body)
        assert world.stored == (OLD, NOW - 1000)
        if denied:
            world.store.deny(HOST, NAME.repository)
        return is_here

    reply = asyncio.run(world.manifests.revalidate(NAME, "", is_ready=is_ready, timeout_s=1.0))
    assert reply.record is not None and reply.record.body == NEW
    assert asked == [NEW]
    assert world.stored == ((NEW, NOW) if is_here and not denied else (OLD, NOW - 1000))


def test_nothing_is_made_ready_for_a_refusal() -> None:
    """A refusal of everybody counts at once."""
    world = World(DENIED, stored_ago=1000)

    async def is_ready(_: ManifestRecord) -> bool:
        raise AssertionError

    asyncio.run(world.manifests.revalidate(NAME, "", is_ready=is_ready, timeout_s=1.0))
    assert world.store.kept[NAME].denied
