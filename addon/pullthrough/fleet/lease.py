"""Which cache of a fleet fetches a blob from upstream, told by leases: each a numbered object that is created once.

A lease is never changed by another cache than its holder. Who cannot use it creates the one with the next number, and
whoever created that is the holder from then on; so a store need know only "create where there is none".

Pure state: `now` is a parameter, in Unix seconds.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

LIFETIME_S: Final = 15.0
"""How long a holder that is heard of no more keeps newcomers waiting at most; who has dialled it in vain goes on at
once."""
RENEW_S: Final = 5.0
GENERATIONS: Final = 20
"""So many holders in a row failed: then everybody fetches for itself."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One cache's word that it fetches a blob until `expires`."""

    node: str
    origin: str
    """Of its blob server."""
    expires: float


class Step(Enum):
    """What a cache that found a lease does."""

    HOLD = auto()
    """It is its own: fetch from upstream."""
    FOLLOW = auto()
    """Read from the holder."""
    NEXT = auto()
    """Try for the next number."""


def decide(lease: Lease | None, *, node: str, deposed: Collection[str], now: float) -> Step:
    """Return what `node` does about the lease, None for one that nobody can read; `deposed` have failed it."""
    if lease is None or lease.node in deposed:
        return Step.NEXT
    if lease.node == node:
        return Step.HOLD
    # A clock far ahead must not make a lease for ever.
    return Step.FOLLOW if now < lease.expires <= now + 4 * LIFETIME_S else Step.NEXT
