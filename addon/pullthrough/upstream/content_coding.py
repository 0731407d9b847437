"""Content codings of control-plane answers (RFC 9110 section 8.4.1). Blobs never have one.

Invariant: what is returned is complete and no longer than the limit; anything else raises UnexpectedResponse.
"""

import zlib

from pullthrough.core.errors import UnexpectedResponse


def decode(body: bytes, coding: str, *, limit: int) -> bytes:
    """Return the body without its content coding: at most `limit` bytes."""
    match coding.strip().lower():
        case "" | "identity":
            return body
        case "gzip" | "x-gzip":
            # We ask for identity, but some middleboxes compress text all the same.
            return _inflate(body, limit)
    raise UnexpectedResponse(f"expected content coding identity or gzip, got {coding!r}")


def _inflate(body: bytes, limit: int) -> bytes:
    """Decode all members of a gzip stream (RFC 1952 section 2.2). No bytes give none, as in the answer to HEAD."""
    decoded = b""
    while body:
        inflater = zlib.decompressobj(31)
        try:
            decoded += inflater.decompress(body, limit - len(decoded) + 1)
        except zlib.error as error:
            raise UnexpectedResponse(f"expected gzip, got: {error}") from error
        if len(decoded) > limit:
            raise UnexpectedResponse(f"expected a gzip stream of at most {limit} bytes, got more")
        if not inflater.eof:
            raise UnexpectedResponse(f"expected a whole gzip stream, got its first {len(body)} bytes")
        body = inflater.unused_data
    return decoded
