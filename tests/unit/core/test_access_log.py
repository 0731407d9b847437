"""access_log: one line per request, without what is secret in it, and the count."""

import logging

import pytest

from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import CacheStatus, Outcome

HIT = CacheStatus(Outcome.HIT)
MISS = CacheStatus(Outcome.MISS, stored=True)


def test_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Who asked what and how it ended; the query, which may be a capability, is cut."""
    caplog.set_level(logging.INFO)
    log = RequestLog()
    told = []
    log.on_sent = lambda client, count: told.append((client, count))
    log.answer("10.0.0.7", "GET", "/v2/x?access=secret", 307, MISS)
    log.transfer("::1", "GET", "/data?access=secret", 206, HIT, sent=5, seconds=0.5, problem="")
    log.transfer("::1", "GET", "/data", 200, HIT, sent=5, seconds=1, problem="client disconnected")
    assert [record.getMessage() for record in caplog.records] == [
        "10.0.0.7 GET /v2/x -> 307 ollama-cache; fwd=miss; stored",
        "::1 GET /data -> 206, 5 bytes in 0.50 s; ollama-cache; hit",
        "::1 GET /data -> 200, 5 bytes in 1.00 s, short: client disconnected; ollama-cache; hit",
    ]
    log.answer("::1", "GET", "http://me:secret@other.example/x@y?access=secret", 421, MISS)
    assert caplog.messages[-1] == "::1 GET http://other.example/x@y -> 421 ollama-cache; fwd=miss; stored"
    del log.answers[Outcome.MISS, 421]
    assert log.answers == {(Outcome.MISS, 307): 1, (Outcome.HIT, 206): 1, (Outcome.HIT, 200): 1}
    assert log.sent == 10
    assert told == [("::1", 5), ("::1", 5)]


def test_fields(caplog: pytest.LogCaptureFixture) -> None:
    """What scripts read, beside the text."""
    caplog.set_level(logging.INFO)
    RequestLog().transfer("::1", "GET", "/data?access=secret", 206, MISS, sent=5, seconds=0.51234, problem="cut off")
    assert caplog.records[0].__dict__["fields"] == {
        "event": "request",
        "client": "::1",
        "method": "GET",
        "path": "/data",
        "status": 206,
        "outcome": "fwd=miss",
        "cache_status": "ollama-cache; fwd=miss; stored",
        "bytes": 5,
        "seconds": 0.512,
        "problem": "cut off",
    }
