"""text_log: what a peer sends stays on its line, and a flood of warnings stays short."""

import logging
import sys

import pytest

from pullthrough.monitoring.text_log import LONGEST, PER_WINDOW, WINDOW_S, PlainText, Sparing, escape, shorten


def record(message: str, *args: object, level: int = logging.WARNING, line: int = 1) -> logging.LogRecord:
    return logging.LogRecord("a", level, "f.py", line, message, args, None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET /v2/ümläut/模型", "GET /v2/ümläut/模型"),
        ("a\nERROR b", "a\\nERROR b"),
        ("a\r\n", "a\\r\\n"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2028next", "\\u2028next"),
        ("\udcff", "\\udcff"),
        ("tab\there", "tab\\there"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    """Whatever is printable stays, in any script."""
    assert escape(text) == shown


def test_one_record_is_one_line() -> None:
    """Of a message; the lines of a traceback are ours, and what stands in them is escaped."""
    formatter = PlainText(logging.Formatter("%(levelname)s %(message)s"))
    assert formatter.format(record("client sent %s", "x\nERROR y")) == "WARNING client sent x\\nERROR y"
    try:
        raise ValueError("bad \x1b[31m")
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()
    lines = formatter.format(failed).split("\n")
    assert lines[0] == "WARNING failed"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: bad \\x1b[31m"
    assert failed.exc_info is not None, "expected the record itself to stay as it was"


def test_a_message_has_an_end() -> None:
    """What a peer sent is quoted as far as it may tell something."""
    line = PlainText(logging.Formatter("%(message)s")).format(record("cannot parse %s", "ab" * 500_000))
    assert line == f"cannot parse {'ab' * 993}a... (1000013 characters)"
    assert shorten("x" * LONGEST) == "x" * LONGEST


def test_a_flood_of_warnings() -> None:
    """So many of a kind in a window, whoever they are about; how many more is told with the first of the next."""
    now = 0.0
    sparing = Sparing(lambda: now)

    def passes(one: logging.LogRecord) -> str | None:
        out = sparing.filter(one)
        return (out if isinstance(out, logging.LogRecord) else one).getMessage() if out else None

    said = [passes(record("refused client %s", number)) for number in range(PER_WINDOW + 500)]
    assert said == [*(f"refused client {number}" for number in range(PER_WINDOW)), *[None] * 500]
    assert passes(record("refused client 1")) is None
    assert passes(record("something else", line=2)) == "something else"
    assert all(passes(record("answered %s", 1, level=logging.INFO)) for _ in range(PER_WINDOW * 2))
    now = WINDOW_S
    assert passes(record("refused client %s", "x")) == "refused client x (501 more like it were left out)"
    assert passes(record("refused client %s", "y")) == "refused client y"
