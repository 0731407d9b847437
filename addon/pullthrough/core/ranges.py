"""Range requests (RFC 9110 section 14): the grammar, and the one place that converts inclusive and half-open ranges.

Invariant: everything returned is half-open, `start <= stop <= length`; only text on the wire is inclusive. Multiple
ranges, unknown units and malformed fields are ignored, as section 14.2 allows: the answer is then the whole
representation.
"""

import re
from dataclasses import dataclass

from pullthrough.core.errors import UnexpectedResponse

# More digits than the size of any file has: `int` takes quadratic time for a longer string.
_DIGITS = r"\d{1,19}"
_SPEC = re.compile(rf"bytes=[ \t]*(?:({_DIGITS})-({_DIGITS})?|-({_DIGITS}))[ \t]*", re.IGNORECASE | re.ASCII)
_CONTENT_RANGE = re.compile(rf"bytes[ \t]+({_DIGITS})-({_DIGITS})/({_DIGITS}|\*)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The satisfiable range `[start, stop)` of a representation of `length` bytes."""

    start: int
    stop: int
    length: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def content_range(self) -> str:
        """Content-Range of a 206 (RFC 9110 section 14.4)."""
        return f"bytes {self.start}-{self.stop - 1}/{self.length}"


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """A valid range that selects no byte (416)."""

    length: int

    @property
    def content_range(self) -> str:
        """Content-Range of a 416 (RFC 9110 section 14.4)."""
        return f"bytes */{self.length}"


def parse_range(field: str | None, length: int) -> ByteRange | Unsatisfiable | None:
    """Return what a Range field selects of `length` bytes; None if the answer is the whole representation.

    That is so for an absent field, another unit, a malformed field and several ranges.
    """
    match = _SPEC.fullmatch(field.strip(" \t")) if field is not None else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        size = min(int(suffix), length)
        return ByteRange(length - size, length, length) if size else Unsatisfiable(length)
    start = int(first)
    if last is not None and int(last) < start:
        return None
    if start >= length:
        return Unsatisfiable(length)
    return ByteRange(start, length if last is None else min(int(last) + 1, length), length)


def if_range_matches(field: str | None, entity_tag: str) -> bool:
    """Return whether If-Range leaves the Range in force: absent, or the same strong entity tag (RFC 9110 section
    13.1.5).

    A date never matches: a blob is never sent with a date that is a strong validator.
    """
    return field is None or field.strip(" \t") == entity_tag


def format_range(start: int, stop: int) -> str:
    """Return the Range field that asks for `[start, stop)`."""
    return f"bytes={start}-{stop - 1}"


def parse_content_range(field: str | None) -> tuple[int, int, int | None]:
    """Return (start, stop, complete length or None) of a 206's Content-Range. Raises UnexpectedResponse."""
    match = _CONTENT_RANGE.fullmatch(field.strip(" \t")) if field is not None else None
    if match is None:
        raise UnexpectedResponse(f"expected a Content-Range like 'bytes 0-99/200', got {field!r}")
    start, stop = int(match[1]), int(match[2]) + 1
    length = None if match[3] == "*" else int(match[3])
    if stop <= start or (length is not None and stop > length):
        raise UnexpectedResponse(f"expected first-pos <= last-pos < complete length, got {field!r}")
    return start, stop, length
