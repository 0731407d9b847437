"""Sizes, times, counts and columns, in the words of Ollama's command line (format/bytes.go, format/time.go, v0.12)."""

from collections.abc import Sequence
from typing import Final

_UNITS: Final = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3))
_SPANS: Final = (
    ("year", 365 * 86400),
    ("month", 30 * 86400),
    ("week", 7 * 86400),
    ("day", 86400),
    ("hour", 3600),
    ("minute", 60),
    ("second", 1),
)
GAP: Final = "    "
NARROW_GAP: Final = "  "
SHORTEST: Final = 9
"""The fewest characters with which a shortened text still says something."""


def size_text(size: int) -> str:
    """Return a size in decimal units, as Ollama writes it: `4.7 GB`, `274 MB`, `12 B`."""
    for unit, worth in _UNITS:
        if size >= worth:
            value = size / worth
            return f"{int(value)} {unit}" if value >= 10 else f"{int(value * 10) / 10:.1f} {unit}"
    return f"{size} B"


def ago_text(seconds: float | None) -> str:
    """Return how long ago: `3 days ago`, `just now`; None is never."""
    if seconds is None:
        return "never"
    for word, worth in _SPANS:
        if seconds >= worth * (2 if word in ("week", "month") else 1):
            count = int(seconds // worth)
            return f"{count_text(count, word)} ago"
    return "just now"


def count_text(count: int, noun: str) -> str:
    """Return how many: `1 model`, `2 models`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def columns(rows: Sequence[Sequence[str]], *, gap: str = GAP) -> list[str]:
    """Return the rows as lines, each column as wide as its widest cell."""
    line = gap.join(f"{{:{width}}}" for width in _widths(rows))
    return [line.format(*row).rstrip() for row in rows]


def fitted(rows: Sequence[Sequence[str]], width: int, *, elastic: int, spare: Sequence[int] = ()) -> list[str]:
    """Return the rows as lines of at most `width` characters, as far as possible.

    Rows that are too wide get narrower gaps, then lose the columns in `spare`, in that order; then the cells of the
    column `elastic` are shortened in the middle.
    """
    lines = columns(rows)
    kept = list(range(len(rows[0])))
    for gone in (None, *spare):
        if max(map(len, lines)) <= width:
            return lines
        if gone is not None:
            kept.remove(gone)
        lines = columns([[row[column] for column in kept] for row in rows], gap=NARROW_GAP)
    room = _widths(rows)[elastic] - (max(map(len, lines)) - width)
    narrow = [[shortened(row[column], room) if column == elastic else row[column] for column in kept] for row in rows]
    return columns(narrow, gap=NARROW_GAP)


def shortened(text: str, width: int) -> str:
    """Shorten the text to `width` characters, or SHORTEST if that is more, by leaving out its middle."""
    width = max(width, SHORTEST)
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
