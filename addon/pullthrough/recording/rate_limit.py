"""The limit on bytes from upstream: one token bucket for all recordings.

Invariant: over any time, the bytes spent are at most the rate times that time plus one burst. A connection that spends
waits until the bucket has recovered, so equal connections get equal shares. Background fetches pause while a client is
reading. Pure state: `now` is a parameter.
"""

from typing import Final

BURST_S: Final = 0.25
"""The largest burst, in seconds of the rate."""

STAND_BACK_S: Final = 1.0
"""How long background fetches wait after a byte for a reader."""

LEAST_PER_CONNECTION: Final = 128 * 1024
"""Bytes/s: a slower connection would count as silent."""


class RateLimit:
    """The bucket; `rate` in bytes/s, None for no limit."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._tokens = rate * BURST_S if rate else 0.0
        self._at: float | None = None
        self._live_at: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._rate is not None

    def connections(self, wanted: int) -> int:
        """Return how many of the wanted connections the rate can keep busy."""
        return wanted if self._rate is None else max(1, min(wanted, int(self._rate // LEAST_PER_CONNECTION)))

    def spend(self, count: int, *, live: bool, now: float) -> float:
        """Account for `count` bytes that have arrived; returns how many seconds to wait before reading more."""
        if live:
            self._live_at = now
        if self._rate is None:
            return 0.0
        if self._at is not None:
            self._tokens = min(self._rate * BURST_S, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._tokens -= count
        wait = max(0.0, -self._tokens / self._rate)
        if not live and self._live_at is not None:
            wait = max(wait, self._live_at + STAND_BACK_S - now)
        return wait
