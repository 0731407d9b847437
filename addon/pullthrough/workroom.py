"""What all recordings of a daemon share.

Knows nothing of any one of them.
"""

from dataclasses import dataclass, field

from pullthrough.budget import Budget
from pullthrough.fetcher import Counters
from pullthrough.keeper import Keeper
from pullthrough.settings import Finish
from pullthrough.store import Store
from pullthrough.threads import Threads
from pullthrough.upstream import Upstream


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
    counters: Counters = field(default_factory=Counters)
