"""The records of blobs, checked against their files, and the blob files that are open for reading.

Invariant: a file is a hit only while its size, mtime and inode are those it had when it was verified. A blob is public
if and only if it lies below `public/`. A file without proof counts as held, and is verified when a client asks for
it.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.records import BlobRecord
from pullthrough.runtime import platform
from pullthrough.runtime.clock import Epoch
from pullthrough.runtime.executors import DiskThread
from pullthrough.runtime.shared_file import SharedFile
from pullthrough.store.blob_files import BlobFile, BlobFiles
from pullthrough.store.index import Index
from pullthrough.store.proofs import Proof, Proofs

_log = logging.getLogger(__name__)


class BlobTable:
    """The blobs of one store. `place` waits for the disk and changes nothing in memory."""

    def __init__(
        self, folder: Path, index: Index, records: dict[Digest, BlobRecord], changes: Epoch, disk: DiskThread
    ) -> None:
        """`changes` advances with each change of a record. A disk that fails to answer changes no record."""
        self._disk = disk
        self._index = index
        self._changes = changes
        self.files = BlobFiles(folder)
        self.proofs = Proofs(folder)
        self.records = records
        self.settled = False
        """Whether the records have been compared with all files."""
        self.held_bytes = sum([record.size or 0 for record in records.values() if record.held])
        """The size of all held blobs together (bytes)."""
        self.evicted = 0
        """Blobs removed since the start, to make room or on request."""
        self.evicted_bytes = 0
        self.open: dict[Digest, SharedFile] = {}
        """Blobs that are being read."""

    def find(self, digest: Digest) -> BlobRecord | None:
        """Return the blob's record, whether or not its bytes are here."""
        if not self.settled:
            self.look(digest)
        return self.records.get(digest)

    def held(self, digest: Digest) -> BlobRecord | None:
        """Return the record of a blob whose file is still the one that was verified, else None."""
        record = self.find(digest)
        if record is None or not record.held:
            return None
        if digest in self.open:
            return record
        try:
            file = self._disk.ask(partial(self.files.look, digest, public=record.public))
        except OSError as error:
            _log.warning("looking for %s: %s", digest.short, error)
            return None
        if file is None:
            self.put(digest, record._replace(held=False))
            return None
        return record if record.is_file(file.size, file.mtime_ns, file.inode) else None

    def path(self, digest: Digest) -> Path:
        """Return the path of the blob's file, or the path it would have."""
        record = self.records.get(digest)
        public = record is not None and record.public
        file = None
        with contextlib.suppress(OSError):
            file = self._disk.ask(partial(self.files.look, digest, public=public))
        return self.files.path(digest, public=public if file is None else file.public)

    def acquire(self, digest: Digest) -> SharedFile | None:
        """Open the blob for reading; None if it is not a hit. Call `release` after use."""
        record = self.held(digest)
        if record is None:
            return None
        blob = self.open.get(digest)
        if blob is None:
            try:
                opening = partial(platform.open_descriptor, self.path(digest), os.O_RDONLY | platform.NO_LINK)
                descriptor = self._disk.ask(opening, discard=os.close)
            except OSError:
                return None
            forget = partial(self.open.pop, digest)
            blob = self.open[digest] = SharedFile(descriptor, record.size or 0, forget, change=self._disk.change)
        return blob.acquire()

    def disown(self, digest: Digest) -> None:
        """Drop a blob whose file can no longer be read; the next request records it again."""
        record = self.records.get(digest)
        if record is not None and record.held:
            self.put(digest, record._replace(held=False))
            with contextlib.suppress(OSError):
                self._disk.change(partial(self.files.remove, digest))

    def evict(self, digests: Sequence[Digest]) -> list[Path]:
        """Mark the blobs as no longer held, and return their files, which the caller removes."""
        paths = []
        for digest in digests:
            self.evicted += 1
            self.evicted_bytes += self.records[digest].size or 0
            paths.append(self.path(digest))
            self.put(digest, self.records[digest]._replace(held=False))
        return paths

    def place(self, digest: Digest, verified: Path) -> BlobFile:
        """Move a hashed, durable file to its place among the blobs; it is not a hit before `publish`.

        Raises StoreUnwritable if the disk refuses.
        """
        known = self.records.get(digest)
        public = known is not None and known.public
        path = self.files.path(digest, public=public)
        try:
            _let_all_read(verified)
            # Readable bytes under the final name first, then the proof: a crash in between leaves a file that is
            # hashed again, never a proof without its file.
            os.replace(verified, path)
            platform.sync_folder(path.parent)
            placed = self.files.look(digest, public=public)
        except OSError as error:
            raise StoreUnwritable(f"publishing {digest}: {error}") from error
        if placed is None:
            raise StoreUnwritable(f"publishing {digest}: its file has gone from {path}")
        try:
            self.proofs.add(digest, Proof(placed.size, placed.mtime_ns, placed.inode))
        except OSError as error:
            _log.warning("noting that %s was verified: %s; it may be hashed again", digest.short, error)
        return placed

    def publish(self, digest: Digest, placed: BlobFile, *, now: float) -> BlobRecord:
        """Make the placed blob a hit, for as long as its file does not change, and return its record."""
        record = self.records.get(digest, BlobRecord())._replace(
            size=placed.size,
            held=True,
            mtime_ns=placed.mtime_ns,
            inode=placed.inode,
            recorded=now,
        )
        self._move(digest, public=record.public)  # its visibility may have changed since it was placed
        self.put(digest, record)
        return record

    def show(self, digest: Digest, *, public: bool) -> None:
        """Make the blob public or private, and move its file accordingly."""
        known = self.find(digest) or BlobRecord()
        if known.public != public:
            self._move(digest, public=public)
            self.put(digest, known._replace(public=public))

    def _move(self, digest: Digest, *, public: bool) -> None:
        try:
            self._disk.change(partial(self.files.move, digest, public=public))
        except OSError as error:
            _log.error("moving %s to the %s blobs: %s", digest.short, "public" if public else "private", error)

    def put(self, digest: Digest, record: BlobRecord) -> None:
        """Set the blob's record, here and in the index."""
        known = self.records.get(digest, BlobRecord())
        self.held_bytes += (record.size or 0) * record.held - (known.size or 0) * known.held
        self.records[digest] = record
        self._changes.advance()
        self._index.put_blob(digest, record)

    # --- what the files say

    def compare(self, file: BlobFile) -> None:
        """Correct the record if it differs from a file that was just seen."""
        known = self.records.get(file.digest)
        if known is None or (known.public, known.inode) != (file.public, file.inode) or not known.is_file(*file[2:]):
            self.look(file.digest)

    def look(self, digest: Digest) -> None:
        """Update the record from the blob's file, in whichever root it lies."""
        known = self.records.get(digest)
        try:
            file, proof = self._disk.ask(partial(self._examine, digest, known))
        except OSError as error:
            _log.warning("looking for %s: %s", digest.short, error)
            return
        if file is None:
            if known is not None and known.held:
                self.put(digest, known._replace(held=False))
            return
        is_proven = known is not None and known.is_file(file.size, file.mtime_ns, file.inode)
        if not is_proven and proof is not None:
            is_proven = proof.proves(file.size, file.mtime_ns, file.inode)
        record = BlobRecord(
            size=file.size,
            held=True,
            public=file.public,
            mtime_ns=file.mtime_ns if is_proven else 0,
            inode=file.inode if is_proven else 0,
            recorded=known.recorded if known is not None and known.held else file.mtime_ns / 1e9,
        )
        if record != known:
            self.put(digest, record)

    def _examine(self, digest: Digest, known: BlobRecord | None) -> tuple[BlobFile | None, Proof | None]:
        """Return the blob's file, and its proof if the record is not enough. May be called by another thread."""
        file = self.files.look(digest, public=known is None or known.public)
        is_proven = file is None or (known is not None and known.is_file(file.size, file.mtime_ns, file.inode))
        return file, None if is_proven else self.proofs.find(digest)

    def proven(self) -> dict[Digest, Proof]:
        """Return the proof of each held blob that is verified."""
        return {
            digest: Proof(record.size or 0, record.mtime_ns, record.inode)
            for digest, record in self.records.items()
            if record.held and record.mtime_ns
        }


def _let_all_read(path: Path) -> None:
    """Make the file readable to an Ollama that runs as another user; `private/` is closed as a whole."""
    if sys.platform != "win32" and path.stat().st_nlink == 1:  # more links: the file also belongs to another folder
        with contextlib.suppress(OSError):  # a disk without modes
            path.chmod(0o644)
