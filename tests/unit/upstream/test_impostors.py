"""impostors: an answer in a registry's place is told from the registry's own, remembered, and logged once."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from multidict import CIMultiDict

from pullthrough.config.options import parse_settings
from pullthrough.core.errors import Disagreement, NotTheRegistry
from pullthrough.upstream import impostors as module
from pullthrough.upstream.data_stream import Errors
from pullthrough.upstream.impostors import LOGGED_S, Impostors, Response
from pullthrough.upstream.reachability import Reachability

HOST = "registry.ollama.ai"
ERRORS = b'{"errors": [{"code": "DENIED", "message": "no"}]}'


def response(status: int, body: bytes = b"", **fields: str) -> Response:
    return Response(status, CIMultiDict({name.replace("_", "-"): value for name, value in fields.items()}), body)


def judge() -> Impostors:
    return Impostors(
        [HOST, "registry.ollama.com"], Errors(), Reachability(parse_settings({}, dir=Path("/d"), certs=Path("/c")))
    )


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(response(200, b"<html>", Content_Type="text/html"), id="a page"),
        pytest.param(response(302, Location="https://login.example/"), id="a login"),
        pytest.param(response(403, b"blocked", Content_Type="text/html"), id="a filter"),
        pytest.param(response(451, b"blocked"), id="the law"),
    ],
)
def test_not_the_registry(answer: Response) -> None:
    """It is remembered until the registry answers, and nothing of its text is told."""
    seen = judge()
    with pytest.raises(NotTheRegistry) as caught:
        seen.judged(HOST, answer)
    assert HOST in seen.seen and "blocked" not in f"{caught.value} {seen.told}"
    assert seen.judged(HOST, response(200, b"{}")).body == b"{}"
    assert seen.told == []


def test_a_failure_keeps_its_status_and_loses_its_page() -> None:
    """429 and 5xx mean the same whoever says them; a registry's own words are kept."""
    seen = judge()
    page = seen.judged(HOST, response(503, b"<html>", Content_Type="text/html", Retry_After="7"))
    assert (page.status, page.body, dict(page.headers)) == (503, b"", {"Retry-After": "7"})
    assert seen.told == [f"something else answers in the place of {HOST}: 503 text/html"]
    own = seen.judged(HOST, response(503, ERRORS, Content_Type="application/json"))
    assert own.body == ERRORS and seen.told == []


def test_a_head_settles_nothing() -> None:
    """What is no yes or no of a registry's is left to a GET, and is not held against anybody."""
    seen = judge()
    for status in (400, 403, 405, 501):
        with pytest.raises(NotTheRegistry):
            seen.judged(HOST, response(status), head=True)
    assert seen.judged(HOST, response(307, Location="https://cdn.example/"), head=True).status == 307
    assert seen.told == []


def test_one_line_for_a_kind(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it comes, and whatever comes between; after a while once more."""
    caplog.set_level(logging.WARNING)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module.time, "time", lambda: clock.now)
    seen = judge()
    for number in range(5):
        error = seen.disagreeing(HOST, "other bytes", f"blob {number}")
        assert isinstance(error, Disagreement) and f"blob {number}" in str(error)
        seen.judged(HOST, response(200, b"{}"))
    assert len(caplog.records) == 1
    clock.now += LOGGED_S
    seen.displaced(HOST, "200 text/html")
    seen.disagreeing(HOST, "other bytes", "again")
    assert len(caplog.records) == 3
