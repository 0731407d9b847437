"""What people and upstream have said, what was counted and what was handed out: pins, grants, days, signed addresses.

Pins and grants are files of the store, the rest is in the index. Invariant: a pin that was set is in force at once and
after a restart. A grant to an anonymous request says what everybody may have; what took credentials is kept nowhere.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.records import Name
from pullthrough.store.index import Index
from pullthrough.store.layout import load_pins, save_pins
from pullthrough.store.manifest_files import ModelFiles, Place
from pullthrough.store.manifest_table import ManifestTable
from pullthrough.store.rows import Contents, Members
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


class Grants:
    """What upstream has granted of each (host, repository) to an anonymous request, besides what manifests list.

    A file keeps what no stored manifest of the repository lists: the rest follows from the manifests.
    """

    def __init__(self, index: Index, files: ModelFiles, members: Members, manifests: ManifestTable) -> None:
        """`members` is what the index says."""
        self._index = index
        self._files = files
        self._manifests = manifests
        self._members: dict[Place, str | set[str]] = {**members}

    def of(self, place: Place) -> set[str]:
        """Return the digests of the repository; taken apart when they are asked for first, because most never are."""
        granted = self._members.get(place, "")
        if isinstance(granted, str):
            granted = self._members[place] = set(granted.split())
        return granted

    def places(self, digest: Digest) -> list[Place]:
        """Return where the blob was granted."""
        return [place for place, digests in self._members.items() if digest in digests]

    def add(self, place: Place, digests: Iterable[str], *, is_kept: bool = False) -> None:
        """Upstream has granted these blobs there; `is_kept` where the file says so."""
        granted = self.of(place)
        if not granted.issuperset(digests := set(digests)):
            granted |= digests
            self._index.put_members(*place, granted)
            if not is_kept:
                self.keep(place)

    def drop(self, place: Place) -> None:
        """Nothing is granted there any more."""
        if self._members.pop(place, ""):
            self._files.drop_grants(place)
            self._index.delete_members(*place)

    def keep(self, place: Place) -> None:
        """Let the file have what is granted and not listed: one or the other has changed."""
        if granted := self.of(place):
            self._files.put_grants(place, lambda: self._unlisted(place, granted))

    def compare(self, filed: Mapping[Place, Set[str]]) -> Iterator[None]:
        """Let the files have what only the index knows; `filed` is what they say. Goes on place by place."""
        for place, granted in list(self._members.items()):
            known = granted.split() if isinstance(granted, str) else granted
            if not self._unlisted(place, known) <= filed.get(place, set()):
                self.keep(place)
            yield

    def _unlisted(self, place: Place, granted: Collection[str]) -> set[str]:
        """May be called by another thread: what may change meanwhile is copied first."""
        found = set(granted)
        for record in self._manifests.listing(place):
            found.difference_update(record.listed.split())
        return found
