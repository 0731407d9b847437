"""Fields of upstream's answers, made safe to read, to log and to send on.

Invariant: a field that is kept is printable ASCII and no longer than its meaning needs; all others are treated as not
sent (RFC 9110 section 5.5).
"""

from collections.abc import Mapping
from typing import Final

from multidict import CIMultiDict

LONGEST: Final = 8190
"""The most that the client library reads of one line; signed addresses have up to 2500 characters."""
LONGEST_OF: Final = {
    "accept-ranges": 64,
    "content-encoding": 64,
    "content-length": 20,
    "content-range": 128,
    "content-type": 256,
    "date": 64,
    "docker-content-digest": 256,
    "etag": 256,
    "ollama-content-digest": 256,
    "retry-after": 64,
    "www-authenticate": 2048,
}
"""The most characters of a field, by its name in lower case."""


def cleaned(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the fields that are fit for use, the first of each name first."""
    return CIMultiDict((name, value) for name, value in headers.items() if is_clean(name, value))


def is_clean(name: str, value: str) -> bool:
    """Return whether the field is printable ASCII and not too long."""
    text = value.replace("\t", " ")
    return text.isascii() and text.isprintable() and len(text) <= LONGEST_OF.get(name.lower(), LONGEST)
