"""What people have said, what was counted and what was handed out: pins, bytes by day, signed addresses.

Pins are a file of the store, the rest is in the index. Invariant: a pin that was set is in force at once and after a
restart.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.records import Name
from pullthrough.store.index import Index
from pullthrough.store.layout import load_pins, save_pins
from pullthrough.store.rows import Contents
from pullthrough.store.usage import Totals


class Ledger:
    """The pins and days of one store."""

    def __init__(self, folder: Path, index: Index, contents: Contents) -> None:
        self._folder = folder
        self._index = index
        self.pins = load_pins(folder)
        """Patterns of models that stay, besides those that the option names."""
        self.days = contents.days
        self.addresses = contents.addresses
        """By the HMAC of a signed address, the blob and when the address expires (Unix seconds)."""

    def keeps(self, name: Name, pins: Iterable[str]) -> bool:
        """Return whether the model is pinned, here or by the option's `pins`."""
        return name.is_among((*pins, *self.pins))

    def pin(self, pattern: str) -> None:
        """Keep what the pattern names. Raises StoreUnwritable if the disk refuses."""
        self._save(self.pins | {pattern})

    def unpin(self, pattern: str) -> None:
        """Take a pin back. Raises StoreUnwritable if the disk refuses."""
        self._save(self.pins - {pattern})

    def _save(self, pins: set[str]) -> None:
        try:
            save_pins(self._folder, pins)
        except OSError as error:
            raise StoreUnwritable(f"pins: {error}") from error
        self.pins = pins

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
