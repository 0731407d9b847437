"""The grammar of sizes and durations: a non-negative number, and a unit in upper or lower case.

Invariant: a text yields exactly the number that it says, or raises a ValueError that says what was expected.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

_QUANTITY: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-z]*)")

_BYTES: Final = {"": 1, "b": 1, "byte": 1, "bytes": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgtpe", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}
_SECONDS: Final = {
    spelling: seconds
    for seconds, spellings in (
        (1, ("", "s", "sec", "secs", "second", "seconds")),
        (60, ("m", "min", "mins", "minute", "minutes")),
        (3600, ("h", "hour", "hours")),
        (86400, ("d", "day", "days")),
        (7 * 86400, ("w", "week", "weeks")),
        (365 * 86400, ("y", "year", "years")),
    )
    for spelling in spellings
}


def parse_size(text: str) -> int:
    """Return a number of bytes; 1 KB is 1000, 1 KiB is 1024. Raises ValueError."""
    return int(_parse(text, _BYTES, "a size such as 500MB, 200GiB or 2TB"))


def parse_duration(text: str) -> float:
    """Return a number of seconds. Raises ValueError."""
    return float(_parse(text, _SECONDS, "a duration such as 300, 90s, 5m, 12h or 10d"))


def _parse(text: str, units: Mapping[str, int], expected: str) -> Fraction:
    found = _QUANTITY.fullmatch(text.strip().lower())
    if found is None or found[2] not in units:
        raise ValueError(expected)
    return Fraction(found[1]) * units[found[2]]
