"""Checks of a response with a blob's bytes against the request: an error for each check, like nginx's slice filter.

Invariant: an interval is returned only if every claim that the response makes about itself fits the request. Pure:
knows status and header fields, no connection and no bytes.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from pullthrough.core.errors import LengthContradicted, SourceExpired, UnexpectedResponse, UpstreamRefused
from pullthrough.core.ranges import parse_content_range
from pullthrough.upstream.refusals import described, is_page

_UNSATISFIED: Final = re.compile(r"bytes[ \t]+\*/(\d{1,19})", re.IGNORECASE | re.ASCII)
SOURCE_GONE: Final = frozenset({401, 403, 404, 410})
_RELAYED: Final = (
    "WWW-Authenticate",
    "Content-Type",
    "Docker-Content-Digest",
    "Docker-Distribution-Api-Version",
    "Retry-After",
)


LONGEST_BLOB: Final = 1 << 53
"""Bytes. Anything longer is a mistake, and JSON readers may confuse it with its neighbour (RFC 8259 section 6)."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The part `[start, stop)` that a response carries of a blob of `length` bytes."""

    start: int
    stop: int
    length: int


def check_data(status: int, headers: Mapping[str, str], *, asked: tuple[int, int] | None, length: int | None) -> Extent:
    """Return what a response to a GET of `[asked)` (None: of the whole) carries.

    `headers` finds names in any case; `length` is the complete length if known. Raises SourceExpired, UpstreamRefused
    (429, 5xx) or UnexpectedResponse otherwise.
    """
    if status in SOURCE_GONE:
        raise SourceExpired(status, relayable(headers))
    if status == 429 or status >= 500:
        raise UpstreamRefused(status, relayable(headers))
    if status == 416 and headers.get("Content-Range", "").replace(" ", "") == "bytes*/0" and not length:
        return Extent(0, 0, 0)
    told = _UNSATISFIED.fullmatch(headers.get("Content-Range", "").strip()) if status == 416 else None
    if told is not None and length and int(told[1]) < length:
        # The request lay within the expected length: the blob is shorter.
        raise LengthContradicted(str(length), int(told[1]))
    if status not in (200, 206) or (status == 206 and asked is None):
        raise UnexpectedResponse(f"expected {'200' if asked is None else '206 or 200'}, got {status}")
    coding = headers.get("Content-Encoding", "identity").strip().lower()
    if is_page(headers):
        raise UnexpectedResponse(f"expected a blob, got {described(status, headers)}")
    if coding not in ("", "identity"):
        raise UnexpectedResponse(f"expected no content coding, got {coding}")
    text = headers.get("Content-Length", "")
    content_length = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
    if content_length is None:
        # Without it a body that breaks off looks complete.
        raise UnexpectedResponse(f"expected a Content-Length, got {text!r}")
    if status == 200:
        extent = Extent(0, content_length, content_length)
    else:
        assert asked is not None
        start, stop, complete = parse_content_range(headers.get("Content-Range"))
        if complete is None:
            raise UnexpectedResponse("expected a complete length, got '*'")
        extent = Extent(start, stop, complete)
        if (start, stop) != (asked[0], min(asked[1], complete)):
            raise UnexpectedResponse(f"expected bytes {asked[0]}-{asked[1] - 1}, got {start}-{stop - 1}/{complete}")
        if content_length != stop - start:
            raise UnexpectedResponse(f"expected a Content-Length of {stop - start}, got {content_length}")
    if length is not None and extent.length != length:
        raise LengthContradicted(str(length), extent.length)
    return extent


def check_length(length: int, sizes: Collection[int]) -> None:
    """Raise LengthContradicted unless `length` is one of the blob's possible `sizes`.

    If none is known, the blob is not empty: only one digest is that of no bytes, and its size is known.
    """
    if sizes and length not in sizes:
        raise LengthContradicted(" or ".join(map(str, sorted(sizes)[:4])), length)
    if not sizes and not 0 < length <= LONGEST_BLOB:
        raise LengthContradicted(f"1 to {LONGEST_BLOB}", length)


def relayable(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the fields of an upstream response that a client may need."""
    return [(name, headers[name]) for name in _RELAYED if name in headers]
