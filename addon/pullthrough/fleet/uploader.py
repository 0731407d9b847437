"""Upload public blobs and manifests to the fleet's object store, in the background.

Invariant: what remains to be uploaded follows from the store alone, so no crash loses it; a blob's object appears only
once all its bytes have been read and match its digest; a manifest follows its last blob; nothing of a private model is
uploaded. One blob at a time, part by part.
"""

import asyncio
import hashlib
import logging
from collections.abc import Collection, Mapping
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import ForgedDocument, TierError
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.fleet import documents
from pullthrough.fleet.object_store import PART
from pullthrough.fleet.tier import Tier
from pullthrough.runtime import platform
from pullthrough.runtime.clock import Moment
from pullthrough.runtime.executors import Threads
from pullthrough.runtime.shared_file import SharedFile
from pullthrough.store.store import Store

_log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
"""Seconds between two scans for work."""


class Uploader:
    """Of one daemon. `open` it inside the running loop, `close` it at the end."""

    def __init__(self, tier: Tier, store: Store, threads: Threads) -> None:
        self._tier = tier
        self._store = store
        self._threads = threads
        self._told: dict[Name, tuple[bytes, bool]] = {}
        """(body, denied) of manifests for which nothing is left to do."""
        self._done: tuple[Moment, int] | None = None
        """The store's change number, and the number of suspects, at the last scan."""
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        """How many blobs remained to be uploaded at the last scan."""

    def has_told(self, name: Name) -> bool:
        """Return whether nothing remains to be done for the manifest."""
        return name in self._told

    def forget(self, name: Name) -> None:
        """Forget a manifest that was removed from the object store."""
        self._told.pop(name, None)
        self._done = None

    def open(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="upload")

    async def close(self) -> None:
        """Stop after the part that is being sent; the next daemon uploads the rest."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            seen = (self._store.changes.now(), len(self._tier.suspects))
            try:
                if seen != self._done:
                    self._done = seen
                    await self.upload()
            except TierError as error:
                self._done = None
                _log.debug("upload: %s", error)
            except OSError as error:
                self._done = None
                _log.warning("upload: %s", error)
            await asyncio.sleep(LOOK_S)

    async def upload(self) -> None:
        """Upload everything that is missing. Raises TierError if the object store fails; the rest follows later."""
        # In a thread, as there may be many blobs: this runs after each change while pulls go on.
        due = await asyncio.to_thread(_due, self._store.known_blobs(), self._tier.there - self._tier.suspects)
        self.waiting = len(due)
        for digest in due:
            await self._upload_blob(digest)
            self.waiting -= 1
        for name, record in list(self._store.manifests().items()):
            # Lists are not uploaded: few caches ever have all of a list.
            if not name.takes_lists and self._told.get(name) != (record.body, record.denied):
                await self._upload_manifest(name, record)

    async def _upload_blob(self, digest: Digest) -> None:
        file = self._store.open_blob(digest)
        if file is None:
            return
        try:
            sound = await self._tier.look(digest, file.size) and digest not in self._tier.suspects
            if sound or await self._send(digest, file):
                self._tier.there.add(digest)
                self._tier.suspects.discard(digest)
        finally:
            file.release()

    async def _send(self, digest: Digest, file: SharedFile) -> bool:
        """Return whether the bytes matched the digest and the object is there now."""
        tier, key = self._tier, documents.blob_key(digest)
        writer = await tier.ask(tier.objects.writer, key, size=file.size, sha256=digest.hex)
        hasher = hashlib.sha256()

        def send(offset: int) -> int:
            data = platform.read_at(file.descriptor, offset, min(PART, file.size - offset))
            hasher.update(data)
            tier.objects.write(writer, data)
            return len(data)

        offset = 0
        while offset < file.size and (sent := await tier.ask(send, offset)):
            offset += sent
        if hasher.hexdigest() != digest.hex:
            _log.error("upload of %s: expected its digest, got sha256:%s; not uploaded", digest, hasher.hexdigest())
            self._store.disown(digest)
            return False
        await tier.ask(tier.objects.finish, writer)
        tier.counts.uploaded += 1
        tier.counts.uploaded_bytes += file.size
        _log.info("uploaded %s: %d bytes", digest.short, file.size)
        return True

    async def _upload_manifest(self, name: Name, record: ManifestRecord) -> None:
        """Upload the manifest once all its blobs are there; remove it once it is private."""
        tier, key = self._tier, documents.manifest_key(name)
        if record.denied:
            await tier.ask(tier.objects.delete, key)
            self._told[name] = (record.body, True)
            return
        if not all(self._has(digest, size) for digest, size in record.sizes.items()):
            return
        data = await tier.ask(tier.objects.read, key)
        try:
            known = documents.unseal_manifest(data, name, tier.secret) if data is not None else None
        except ForgedDocument:
            known = None
        if known is None or (known.body != record.body and known.confirmed < record.confirmed):
            await tier.ask(tier.objects.replace, key, documents.seal_manifest(name, record, tier.secret))
            _log.info("uploaded %s", name)
        self._told[name] = (record.body, False)

    def _has(self, digest: Digest, size: int | None) -> bool:
        known = self._store.blob(digest)
        return digest in self._tier.there and known is not None and known.public and known.size == size


def _due(blobs: Mapping[Digest, BlobRecord], there: Collection[Digest]) -> list[Digest]:
    return [digest for digest, record in blobs.items() if record.held and record.public and digest not in there]
