"""JSON from outside, within bounds: a few bytes of it may stand for many objects, and brackets for a deep stack.

Invariant: what is returned took memory in proportion to `limit`; everything else is ValueError.
"""

import json
import re
from typing import Any, Final

MAX_VALUES: Final = 64 << 10
"""Members and items in one document. A manifest of 1000 tensors has about 5000."""

_SEPARATOR: Final = re.compile(rb"[,\[{]")


def loads(body: bytes, *, limit: int) -> Any:
    """Return the value of at most `limit` bytes. Raises ValueError if they are no JSON, too many, or too nested."""
    if len(body) > limit:
        raise ValueError(f"expected at most {limit} bytes of JSON, got {len(body)}")
    # Also counts those in strings: none that are meant to be read have so many.
    if sum(1 for _ in _SEPARATOR.finditer(body)) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES} values in a document, got more")
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("expected JSON of moderate depth, got brackets without end") from error
