"""Log records as lines of text for people and terminals, limited in number.

Invariant: what a peer sent stays on its line and cannot control the terminal; a peer that misbehaves in a loop does not
fill the disk.
"""

import logging
from collections.abc import Callable
from copy import copy
from typing import Final

LONGEST: Final = 2000
"""The most characters of a message."""
WINDOW_S: Final = 60.0
PER_WINDOW: Final = 20
"""The most warnings and errors of one kind in a window; further ones are counted and omitted."""


class PlainText(logging.Formatter):
    """A formatter that escapes what is not printable in another formatter's lines."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        plain = copy(record)
        plain.msg, plain.args = escape(shorten(record.getMessage())), None
        if record.exc_info:
            # The line breaks are ours, the text of the lines is not.
            lines = self.formatException(record.exc_info).split("\n")
            plain.msg = "\n".join([plain.msg, *map(escape, lines)])
            plain.exc_info = plain.exc_text = None
        return self._inner.format(plain)


class Sparing(logging.Filter):
    """A filter that omits warnings and errors of a kind that come too often, and counts them on the next one it passes.

    A kind is a line of source code, because mitmproxy formats messages before it logs them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns monotonic seconds."""
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, int], tuple[float, int]] = {}
        """When the window of each kind began, and how many came in it."""

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
    """Return the text, or its beginning and its length: mitmproxy logs in full whatever it cannot parse."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def escape(text: str) -> str:
    """Escape what is not printable (control characters, line ends, marks that reverse the direction) as Python does."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
