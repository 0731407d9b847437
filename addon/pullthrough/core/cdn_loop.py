"""Know our own requests when they come back: CDN-Loop (RFC 8586).

Invariant: what others wrote into the field stays and is only added to. Pure: who makes the identifier makes a new one
for each run of the daemon, so that two caches, or one that was restarted, are never taken for each other.
"""

from dataclasses import dataclass
from typing import Final

CDN_LOOP: Final = "CDN-Loop"


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """What this cache writes into CDN-Loop."""

    identifier: str
    """A token in lower case (RFC 9110 section 5.6.2)."""

    def extend(self, trail: str | None) -> str:
        """Return the field for a request that was caused by one with `trail`, or by none."""
        return f"{trail}, {self.identifier}" if trail else self.identifier

    def is_own(self, trail: str | None) -> bool:
        """Return whether a request with `trail` has been here before."""
        return any(member.partition(";")[0].strip().lower() == self.identifier for member in (trail or "").split(","))
