"""What to do for a manifest request: serve the stored copy, or ask upstream first.

Invariant: a decision depends on the arguments alone; all times are Unix seconds and `now` is a parameter.
Knows no bytes, hosts or credentials. (RFC 9111 section 4 has the terms.)
"""

from dataclasses import dataclass
from enum import Enum, auto

from pullthrough.records import Version

REVALIDATE_TIMEOUT_S = 3.0
"""How long a client waits for upstream while a stored copy could be served."""

DOWN_S = 30.0
"""How long upstream is not asked again after it failed to answer, where a stored copy exists."""


class Freshness(Enum):
    """What to do for one manifest request."""

    SERVE = auto()
    """The stored copy is fresh."""
    SERVE_STALE = auto()
    """The stored copy is stale, and upstream is known to be unreachable."""
    REVALIDATE = auto()
    """Ask upstream, within REVALIDATE_TIMEOUT_S; the stored copy is served if it fails to answer."""
    FETCH = auto()
    """Nothing is stored: only upstream can answer."""


@dataclass(frozen=True, slots=True)
class Stored:
    """When a stored manifest was last confirmed by upstream, and the oldest client version it was granted to."""

    confirmed: float
    oldest: Version | None = None


def decide(
    stored: Stored | None,
    *,
    now: float,
    lifetime_s: float,
    down_until: float,
    offline: bool,
    version: Version | None = None,
) -> Freshness:
    """The decision table; `down_until` is when upstream may be asked again (0 when it is not known to be down).

    `version` is the caller's, None where it tells none. The registry refuses some models to old versions (412,
    ollama#12826): one that is older than any it was granted to is not served unasked.
    """
    if stored is None:
        return Freshness.FETCH
    gated = version is not None and (stored.oldest is None or version < stored.oldest)
    # A clock that was set back must not make a copy fresh for ever.
    if 0 <= now - stored.confirmed < lifetime_s and not gated:
        return Freshness.SERVE
    if offline or now < down_until:
        return Freshness.SERVE_STALE
    return Freshness.REVALIDATE
