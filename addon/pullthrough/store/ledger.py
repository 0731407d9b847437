"""Pins, upstream's grants, the totals of each day, and signed addresses that were handed out.

Pins and grants are files of the store, the rest is in the index. Invariant: a pin takes effect at once and survives a
restart. Only grants to anonymous requests are kept, because they hold for everybody; those that took credentials are
never stored.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.records import Name
from pullthrough.store.index import Index
from pullthrough.store.layout import load_pins, save_pins
from pullthrough.store.manifest_files import ModelFiles, Place
from pullthrough.store.manifest_table import ManifestTable
from pullthrough.store.rows import Contents, Members
from pullthrough.store.usage import Totals

REFUSALS: Final = 10_000
"""How many repositories that upstream has refused are remembered until the daemon ends."""
FEW: Final = 8
"""So many blobs are sought one by one in what a manifest lists, rather than splitting it."""


class Ledger:
    """The pins, days and signed addresses of one store."""

    def __init__(self, folder: Path, index: Index, contents: Contents) -> None:
        self._folder = folder
        self._index = index
        self.pins = load_pins(folder)
        """Patterns of pinned models, in addition to the option's."""
        self.days = contents.days
        self.addresses = contents.addresses
        """HMAC of a signed address → the blob and when the address expires (Unix seconds)."""

    def keeps(self, name: Name, pins: Iterable[str]) -> bool:
        """Return whether the model is pinned, here or by the option's `pins`."""
        return name.is_among((*pins, *self.pins))

    def pin(self, pattern: str) -> None:
        """Pin the models that the pattern matches. Raises StoreUnwritable if the disk refuses."""
        self._save(self.pins | {pattern})

    def unpin(self, pattern: str) -> None:
        """Remove a pin. Raises StoreUnwritable if the disk refuses."""
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
    """The blobs of each (host, repository) that upstream has granted to an anonymous request.

    The repository's file has only those that none of its stored manifests lists: the rest follows from the manifests.
    """

    def __init__(self, index: Index, files: ModelFiles, members: Members, manifests: ManifestTable) -> None:
        """`members` are the grants in the index."""
        self._index = index
        self._files = files
        self._manifests = manifests
        self._members: dict[Place, str | set[str]] = {**members}
        self.refused: dict[Place, None] = {}
        """The latest repositories in which upstream has refused an anonymous request, and granted none since."""

    def of(self, place: Place) -> set[str]:
        """Return the digests granted in the repository; split at the first use, because most are never used."""
        granted = self._members.get(place, "")
        if isinstance(granted, str):
            granted = self._members[place] = set(granted.split())
        return granted

    def places(self, digest: Digest) -> list[Place]:
        """Return each (host, repository) in which the blob was granted."""
        return [place for place, digests in self._members.items() if digest in digests]

    def add(self, place: Place, digests: Iterable[str], *, is_kept: bool = False) -> None:
        """Add blobs that upstream has granted there; `is_kept` if the file already has them."""
        if not is_kept:
            self.refused.pop(place, None)
        granted = self.of(place)
        if new := set(digests) - granted:
            granted |= new
            self._index.put_members(*place, granted)
            if not is_kept and self._unlisted(place, new):
                self.keep(place)

    def drop(self, place: Place) -> None:
        """Drop all grants in the repository: upstream refuses it."""
        self.refused[place] = None
        if len(self.refused) > REFUSALS:
            del self.refused[next(iter(self.refused))]
        if self._members.pop(place, ""):
            self._files.drop_grants(place)
            self._index.delete_members(*place)

    def keep(self, place: Place) -> None:
        """Write the file again, with the blobs that are granted but not listed, after either has changed."""
        if granted := self.of(place):
            self._files.put_grants(place, lambda: self._unlisted(place, granted))

    def compare(self, filed: Mapping[Place, Set[str]]) -> Iterator[None]:
        """Write the grants that only the index has to the files, which say `filed`. Yields after each place."""
        for place, granted in list(self._members.items()):
            known = granted.split() if isinstance(granted, str) else granted
            if not self._unlisted(place, known) <= filed.get(place, set()):
                self.keep(place)
            yield

    def _unlisted(self, place: Place, granted: Collection[str]) -> set[str]:
        """Return the grants that no manifest lists. Copies first, because another thread may call it."""
        found = set(granted)
        for record in self._manifests.listing(place):
            if len(found) <= FEW:
                found = {each for each in found if each not in record.listed}
            else:
                found.difference_update(record.listed.split())
        return found
