"""What people have said, what was counted and what was handed out: pins, bytes by day, signed addresses; in the index.

Invariant: a pin that was set is in force at once and after a restart. Knows neither options nor blobs.
"""

from collections.abc import Iterable, Mapping

from pullthrough.contents import Contents
from pullthrough.digest import Digest
from pullthrough.index import Index
from pullthrough.records import Name
from pullthrough.traffic import Totals


class Ledger:
    """The pins and days of one store."""

    def __init__(self, index: Index, contents: Contents) -> None:
        self._index = index
        self.pins = contents.pins
        """Patterns of models that stay, besides those that the option names."""
        self.days = contents.days
        self.addresses = contents.addresses
        """By the HMAC of a signed address, the blob and when the address expires (Unix seconds)."""

    def keeps(self, name: Name, pins: Iterable[str]) -> bool:
        """Whether the model is pinned, here or by the option's `pins`."""
        return name.is_among((*pins, *self.pins))

    def pin(self, pattern: str) -> None:
        self.pins.add(pattern)
        self._index.put_pin(pattern)

    def unpin(self, pattern: str) -> None:
        self.pins.discard(pattern)
        self._index.delete_pin(pattern)

    def put_days(self, days: Mapping[int, Totals]) -> None:
        """Write the totals of these days."""
        self.days.update(days)
        for day, totals in days.items():
            self._index.put_day(day, totals)

    def put_address(self, key: str, digest: Digest, expires: float) -> None:
        """Remember a signed address, by its HMAC, and when it expires (Unix seconds)."""
        self.addresses.pop(key, None)
        self.addresses[key] = digest, expires
        self._index.put_address(key, digest, expires)

    def drop_address(self, key: str) -> None:
        del self.addresses[key]
        self._index.delete_address(key)
