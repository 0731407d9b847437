"""How many bytes of blobs were served to clients, fetched from upstream, and saved, by day.

Bytes that were fetched must be served once before they save anything: fetching a blob ahead does not lower the savings,
and its first client does not raise them.

Invariant: a total never goes down. `take` returns each change once, which lets one write cover many requests.
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
    """None if an old version wrote it, which did not count savings."""


def settled(days: Mapping[int, Totals]) -> dict[int, Totals]:
    """Return the days in order, each with its savings; where they were not counted, computed from the rest."""
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
        """`days` are the totals of earlier runs."""
        self.days = settled(days or {})
        self._changed: set[int] = set()
        self._counted = Totals()
        self._unserved = sum((each.saved or 0) - each.served + each.fetched for each in self.days.values())
        """Bytes that were fetched but not yet served for the first time."""

    def count_up_to(self, *, served: int, fetched: int, now: float) -> None:
        """Set the bytes served and fetched since the start; the increase counts for the current day."""
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
