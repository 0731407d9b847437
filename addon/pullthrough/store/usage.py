"""How many bytes of blobs went to clients and came from upstream, by day.

Invariant: a total never goes down; what has changed is told once (`take`), so that writing it can wait and be done
for many requests together.
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


class Usage:
    """The days so far, by their number since 1970-01-01 (UTC)."""

    def __init__(self, days: Mapping[int, Totals] | None = None) -> None:
        """`days` are the totals that earlier runs have left."""
        self.days: dict[int, Totals] = dict(days or {})
        self._changed: set[int] = set()
        self._counted = Totals()

    def count_up_to(self, *, served: int, fetched: int, now: float) -> None:
        """Since the start so many bytes have gone to clients and come from upstream; what is new is this day's."""
        if (served, fetched) == (self._counted.served, self._counted.fetched):
            return
        day = int(now // DAY_S)
        totals = self.days.setdefault(day, Totals())
        totals.served += served - self._counted.served
        totals.fetched += fetched - self._counted.fetched
        self._counted = Totals(served, fetched)
        self._changed.add(day)

    def take(self) -> dict[int, Totals]:
        """The days that have changed since the last call."""
        changed, self._changed = self._changed, set()
        return {day: self.days[day] for day in changed}
