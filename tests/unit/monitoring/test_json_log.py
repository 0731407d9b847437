"""json_log: whatever is logged is one line of JSON."""

import json
import logging
import sys

import pytest

from pullthrough.monitoring.json_log import JsonLines


def record(message: str, *arguments: object, **facts: object) -> logging.LogRecord:
    made = logging.LogRecord("pullthrough.x", logging.INFO, "x.py", 1, message, arguments, None)
    made.created = 1_700_000_000.25
    made.__dict__.update(facts)
    return made


@pytest.mark.parametrize(
    "text", ["plain", 'a "quote" {', "two\nlines\r\u2028", "\x1b[31mred\0", "\udcff"],
    ids=["plain", "quote", "newlines", "escape", "surrogate"],
)  # fmt: skip
def test_a_line(text: str) -> None:
    """No text ends the line or writes on the terminal, and all of it is there again when it is read."""
    line = JsonLines().format(record("got %s", text, fields={"event": "request", "status": 200}))
    assert line.isascii() and line.isprintable()
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "info",
        "logger": "pullthrough.x",
        "message": f"got {text}",
        "event": "request",
        "status": 200,
    }


def test_a_failure() -> None:
    """With its traceback, on the same line."""
    try:
        raise ValueError("no")
    except ValueError:
        line = JsonLines().format(record("failed", exc_info=sys.exc_info()))
    assert json.loads(line)["traceback"].endswith("ValueError: no")
    assert "\n" not in line
