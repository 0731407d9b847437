"""The outcomes of a request, from RFC 9211: the same words in the Cache-Status field, the log and the counters."""

from dataclasses import dataclass
from enum import StrEnum

CACHE_NAME = "ollama-cache"


class Outcome(StrEnum):
    """How a request was satisfied (RFC 9211 sections 2.1 and 2.2)."""

    HIT = "hit"
    MISS = "fwd=miss"
    """Nothing stored: forwarded."""
    URI_MISS = "fwd=uri-miss"
    STALE = "fwd=stale"
    """Stored but stale: forwarded to revalidate."""
    PARTIAL = "fwd=partial"
    """Part of it is recorded, and the rest is being recorded."""
    BYPASS = "fwd=bypass"
    """The policy keeps this out of the cache."""
    REQUEST = "fwd=request"
    """The request itself required upstream: credentials, a push."""


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """One member of a Cache-Status list."""

    outcome: Outcome
    stored: bool = False
    collapsed: bool = False
    forward_status: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        parts = [CACHE_NAME, str(self.outcome)]
        if self.forward_status is not None:
            parts.append(f"fwd-status={self.forward_status}")
        if self.stored:
            parts.append("stored")
        if self.collapsed:
            parts.append("collapsed")
        if self.detail:
            parts.append(f"detail={self.detail}")
        return "; ".join(parts)
