"""Which clock measures what.

- `Epoch`: whether what was learnt before still counts. It measures no time at all.

- `steady`: how long a peer has been silent, deadlines, pauses. The event loop's clock, which `RunningTime` makes one of
  the seconds that this process has run: while it was stopped (SIGSTOP, a frozen container, a machine that slept, a
  call that held up the loop) nobody could be heard, and so nobody was silent.
- `lasting`: until when that is good which we have signed or obtained for some hours: capabilities, addresses that an
  object store has signed. Unix seconds, which go on while the machine sleeps and which setting its clock does not move.
- `time.time`: what others write or read (certificates, leases among caches), and what is kept for a next start
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
"""Between two looks at the clock of a loop that is kept awake; more has not been run."""


def steady() -> float:
    """Return seconds by the clock of the running event loop."""
    return asyncio.get_running_loop().time()


def lasting() -> float:
    """Unix seconds, as the machine told them when this process began."""
    return _BEGAN + since_boot()


def since_boot() -> float:
    """Return seconds since the machine was started, its sleep included where the system tells."""
    if sys.platform != "win32" and (clock := getattr(time, "CLOCK_BOOTTIME", None)) is not None:
        return time.clock_gettime(clock)
    return time.monotonic()


_BEGAN: Final = time.time() - since_boot()


class RunningTime:
    """A clock that leaves out what passed unseen between two looks at it.

    Whoever uses it must look more often than every LONGEST_S.
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
    """A logical clock, which goes on whenever what was known before counts no more; for each key by itself."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()

    def advance(self, key: Hashable = None) -> None:
        """End all former moments of the key."""
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
    """How often the epoch had gone on."""

    @property
    def is_over(self) -> bool:
        """Whether what was learnt then counts no more."""
        return self != self.epoch.now(self.key)
