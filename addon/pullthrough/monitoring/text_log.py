"""Log records as lines of text for people and terminals, and not too many of them.

Invariant: what a peer sent stays on its line and cannot steer the terminal; a peer that misbehaves in a loop does not
fill the disk.
"""

import logging
from collections.abc import Callable
from copy import copy
from typing import Final

LONGEST: Final = 2000
"""Characters of a message."""
WINDOW_S: Final = 60.0
PER_WINDOW: Final = 20
"""Warnings and errors of one kind in a window; what comes beyond is counted and left out."""


class PlainText(logging.Formatter):
    """Another formatter's lines, with characters escaped that are not printable."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        plain = copy(record)
        plain.msg, plain.args = escape(shorten(record.getMessage())), None
        if record.exc_info:
            # Its lines are ours, what stands in them is not.
            lines = self.formatException(record.exc_info).split("\n")
            plain.msg = "\n".join([plain.msg, *map(escape, lines)])
            plain.exc_info = plain.exc_text = None
        return self._inner.format(plain)


class Sparing(logging.Filter):
    """Leaves out warnings and errors of a kind that come too often, and says how many when the next one is let through.

    A kind is a line of somebody's source: mitmproxy fills messages in before they are logged.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` tells monotonic seconds."""
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, int], tuple[float, int]] = {}
        """When the window of a kind began, and how many came in it."""

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        if record.levelno < logging.WARNING:
            return True
        kind, now = (record.pathname, record.lineno), self._clock()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began < WINDOW_S:
            self._kinds[kind] = began, count + 1
            return count < PER_WINDOW
        self._kinds[kind] = now, 1
        if (left_out := count - PER_WINDOW) > 0:
            record = copy(record)
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like it were left out)", None
        return record


def shorten(text: str) -> str:
    """Return the text, or its beginning and how much there was: mitmproxy logs what it cannot parse, however long
    that is.
    """
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def escape(text: str) -> str:
    """Return the text with what is not printable (controls, line ends, marks that reverse the direction) as in
    Python.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
