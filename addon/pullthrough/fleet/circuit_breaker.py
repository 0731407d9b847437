"""A circuit breaker: whether to call a service that has failed lately.

Invariant: after FAILURES in a row the service is left alone for a pause, doubled by each further failure; then one
request at a time tries again. Pure state: `now` is a parameter, in seconds of any steady clock.
"""

from typing import Final

FAILURES: Final = 3
PAUSE_S: Final = 15.0
PAUSE_LIMIT_S: Final = 120.0
TRIAL_S: Final = 5.0
"""How long the trial request may take before another one is let through."""


class CircuitBreaker:
    """Of one service."""

    def __init__(self) -> None:
        self._failures = 0
        self._closed_at = 0.0

    def permits(self, now: float) -> bool:
        """Return whether the service may be called; during a trial, only the first caller may."""
        if self._failures < FAILURES:
            return True
        if now < self._closed_at:
            return False
        self._closed_at = now + TRIAL_S
        return True

    def is_open(self, now: float) -> bool:
        """Return whether the service is left alone; this does not use up a trial."""
        return self._failures >= FAILURES and now < self._closed_at

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._failures >= FAILURES:
            doublings = min(self._failures - FAILURES, 10)
            self._closed_at = now + min(PAUSE_LIMIT_S, PAUSE_S * 2**doublings)
