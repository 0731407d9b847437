"""Presigned addresses of an object store (AWS Signature Version 4, "Authenticating Requests: Using Query Parameters").

Invariant: nothing of such an address is ever changed, because the signature covers all of its query. Reads no clock.
"""

from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

LONGEST_S = 7 * 86400
"""The longest that a signature may live, in seconds (the same page, X-Amz-Expires)."""


def expiry(url: str, *, now: float) -> float | None:
    """Return when a presigned https address expires that was obtained `now`, in Unix seconds.

    One that is not valid at that moment says that our clock is wrong: its lifetime counts from now. None if it is not
    presigned, or malformed.
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
