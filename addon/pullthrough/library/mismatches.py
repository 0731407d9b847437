"""Blobs whose bytes recently had another digest: after two wrong recordings there is no third for a while.

Invariant: a source that stays corrupt costs the disk two recordings in PASSED_S, however many clients try. Pure state:
`now` is a parameter, in seconds of any steady clock.
"""

from collections.abc import Hashable
from typing import Final

MISMATCHES: Final = 2
"""A single mismatch may be an accident on the way."""
PASSED_S: Final = 600.0
"""How long such a blob is passed through before it is recorded again."""


class Mismatches:
    """The mismatches of all blobs; beyond `limit` the oldest are forgotten."""

    def __init__(self, *, limit: int = 1000) -> None:
        self._limit = limit
        self._known: dict[Hashable, tuple[int, float]] = {}

    def note(self, blob: Hashable, *, now: float) -> None:
        """Note that the blob was recorded and its bytes had another digest."""
        count, when = self._known.pop(blob, (0, now))
        self._known[blob] = (count + 1 if now < when + PASSED_S else 1, now)
        if len(self._known) > self._limit:
            del self._known[next(iter(self._known))]

    def holds(self, blob: Hashable, *, now: float) -> bool:
        """Return whether the blob is to be passed through."""
        count, when = self._known.get(blob, (0, now))
        return count >= MISMATCHES and now < when + PASSED_S
