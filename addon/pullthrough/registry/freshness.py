"""What to do for a manifest request: before upstream is asked, and after it was heard.

Invariant: a decision depends on the arguments alone; all times are Unix seconds and `now` is a parameter. (RFC 9111
section 4 has the terms.)
"""

from dataclasses import dataclass
from enum import Enum, auto

from pullthrough.config.settings import Withdrawn
from pullthrough.core.records import Version

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
    """Ask upstream whether the stored copy is still the one; it is served if upstream fails to answer in time."""
    FETCH = auto()
    """Only upstream's whole answer will do: nothing is stored, or this caller may not be granted what is."""


class Heard(Enum):
    """What upstream said to one manifest request."""

    NOTHING = auto()
    """No answer of the registry's: unreachable, too late, not HTTP, or somebody else's."""
    MANIFEST = auto()
    """200 with a manifest: the stored one again, or another."""
    SOMETHING = auto()
    """200 with another document than is known here."""
    GONE = auto()
    """404."""
    DENIED = auto()
    """401 or 403."""
    FAILING = auto()
    """Any other status: 429, 5xx, 400, a redirect."""
    REFUSED = auto()
    """412: this one client is too old."""


class Verdict(Enum):
    """What the client gets, and what becomes of the stored copy."""

    ADOPT = auto()
    """Upstream's manifest, which is the stored one from now on."""
    SERVE_STALE = auto()
    """The stored copy, as it is."""
    RELAY = auto()
    """Upstream's answer; the stored copy stays as it is."""
    RELAY_AND_DENY = auto()
    """Upstream's answer; whatever is stored of the repository is private from now on."""
    RELAY_AND_DROP = auto()
    """Upstream's answer; the stored copy is forgotten."""
    FAIL = auto()
    """An error: nothing is stored and nothing was heard."""


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
    """Return what to do before upstream is asked; `down_until` is when it may be asked again (0 when it is not down).

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
    return Freshness.FETCH if gated else Freshness.REVALIDATE


def conclude(heard: Heard, *, stored: bool, withdrawn: Withdrawn) -> Verdict:
    """Return what follows from upstream's answer to an anonymous request; `stored` is whether there is a copy to fall
    back on.

    A refusal of this one caller (412) changes nothing for others; a refusal of everybody does.
    """
    match heard:
        case Heard.MANIFEST:
            return Verdict.ADOPT
        case Heard.DENIED:
            return Verdict.RELAY_AND_DENY
        case Heard.GONE if stored and withdrawn is Withdrawn.DROP:
            return Verdict.RELAY_AND_DROP
        case Heard.NOTHING | Heard.SOMETHING | Heard.GONE | Heard.FAILING if stored:
            return Verdict.SERVE_STALE
        case Heard.NOTHING:
            return Verdict.FAIL
    return Verdict.RELAY
