"""What to do for a manifest request: before upstream is asked, and after it has answered.

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
"""How long upstream is left alone after it failed to answer, where a stored copy exists."""


class Freshness(Enum):
    """What to do for one manifest request."""

    SERVE = auto()
    """The stored copy is fresh."""
    SERVE_STALE = auto()
    """The stored copy is stale, and upstream is known to be unreachable."""
    REVALIDATE = auto()
    """Ask upstream whether the stored copy is current; serve it if upstream does not answer in time."""
    FETCH = auto()
    """Only a full answer from upstream will do: nothing is stored, or this caller may not have it."""


class Heard(Enum):
    """Upstream's answer to one manifest request."""

    NOTHING = auto()
    """No answer from the registry: unreachable, too late, not HTTP, or from something else in its place."""
    MANIFEST = auto()
    """200 with a manifest: the stored one again, or another."""
    SOMETHING = auto()
    """200 with something other than the manifest that was asked for."""
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
    """Upstream's manifest, which replaces the stored copy."""
    SERVE_STALE = auto()
    """The stored copy, as it is."""
    RELAY = auto()
    """Upstream's answer; the stored copy stays as it is."""
    RELAY_AND_DENY = auto()
    """Upstream's answer; whatever is stored of the repository is private from now on."""
    RELAY_AND_DROP = auto()
    """Upstream's answer; the stored copy is forgotten."""
    FAIL = auto()
    """An error: nothing is stored and upstream did not answer."""


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
    """Return what to do before upstream is asked; `down_until` is when it may be asked again (0 if it is up).

    `version` is the caller's, None if it sends none. The registry refuses some models to old versions (412,
    ollama#12826): a version older than any that was granted the model is not served without asking.
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
    """Return what follows from upstream's answer to an anonymous request; `stored` is whether there is a stored copy.

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
