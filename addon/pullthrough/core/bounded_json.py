"""JSON from outside, within bounds: a few bytes can stand for many objects, and brackets for a deep stack.

Invariant: a returned value took memory in proportion to `limit`; anything else raises ValueError.
"""

import json
import re
from typing import Any, Final

MAX_VALUES: Final = 64 << 10
"""Members and items in one document. A manifest of 1000 tensors has about 5000."""

_SEPARATOR: Final = re.compile(rb"[,\[{]")


def loads(body: bytes, *, limit: int) -> Any:
    """Parse at most `limit` bytes. Raises ValueError if they are not JSON, too many, or too deeply nested."""
    if len(body) > limit:
        raise ValueError(f"expected at most {limit} bytes of JSON, got {len(body)}")
    # This also counts separators in strings: no real document has so many.
    if sum(1 for _ in _SEPARATOR.finditer(body)) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES} values in a document, got more")
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("expected JSON of moderate depth, got brackets without end") from error
