"""How many bytes of blobs went to clients, came from upstream, and did not need to come again, by day.

What has been fetched is to be served once before anything is saved by it: a blob that is fetched ahead takes nothing
back, and its first client saves nothing.

Invariant: a total never goes down; what has changed is told once (`take`), so that writing it can wait and be done
for many requests together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

DAY_S: Final = 86400


@dataclass(slots=True)
class Totals:
    """Bytes of one day (UTC)."""

    served: int = 0
    fetched: int = 0
    saved: int | None = None
    """None in what versions wrote that did not count it."""


def settled(days: Mapping[int, Totals]) -> dict[int, Totals]:
    """Return the days with what each has saved, in order; where that was not counted, as it follows from the rest."""
    found, saved, balance = {}, 0, 0
    for day, totals in sorted(days.items()):
        balance += totals.served - totals.fetched
        gain = max(0, balance - saved) if totals.saved is None else totals.saved
        saved += gain
        found[day] = replace(totals, saved=gain)
    return found


class Usage:
    """The days so far, by their number since 1970-01-01 (UTC)."""

    def __init__(self, days: Mapping[int, Totals] | None = None) -> None:
        """`days` are the totals that earlier runs have left."""
        self.days = settled(days or {})
        self._changed: set[int] = set()
        self._counted = Totals()
        self._unserved = sum((each.saved or 0) - each.served + each.fetched for each in self.days.values())
        """Bytes that were fetched and have yet to be served for the first time."""

    def count_up_to(self, *, served: int, fetched: int, now: float) -> None:
        """Since the start so many bytes have gone to clients and come from upstream; what is new is this day's."""
        if (served, fetched) == (self._counted.served, self._counted.fetched):
            return
        day = int(now // DAY_S)
        totals = self.days.setdefault(day, Totals(saved=0))
        went, came = served - self._counted.served, fetched - self._counted.fetched
        first = min(went, self._unserved + came)
        self._unserved += came - first
        totals.served += went
        totals.fetched += came
        totals.saved = (totals.saved or 0) + went - first
        self._counted = Totals(served, fetched)
        self._changed.add(day)

    def take(self) -> dict[int, Totals]:
        """Return the days that have changed since the last call."""
        changed, self._changed = self._changed, set()
        return {day: self.days[day] for day in changed}
