"""Whose bytes had another digest lately: what has been wrong twice is not recorded a third time for a while.

Invariant: a source that stays corrupt costs the disk two recordings in PASSED_S, however many clients try. Pure state:
`now` is a parameter, in seconds of any steady clock.
"""

from collections.abc import Hashable
from typing import Final

MISMATCHES: Final = 2
"""One is an accident on the way."""
PASSED_S: Final = 600.0
"""How long a blob is passed through then, before it is recorded again."""


class Mismatches:
    """Of all blobs; beyond `limit` the oldest are forgotten."""

    def __init__(self, *, limit: int = 1000) -> None:
        self._limit = limit
        self._known: dict[Hashable, tuple[int, float]] = {}

    def note(self, blob: Hashable, *, now: float) -> None:
        """The blob was recorded, and its bytes had another digest."""
        count, when = self._known.pop(blob, (0, now))
        self._known[blob] = (count + 1 if now < when + PASSED_S else 1, now)
        if len(self._known) > self._limit:
            del self._known[next(iter(self._known))]

    def holds(self, blob: Hashable, *, now: float) -> bool:
        """Return whether the blob is to be passed through."""
        count, when = self._known.get(blob, (0, now))
        return count >= MISMATCHES and now < when + PASSED_S
