"""What all recordings of a daemon share.

Knows nothing of any one of them.
"""

import logging
from dataclasses import dataclass, field

from pullthrough.config.settings import Finish
from pullthrough.core.digest import Digest
from pullthrough.fleet.lease_holder import LeaseHolder
from pullthrough.fleet.nearby_sources import NearbySources
from pullthrough.fleet.tier import Tier
from pullthrough.library.eviction import Evictor
from pullthrough.recording.counters import Counters
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.retry_policy import Rates
from pullthrough.runtime.executors import Threads
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream


@dataclass(frozen=True, slots=True)
class Workroom:
    """What all recordings of a daemon share."""

    store: Store
    evictor: Evictor
    upstream: Upstream
    threads: Threads
    connections: int
    """Per recording."""
    finish: Finish
    rate_limit: RateLimit
    fleet: tuple[Tier, LeaseHolder] | None = None
    counters: Counters = field(default_factory=Counters)
    rates: Rates = field(default_factory=Rates)
    unkept: set[Digest] = field(default_factory=set)
    """Blobs of which it has been said that they cannot be kept."""

    def level_of_unkept(self, digest: Digest) -> int:
        """Return how loud it is said that the blob cannot be kept: a warning once."""
        level = logging.INFO if digest in self.unkept else logging.WARNING
        self.unkept.add(digest)
        return level

    def nearby(self, digest: Digest) -> NearbySources | None:
        """Return the fleet's own sources of the blob, where there is a fleet."""
        return NearbySources(*self.fleet, self.store, digest) if self.fleet is not None else None
