"""Presigned addresses of an object store (AWS Signature Version 4, "Authenticating Requests: Using Query Parameters").

Invariant: such an address is never changed in any part, because the signature covers the whole query. Reads no clock.
"""

from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

LONGEST_S = 7 * 86400
"""The longest lifetime of a signature, in seconds (same page, X-Amz-Expires)."""


def expiry(url: str, *, now: float) -> float | None:
    """Return when a presigned https address, obtained `now`, expires (Unix seconds).

    If the address is not valid `now`, our clock is wrong, and its lifetime counts from `now`. None if the address is
    malformed or not presigned.
    """
    try:
        parts = urlsplit(url)
        fields = parse_qs(parts.query, strict_parsing=True, max_num_fields=32)
        if parts.scheme != "https" or not fields.get("X-Amz-Signature"):
            return None
        signed = datetime.strptime(fields["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        lifetime_s = int(fields["X-Amz-Expires"][0])
    except (ValueError, KeyError):
        return None
    if not 0 < lifetime_s <= LONGEST_S:
        return None
    begin = signed.timestamp()
    return (begin if begin <= now < begin + lifetime_s else now) + lifetime_s
