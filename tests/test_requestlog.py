"""requestlog: one line per request, without what is secret in it."""

import logging

import pytest

from pullthrough.requestlog import log_answer, log_transfer


def test_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Who asked what and how it ended; the query, which may be a capability, is cut."""
    caplog.set_level(logging.INFO)
    log_answer("10.0.0.7", "GET", "/v2/x?access=secret", 307, "ollama-cache; hit")
    log_transfer("::1", "GET", "/data?access=secret", 206, "ollama-cache; hit", sent=5, seconds=0.5, problem="")
    log_transfer("::1", "GET", "/data", 200, "c", sent=5, seconds=1, problem="client disconnected")
    assert [record.getMessage() for record in caplog.records] == [
        "10.0.0.7 GET /v2/x -> 307 ollama-cache; hit",
        "::1 GET /data -> 206, 5 bytes in 0.50 s; ollama-cache; hit",
        "::1 GET /data -> 200, 5 bytes in 1.00 s, short: client disconnected; c",
    ]
