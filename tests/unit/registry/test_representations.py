"""manifests: what clients that take manifest lists get, and others; against a registry that tells them apart."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from multidict import CIMultiDict

from pullthrough.config.options import parse_settings
from pullthrough.core.cache_status import Outcome
from pullthrough.core.errors import UpstreamUnreachable
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE, accept_of
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.core.routes import ManifestRoute
from pullthrough.registry import manifests
from pullthrough.registry.manifests import HEAD_TIMEOUT_S, Manifests
from pullthrough.registry.messages import Answer, Request
from pullthrough.store.store import Store
from pullthrough.upstream.client import Response, Upstream

HOST, OTHER_HOST = "registry.ollama.ai", "registry.ollama.com"
NAME = Name(HOST, "library/tiny", "latest")
TEXT = "text/plain; charset=utf-8"
"""The type of whatever the registry gives."""
TAKES = accept_of(takes_lists=True)
LATER = 3600.0
Begin = Callable[..., "World"]


def manifest(letter: str, **more: object) -> bytes:
    return json.dumps({"layers": [{"digest": f"sha256:{letter * 64}", "size": 1}], **more}).encode()


def listing(*digests: str) -> bytes:
    return json.dumps({"mediaType": LIST_TYPE, "manifests": [{"digest": digest} for digest in digests]}).encode()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


LIST = listing(f"sha256:{'b' * 64}")
HEAD_OF_LIST = {"Content-Type": LIST_TYPE, "Vary": "Accept", "ollama-content-digest": sha256(LIST)}
PLAIN, MOVED = manifest("a"), manifest("c")


class FakeRegistry:
    """Has a document for each class of clients, or a status; remembers (method, host, Accept)."""

    def __init__(self, plain: bytes | int, lists: bytes | int) -> None:
        self.documents = {DOCKER_TYPE: plain, TAKES: lists}
        self.head_type: str | None = None
        self.asked: list[tuple[str, str, str]] = []
        self.is_reachable = True
        self.hangs = False
        self.needs: str | None = None
        self.down: dict[str, float] = {}

    async def ask(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        assert target == "/v2/library/tiny/manifests/latest" or ":" in target
        self.asked.append((method, host, headers["Accept"]))
        if self.hangs:
            await asyncio.Event().wait()
        if not self.is_reachable:
            raise UpstreamUnreachable("no route")
        if self.needs is not None and headers.get("Authorization") != self.needs:
            return Response(401, CIMultiDict({"WWW-Authenticate": f'Bearer realm="https://{host}/token"'}), b"{}")
        found = self.documents[headers["Accept"]]
        if isinstance(found, int):
            return Response(found, CIMultiDict(), b"{}")
        media_type = TEXT
        if method == "HEAD":
            media_type = self.head_type or (LIST_TYPE if found in (LIST,) else TEXT)
        fields = {"Content-Type": media_type, "ollama-content-digest": sha256(found)}
        return Response(200, CIMultiDict(fields), found if method == "GET" else b"")

    def down_until(self, host: str) -> float:
        return self.down.get(host, 0.0)

    def mark_down(self, host: str, seconds: float) -> None:
        self.down[host] = manifests.time.monotonic() + seconds


class World:
    """The manifests of a cache in front of that registry, with a clock of its own."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        plain: bytes | int,
        lists: bytes | int,
        **options: str,
    ) -> None:
        self.now = 50_000.0
        clock = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(manifests, "time", clock)
        self.registry = FakeRegistry(plain, lists)
        self.store = Store.open(folder)
        settings = parse_settings(
            {"registries": f"{HOST},{OTHER_HOST}", "manifest_lifetime": "5m", **options}, dir=folder, certs=folder
        )
        self.manifests = Manifests(settings, self.store, cast(Upstream, self.registry))

    async def get(
        self, accept: str | None = None, method: str = "GET", *, reference: str = "latest", **fields: str
    ) -> Answer:
        host = fields.pop("host", HOST)
        if accept is not None:
            fields["accept"] = accept
        route = ManifestRoute(NAME.repository, reference)
        return await self.manifests.answer(Request(method, "https", host, "/", fields), route)

    def ask(self, accept: str | None = None, method: str = "GET", **more: str) -> Answer:
        self.registry.asked.clear()
        return asyncio.run(self.get(accept, method, **more))

    @property
    def stored(self) -> dict[Name, bytes]:
        return {name: record.body for name, record in self.store.manifests().items()}


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Makes the test's world."""
    with contextlib.ExitStack() as stack:

        def make(lists: bytes | int = LIST, **options: str) -> World:
            world = World(tmp_path / "store", monkeypatch, PLAIN, lists, **options)
            stack.callback(world.store.close)
            return world

        yield make


@pytest.fixture
def world(begin: Begin) -> World:
    return begin()


@pytest.mark.parametrize(
    ("accept", "takes"),
    [
        (None, False),
        ("*/*", False),
        (DOCKER_TYPE, False),
        ("application/json, text/html;q=0.9", False),
        (LIST_TYPE, True),
        (TAKES, True),
        (f"{DOCKER_TYPE}, {LIST_TYPE};q=0.5", True),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_two_classes(world: World, accept: str | None, takes: bool, method: str) -> None:
    """Whatever a client sends, upstream sees one of two Accept fields, and the answer is of that class."""
    answer = world.ask(accept, method)
    body = LIST if takes else PLAIN
    assert world.registry.asked == [("GET", HOST, accept_of(takes_lists=takes))]
    assert world.stored == {NAME._replace(takes_lists=takes): body}
    for cached in (answer, world.ask(accept, method)):
        assert (cached.status, cached.length, cached.body) == (200, len(body), body if method == "GET" else b"")
        fields = dict(cached.headers)
        if method == "GET":
            assert fields == {"Content-Type": TEXT, "Vary": "Accept"}
        else:
            assert fields == {
                "Content-Type": LIST_TYPE if takes else TEXT,
                "Vary": "Accept",
                "ollama-content-digest": sha256(body),
            }
    assert world.registry.asked == []


def test_both_classes_side_by_side(world: World) -> None:
    """Each has its own bytes, and is fresh and confirmed by itself."""
    for accept in (TAKES, None):
        world.ask(accept)
    assert world.stored == {NAME: PLAIN, NAME.twin: LIST}
    world.now += LATER
    assert world.ask(TAKES, "HEAD").cache.outcome is Outcome.STALE
    assert world.registry.asked == [("HEAD", HOST, TAKES)]
    assert world.ask(TAKES).cache.outcome is Outcome.HIT
    assert world.ask(None).cache.outcome is Outcome.STALE
    assert world.registry.asked == [("HEAD", HOST, DOCKER_TYPE)]


@pytest.mark.parametrize("offline", [False, True], ids=["unreachable", "offline"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_upstream_away(begin: Begin, offline: bool, method: str) -> None:
    """A plain manifest will do for those who take lists; a list never goes to those who do not."""
    world = begin(**({"offline": "true"} if offline else {}))
    world.registry.is_reachable = False
    plain = ManifestRecord.parse(PLAIN, TEXT, now=1.0)
    lists = ManifestRecord.parse(LIST, TEXT, now=1.0)
    assert plain and lists
    world.store.put_manifest(NAME, plain)
    for _ in range(2):
        answer = world.ask(TAKES, method)
        assert (answer.status, answer.length) == (200, len(PLAIN))
        assert dict(answer.headers)["Content-Type"] == TEXT
    assert world.stored == {NAME: PLAIN}
    world.store.drop_model(NAME)
    world.store.put_manifest(NAME.twin, lists)
    assert world.ask(None, method).status == 504
    assert world.ask(TAKES, method).length == len(LIST)
    # A manifest that those got who take lists is for everybody.
    world.store.put_manifest(NAME.twin, plain)
    assert world.ask(None, method).length == len(PLAIN)


@pytest.mark.parametrize("first", [None, TAKES], ids=["plain first", "lists first"])
def test_the_same_manifest_for_both(begin: Begin, first: str | None) -> None:
    """As long as a tag has no list: each class asks once, in one round trip, and the bytes are stored once."""
    world = begin(lists=PLAIN)
    second = TAKES if first is None else None
    world.ask(first)
    answer = world.ask(second)
    assert [method for method, *_ in world.registry.asked] == ["GET"]
    assert (answer.body, dict(answer.headers)) == (PLAIN, {"Content-Type": TEXT, "Vary": "Accept"})
    assert world.stored == {NAME: PLAIN, NAME.twin: PLAIN}
    assert world.ask(second).cache.outcome is Outcome.HIT


@pytest.mark.parametrize("head_type", [LIST_TYPE, f"{LIST_TYPE}; charset=utf-8"])
def test_a_digest_of_another_representation(world: World, head_type: str) -> None:
    """A registry that tells the digest of the manifest and the type of the list has confirmed nothing."""
    world.registry.documents[TAKES] = PLAIN
    world.ask(TAKES)
    world.now += LATER
    world.registry.head_type = head_type
    world.ask(TAKES)
    assert [method for method, *_ in world.registry.asked] == ["HEAD", "GET"]


def test_a_tag_that_moves(world: World) -> None:
    """From a manifest to a list and back, and within lists; the other class keeps what it has."""
    world.ask(None)
    for body in (MOVED, LIST, listing(f"sha256:{'d' * 64}"), PLAIN, LIST):
        world.registry.documents[TAKES] = body
        world.now += LATER
        for method in ("HEAD", "GET"):
            answer = world.ask(TAKES, method)
            assert (answer.length, answer.body) == (len(body), body if method == "GET" else b"")
        assert world.stored == {NAME: PLAIN, NAME.twin: body}


def test_a_head_is_answered_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's look for a list ends after two seconds; that upstream is slow does not mean that it is down."""
    assert HEAD_TIMEOUT_S <= 1.5
    monkeypatch.setattr(manifests, "HEAD_TIMEOUT_S", 0.05)
    world.ask(TAKES)
    world.now += LATER
    world.registry.hangs = True
    answer = world.ask(TAKES, "HEAD")
    assert (answer.status, answer.length, str(answer.cache)) == (
        200,
        len(LIST),
        "ollama-cache; fwd=stale; detail=upstream-failed",
    )
    assert dict(answer.headers) == HEAD_OF_LIST
    assert world.registry.down == {}
    world.registry.hangs, world.registry.is_reachable = False, False
    world.ask(TAKES, "HEAD")
    assert list(world.registry.down) == [HOST]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_by_digest(world: World, method: str) -> None:
    """A list's digest names it only for those who take lists; a manifest's for everybody."""
    world.ask(TAKES)
    for accept, body in ((TAKES, LIST), (None, PLAIN)):
        world.ask(accept)
        answer = world.ask(accept, method, reference=f"sha256:{sha256(body)}")
        assert (answer.cache.outcome, answer.length) == (Outcome.HIT, len(body))
        if method == "HEAD":
            assert dict(answer.headers)["ollama-content-digest"] == sha256(body)
    assert world.ask(TAKES, method, reference=f"sha256:{sha256(PLAIN)}").length == len(PLAIN)
    world.registry.documents[DOCKER_TYPE] = 404
    assert world.ask(None, method, reference=f"sha256:{sha256(LIST)}").status == 404


def test_withdrawn(begin: Begin) -> None:
    """404 to those who take whatever there is means that there is nothing; to others, that there is only a list."""
    world = begin(withdrawn="drop")
    for accept in (TAKES, None):
        world.ask(accept)
    world.now += LATER
    world.registry.documents[DOCKER_TYPE] = 404
    assert world.ask(None).status == 404
    assert world.stored == {NAME.twin: LIST}
    assert world.ask(TAKES).body == LIST
    world.registry.documents[DOCKER_TYPE] = PLAIN
    world.ask(None)
    world.now += LATER
    world.registry.documents[TAKES] = 404
    assert world.ask(TAKES).status == 404
    assert world.stored == {}


def test_only_the_manifest_is_stored_when_the_tag_is_withdrawn(begin: Begin) -> None:
    """It goes with the answer to the one who takes lists, too."""
    world = begin(lists=404, withdrawn="drop")
    world.ask(None)
    assert world.ask(TAKES).status == 404
    assert world.stored == {}


def test_a_list_that_nobody_asked_for(world: World) -> None:
    """It is upstream's word to this one client, and is neither stored nor preferred to a manifest that is."""
    world.registry.documents[DOCKER_TYPE] = LIST
    assert (world.ask(None).body, world.stored) == (LIST, {})
    world.registry.documents[DOCKER_TYPE] = PLAIN
    world.ask(None)
    world.now += LATER
    world.registry.documents[DOCKER_TYPE] = LIST
    answer = world.ask(None)
    assert (answer.body, answer.cache.detail, world.stored) == (PLAIN, "stale", {NAME: PLAIN})


def test_a_private_list(world: World) -> None:
    """HEAD tells of it what it would tell of a public one; nothing of it stays."""
    world.registry.needs = "Bearer good"
    answer = world.ask(TAKES, "HEAD", authorization="Bearer good")
    assert (answer.status, answer.length) == (200, len(LIST))
    assert dict(answer.headers) == HEAD_OF_LIST
    assert world.ask(TAKES, authorization="Bearer good").body == LIST
    assert world.stored == {}


def test_a_registry_of_two_names(world: World) -> None:
    """One model, whoever asks by which name; upstream is asked by that name, so that its challenges hold for it."""
    world.ask(TAKES, host=OTHER_HOST)
    assert world.registry.asked == [("GET", OTHER_HOST, TAKES)]
    assert world.stored == {NAME.twin: LIST}
    assert world.ask(TAKES).cache.outcome is Outcome.HIT
    world.now += LATER
    world.registry.needs = "Bearer good"

    async def both() -> list[Answer]:
        return await asyncio.gather(*(world.get(TAKES, host=host) for host in (HOST, OTHER_HOST)))

    for host, answer in zip((HOST, OTHER_HOST), asyncio.run(both()), strict=True):
        assert (answer.status, dict(answer.headers)["WWW-Authenticate"]) == (
            401,
            f'Bearer realm="https://{host}/token"',
        )
    assert world.store.is_denied(OTHER_HOST, NAME.repository)
    assert world.store.is_denied(HOST, NAME.repository)


def test_a_list_is_refused_to_all(world: World) -> None:
    """A repository that has turned private has neither representation any more."""
    for accept in (TAKES, None):
        world.ask(accept)
    world.now += LATER
    world.registry.needs = "Bearer good"
    assert world.ask(None).status == 401
    world.registry.is_reachable = False
    assert [world.ask(accept).status for accept in (TAKES, None)] == [504, 504]
