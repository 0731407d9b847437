"""What all recordings of a daemon share.

Knows nothing of any one of them.
"""

from dataclasses import dataclass, field

from pullthrough.config.settings import Finish
from pullthrough.core.digest import Digest
from pullthrough.fleet.leaseholder import Leaseholder
from pullthrough.fleet.nearby import Nearby
from pullthrough.fleet.tier import Tier
from pullthrough.library.keeper import Keeper
from pullthrough.recording.budget import Budget
from pullthrough.recording.counters import Counters
from pullthrough.recording.patience import Rates
from pullthrough.runtime.threads import Threads
from pullthrough.store.store import Store
from pullthrough.upstream.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Workroom:
    """What all recordings of a daemon share."""

    store: Store
    keeper: Keeper
    upstream: Upstream
    threads: Threads
    connections: int
    """Per recording."""
    finish: Finish
    budget: Budget
    fleet: tuple[Tier, Leaseholder] | None = None
    counters: Counters = field(default_factory=Counters)
    rates: Rates = field(default_factory=Rates)

    def nearby(self, digest: Digest) -> Nearby | None:
        """The fleet's own sources of the blob, where there is a fleet."""
        return Nearby(*self.fleet, self.store, digest) if self.fleet is not None else None
