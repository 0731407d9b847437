"""Sizes, times and columns, as Ollama's own command line words them (format/bytes.go, format/time.go, v0.12)."""

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


def size_text(size: int) -> str:
    """Decimal, as Ollama: `4.7 GB`, `274 MB`, `12 B`."""
    for unit, worth in _UNITS:
        if size >= worth:
            value = size / worth
            return f"{int(value)} {unit}" if value >= 10 else f"{int(value * 10) / 10:.1f} {unit}"
    return f"{size} B"


def ago_text(seconds: float | None) -> str:
    """How long ago: `3 days ago`, `just now`; None is never."""
    if seconds is None:
        return "never"
    for word, worth in _SPANS:
        if seconds >= worth * (2 if word in ("week", "month") else 1):
            count = int(seconds // worth)
            return f"{count} {word}{'s' if count > 1 else ''} ago"
    return "just now"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = GAP.join(f"{{:{width}}}" for width in widths)
    return [line.format(*row).rstrip() for row in rows]
