"""Chunk sums: the list of a blob's chunks and their digests that client2 pulls by (server/internal/client/ollama,
v0.6.6-v0.31.1).

Invariant: a list that `check` has passed covers its blob from the first byte to the last, without gap or overlap.
"""

import re
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest, UnexpectedResponse
from pullthrough.upstream.response_checks import LONGEST_BLOB

_WORD: Final = re.compile(rb"\S{1,200}")


def check(body: bytes) -> int:
    """Return the size of the blob that the lines `<digest> <first>-<last>` cover. Raises UnexpectedResponse."""
    position = 0
    words = (match[0].decode("ascii", "replace") for match in _WORD.finditer(body))
    for number, text in enumerate(words, start=1):
        interval = next(words, "")
        first, separator, last = interval.partition("-")
        try:
            Digest.parse(text)
        except InvalidRequest as error:
            raise UnexpectedResponse(f"chunk {number}: {error}") from error
        plain = separator and first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()
        if not plain or len(interval) > 40 or int(first) != position or int(last) < position:
            raise UnexpectedResponse(f"chunk {number}: expected {position}-<last byte>, got {interval:.45}")
        position = int(last) + 1
    if not 0 < position <= LONGEST_BLOB:
        raise UnexpectedResponse(f"expected intervals of 1 to {LONGEST_BLOB} bytes together, got {position}")
    return position


def whole(digest: Digest, size: int) -> bytes:
    """Return the list that has the whole blob as its one chunk."""
    return f"{digest} 0-{size - 1}\n".encode()
