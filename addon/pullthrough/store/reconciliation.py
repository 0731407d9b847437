"""Compare the index with the files of the store, and correct the index.

A model is compared before a request for it is answered, everything else in the background. So a store whose index is
missing, old or from another disk serves at once. A manifest that the index lacks counts as stale: it is fetched again,
or served as it is while upstream is out of reach. Invariant: after `settle` the index knows every file and no others.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping
from itertools import islice

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.records import Name
from pullthrough.runtime.executors import DiskThread
from pullthrough.store.blob_table import BlobTable
from pullthrough.store.ledger import Grants
from pullthrough.store.manifest_files import Document, ModelFiles, Place
from pullthrough.store.manifest_table import ManifestTable

_log = logging.getLogger(__name__)

_MODELS = 20
"""Repositories compared without a pause: some milliseconds, because their manifests are parsed."""
_STEP = 200
"""Blobs, or places with grants, compared without a pause."""


class Reconciliation:
    """The comparison of one store."""

    def __init__(
        self,
        files: ModelFiles,
        manifests: ManifestTable,
        grants: Grants,
        blobs: BlobTable,
        disk: DiskThread,
        changed: Callable[[], object],
    ) -> None:
        """`changed` is called after each change of a manifest."""
        self._files = files
        self._manifests = manifests
        self._grants = grants
        self._blobs = blobs
        self._disk = disk
        self._changed = changed
        self._seen: set[Place] = set()
        self._turn = asyncio.Lock()

    @property
    def settled(self) -> bool:
        return self._blobs.settled

    def look(self, place: Place) -> None:
        """Correct what is known of a repository's manifests and grants from its files."""
        if self.settled or place in self._seen:
            return
        try:
            found, granted = self._disk.ask(lambda: (self._files.of(*place), self._files.grants(place)))
        except OSError as error:
            _log.warning("reading what is stored of %s/%s: %s", *place, error)
            return
        self._compare(place, found)
        self._take_in(place, granted)

    async def settle(self) -> None:
        """Compare everything that has not been compared yet. Raises StoreUnwritable if the disk cannot be read."""
        async with self._turn:
            if self.settled:
                return
            try:
                await self._settle()
            except OSError as error:
                raise StoreUnwritable(f"comparing the store with its index: {error}") from error

    async def _settle(self) -> None:
        await asyncio.to_thread(self._blobs.proofs.load)
        names = self._files.walk()
        while batch := await asyncio.to_thread(lambda: list(islice(names, _MODELS))):
            for place, found in batch:
                if place not in self._seen:
                    self._compare(place, found)
            await asyncio.sleep(0)
        filed = await asyncio.to_thread(lambda: dict(self._files.walk_grants()))
        for place, granted in filed.items():
            self._take_in(place, granted)
        for place in {name.place for name in self._manifests.records} - self._seen:
            self.look(place)
            await asyncio.sleep(0)
        for number, _ in enumerate(self._grants.compare(filed)):
            if number % _STEP == 0:
                await asyncio.sleep(0)
        unseen = {digest for digest, record in self._blobs.records.items() if record.held}
        files = self._blobs.files.walk()
        while batch_of_files := await asyncio.to_thread(lambda: list(islice(files, _STEP))):
            for file in batch_of_files:
                unseen.discard(file.digest)
                self._blobs.compare(file)
            await asyncio.sleep(0)
        for number, digest in enumerate(unseen):
            self._blobs.look(digest)
            if number % _STEP == 0:
                await asyncio.sleep(0)
        if self._disk.is_silent:
            raise OSError(errno.ETIMEDOUT, "the disk does not answer")
        self._blobs.settled = True
        self._seen.clear()
        await asyncio.to_thread(self._blobs.proofs.tidy, self._blobs.proven())

    def _take_in(self, place: Place, granted: set[Digest]) -> None:
        if not self._files.is_pending(place):
            self._grants.add(place, granted, is_kept=True)

    def _compare(self, place: Place, found: Mapping[Name, Document]) -> None:
        self._seen.add(place)
        table = self._manifests
        for name in [name for name, _ in table.of(place) if name not in found and not self._files.is_pending(name)]:
            table.drop(name)
            self._changed()
        for name, document in found.items():
            if self._files.is_pending(name):
                continue
            known = table.records.get(name)
            record = document.record(known)
            if record is None:
                _log.warning("the file of %s is no manifest; it is recorded anew when asked for", name)
                if known is not None:
                    table.drop(name)
            elif known is None or not table.is_same(known, record):
                table.put(name, record)
                self._changed()
