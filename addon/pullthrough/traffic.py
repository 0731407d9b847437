"""How many bytes of blobs went to clients and came from upstream, by day.

Invariant: a total never goes down; what has changed is told once (`take`), so that writing it can wait and be done
for many requests together. Knows neither requests nor where totals are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

DAY_S: Final = 86400


@dataclass(slots=True)
class Totals:
    """Bytes of one day (UTC)."""

    served: int = 0
    fetched: int = 0


class Traffic:
    """The days so far, by their number since 1970-01-01 (UTC)."""

    def __init__(self, days: Mapping[int, Totals] | None = None) -> None:
        """`days` are the totals that earlier runs have left."""
        self.days: dict[int, Totals] = dict(days or {})
        self._changed: set[int] = set()
        self._fetched = 0

    def serve(self, count: int, *, now: float) -> None:
        """A client has been sent so many bytes."""
        if count:
            self._day(now).served += count

    def fetch_up_to(self, total: int, *, now: float) -> None:
        """Since the start so many bytes have come from upstream."""
        if count := total - self._fetched:
            self._fetched = total
            self._day(now).fetched += count

    def take(self) -> dict[int, Totals]:
        """The days that have changed since the last call."""
        changed, self._changed = self._changed, set()
        return {day: self.days[day] for day in changed}

    def _day(self, now: float) -> Totals:
        day = int(now // DAY_S)
        self._changed.add(day)
        return self.days.setdefault(day, Totals())
