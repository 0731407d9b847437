"""Recognition of our own requests when they come back: CDN-Loop (RFC 8586).

Invariant: what others wrote into the field is kept and only added to. Pure: the caller makes a new identifier for each
run of the daemon, so that two caches, or two runs of one, are never taken for each other.
"""

from dataclasses import dataclass
from typing import Final

CDN_LOOP: Final = "CDN-Loop"


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """This cache's member of CDN-Loop."""

    identifier: str
    """A token in lower case (RFC 9110 section 5.6.2)."""

    def extend(self, trail: str | None) -> str:
        """Return the field for a request that a request with the field `trail` caused; None is a request without."""
        return f"{trail}, {self.identifier}" if trail else self.identifier

    def is_own(self, trail: str | None) -> bool:
        """Return whether a request with the field `trail` has already passed this cache."""
        return any(member.partition(";")[0].strip().lower() == self.identifier for member in (trail or "").split(","))
