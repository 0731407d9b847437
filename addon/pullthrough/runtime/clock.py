"""Which clock measures what.

- `Epoch`: whether an earlier finding still counts. It measures no time at all.

- `steady`: deadlines, pauses, and how long a peer has been silent. The event loop's clock, which `RunningTime` limits
  to the seconds that this process has run: while it was stopped (SIGSTOP, a frozen container, a machine that slept, a
  call that held up the loop) it could hear no peer, so no peer counts as silent.
- `lasting`: the expiry of what is signed for some hours: our capabilities, and addresses that an object store has
  signed. Unix seconds that continue while the machine sleeps and do not jump when its clock is set.
- `time.time`: times that others write or read (certificates, leases among caches), and times kept for the next start
  (when a manifest was confirmed, a model pulled). Such a time is never believed to lie in the future.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

LONGEST_S: Final = 2.0
"""The longest time between two readings of the clock of a loop that is kept awake; a longer gap counts as not run."""


def steady() -> float:
    """Return seconds by the clock of the running event loop."""
    return asyncio.get_running_loop().time()


def lasting() -> float:
    """Return Unix seconds, counted from the machine's clock as it stood when this process began."""
    return _BEGAN + since_boot()


def since_boot() -> float:
    """Return seconds since the machine started, including its sleep if the system tells."""
    if sys.platform != "win32" and (clock := getattr(time, "CLOCK_BOOTTIME", None)) is not None:
        return time.clock_gettime(clock)
    return time.monotonic()


_BEGAN: Final = time.time() - since_boot()


class RunningTime:
    """A clock that leaves out each gap of more than LONGEST_S between two readings.

    So it must be read more often than that.
    """

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._last = read()
        self._lost = 0.0

    def __call__(self) -> float:
        now = self._read()
        if (unseen := now - self._last) > LONGEST_S:
            self._lost += unseen
        self._last = now
        return now - self._lost


class Epoch:
    """A logical clock for each key: it advances whenever earlier findings about the key become invalid."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()

    def advance(self, key: Hashable = None) -> None:
        """End all earlier moments of the key."""
        self._counts[key] += 1

    def now(self, key: Hashable = None) -> "Moment":
        """Return the moment until the next `advance`."""
        return Moment(self, key, self._counts[key])


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of an epoch; two of them are equal if nothing happened between them."""

    epoch: Epoch
    key: Hashable
    count: int
    """How many times the epoch had advanced."""

    @property
    def is_over(self) -> bool:
        """Whether findings of that moment have become invalid."""
        return self != self.epoch.now(self.key)
