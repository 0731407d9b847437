"""pings: a registry's own words to those who ask whether it is there are kept for when it is not."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict

from pullthrough.config.options import parse_settings
from pullthrough.core.errors import Offline, UnexpectedResponse, UpstreamError, UpstreamUnreachable
from pullthrough.registry.messages import Answer, Request
from pullthrough.registry.pings import LONGEST_BODY, Greeting, LastGreetings, Pings
from pullthrough.upstream.impostors import Response

HOST = "registry.ollama.ai"
CHALLENGE = f'Bearer realm="https://{HOST}/token"'


def said(status: int, body: bytes = b"", **fields: str) -> Response:
    return Response(status, CIMultiDict({name.replace("_", "-"): value for name, value in fields.items()}), body)


WELL = said(200, b"{}", Content_Type="application/json")


@dataclass
class Upstream:
    """Says `next`, which may be an error."""

    next: Response | UpstreamError = field(default_factory=lambda: WELL)
    down: bool = False
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    async def converse(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        self.asked.append((method, host + target, dict(headers)))
        if isinstance(self.next, UpstreamError):
            raise self.next
        return self.next

    def is_up(self, host: str) -> bool:
        return not self.down

    def mark_down(self, host: str, seconds: float) -> None:
        self.down = True


class Scene:
    def __init__(self, folder: Path) -> None:
        self.upstream = Upstream()
        settings = parse_settings({"registries": "registry.ollama.ai,hf.co"}, dir=folder, certs=folder)
        self.pings = Pings(settings, self.upstream)  # type: ignore[arg-type]

    def ask(self, method: str = "GET", target: str = "/v2/", **options: str) -> Answer | None:
        scheme = options.pop("scheme", "https")
        host = options.pop("host", HOST)
        return asyncio.run(self.pings.answer(Request(method, scheme, host, target, options)))

    def away(self, **options: str) -> Answer | None:
        """What is answered once the registry cannot be reached."""
        self.upstream.next, self.upstream.down = UpstreamUnreachable("no way"), False
        return self.ask(**options)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize(
    "heard",
    [
        pytest.param(WELL, id="well"),
        pytest.param(said(401, b'{"errors": []}', Content_Type="application/json"), id="a token is wanted"),
        pytest.param(said(404, b"404 page not found\n", Content_Type="text/plain"), id="no such route"),
        pytest.param(said(200, b"x" * LONGEST_BODY), id="as long as may be"),
    ],
)
@pytest.mark.parametrize("target", ["/", "/v2/"])
def test_what_is_told_again(scene: Scene, heard: Response, target: str) -> None:
    """The same status, fields and body as before, by GET and, without the body, by HEAD; asked once, then known."""
    scene.upstream.next = heard
    first = scene.ask(target=target)
    assert first is not None
    assert (first.status, first.body) == (heard.status, heard.body)
    again = scene.away(target=target)
    assert again is not None
    assert (again.status, again.headers, again.body, again.length) == (
        first.status,
        first.headers,
        first.body,
        len(heard.body),
    )
    assert "detail=upstream-failed" in str(again.cache)
    head = scene.ask("HEAD", target)
    assert head is not None
    assert (head.status, head.body, head.length) == (heard.status, b"", len(heard.body))
    # It counts as down: nobody waits for it again.
    assert len(scene.upstream.asked) == 2


def test_only_harmless_fields(scene: Scene) -> None:
    """No cookie and no token is told to anybody else; what a client needs to log in is."""
    scene.upstream.next = said(
        401, b"{}", Set_Cookie="session=1", Authorization="Bearer x", X_Token="y", WWW_Authenticate=CHALLENGE
    )
    for answer in (scene.ask(), scene.away()):
        assert answer is not None
        assert answer.headers == (("WWW-Authenticate", CHALLENGE),)


def test_what_credentials_bring_is_for_their_owner(scene: Scene) -> None:
    """They go to the registry with the request; its answer is not told to others, nor again."""
    answer = scene.ask(authorization="Bearer good", cookie="a=b")
    assert answer is not None and answer.status == 200
    assert scene.upstream.asked[-1] == ("GET", f"{HOST}/v2/", {"Authorization": "Bearer good"})
    answer = scene.away()
    assert answer is not None and answer.status == 504


@pytest.mark.parametrize(
    "heard",
    [
        pytest.param(said(200, b"<html>", Content_Type="text/html"), id="a page"),
        pytest.param(said(403, b"{}", cf_mitigated="challenge"), id="a challenge"),
        pytest.param(said(302, Location="https://login.example/"), id="a redirect"),
        pytest.param(said(200, b"x" * (LONGEST_BODY + 1)), id="too long"),
        pytest.param(said(503, b"{}"), id="a failure"),
        pytest.param(said(429, b"{}"), id="too often"),
        pytest.param(UnexpectedResponse("expected at most 8 MiB"), id="much too long"),
    ],
)
def test_what_is_no_answer_of_a_registry(scene: Scene, heard: Response | UpstreamError) -> None:
    """It is passed on while nothing better is known, and never remembered."""
    scene.upstream.next = heard
    assert scene.ask() is None
    answer = scene.away()
    assert answer is not None and answer.status == 504


@pytest.mark.parametrize(
    "heard",
    [
        pytest.param(said(200, b"<html>", Content_Type="text/html"), id="a login"),
        pytest.param(said(403, b"<html>", Content_Type="text/html"), id="a filter"),
        pytest.param(said(502, b""), id="a gateway"),
        pytest.param(said(429, b""), id="too often"),
    ],
)
def test_somebody_else_in_its_place(scene: Scene, heard: Response) -> None:
    """The registry's last word is told instead."""
    scene.ask()
    scene.upstream.next = heard
    answer = scene.ask()
    assert answer is not None and (answer.status, answer.body) == (200, b"{}")


def test_its_last_word_counts(scene: Scene) -> None:
    """Not its first."""
    scene.ask()
    scene.upstream.next = said(401, WWW_Authenticate=CHALLENGE)
    scene.ask()
    answer = scene.away()
    assert answer is not None and answer.status == 401


def test_each_registry_for_itself(scene: Scene) -> None:
    """Nobody speaks for another registry, nor one target for another one."""
    scene.ask()
    others: list[dict[str, Any]] = [{"host": "hf.co"}, {"target": "/"}]
    for options in others:
        answer = scene.away(**options)
        assert answer is not None
        assert answer.status == 504
        assert isinstance(answer.body, bytes) and b"no way" in answer.body


def test_offline(scene: Scene) -> None:
    """It is said why there is no answer."""
    scene.upstream.next = Offline("offline: upstream is not asked")
    answer = scene.ask()
    assert answer is not None and isinstance(answer.body, bytes)
    assert answer.status == 504 and b"offline" in answer.body


@pytest.mark.parametrize(
    "options",
    [
        {"target": "/v2/?n=1"},
        {"target": "/v2/_catalog"},
        {"scheme": "http"},
        {"host": "dd20bb891979d25aebc8bec07b2b3bbc.r2.cloudflarestorage.com"},
        {"host": "example.org"},
    ],
)
def test_what_is_not_asked_here(scene: Scene, options: dict[str, str]) -> None:
    """It is passed on unseen."""
    assert scene.ask(**options) is None
    assert scene.upstream.asked == []


def test_a_head_has_a_length() -> None:
    """What HEAD was told of the body that GET would bring is told again; what is no number counts for nothing."""
    greeting = Greeting.of(said(200, Content_Length="2"))
    assert greeting is not None and greeting.length == 2
    for strange in ("-1", "²", "x", ""):
        greeting = Greeting.of(said(200, Content_Length=strange))
        assert greeting is not None and greeting.length == 0


def test_a_head_is_no_get() -> None:
    """What GET would bring is not known from HEAD; the other way it is."""
    last = LastGreetings()
    greeting = Greeting(200, (), b"", 2)
    last.remember(HOST, "/", "HEAD", greeting)
    assert last.find(HOST, "/", "GET") is None
    assert last.find(HOST, "/", "HEAD") is greeting
    other = Greeting(401, (), b"{}", 2)
    last.remember(HOST, "/v2/", "GET", other)
    assert last.find(HOST, "/v2/", "HEAD") is other
