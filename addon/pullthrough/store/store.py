"""The store: recorded blobs and manifests on disk, and their records.

    <dir>/ollama-cache.json   the marker: this folder is a store, and of which format
    <dir>/lock                held by the one daemon
    <dir>/owner               names the daemon, on a disk that several machines may share
    <dir>/secret              signs capabilities (0600)
    <dir>/pins                models that are never evicted, besides the option's: a pattern on each line
    <dir>/public/             what everybody may have, in the shape of an Ollama models folder:
        blobs/sha256-<hex>    verified blobs, complete, never changed
        manifests/, manifests-v2/, other-names/   see `manifest_files`
    <dir>/private/            the same for what upstream refuses to anonymous requests, or has not been asked (0700)
        grants/               blobs that upstream has granted to anonymous requests and no manifest lists
    <dir>/verified            proofs that blobs were verified (0600)
    <dir>/index/              diskcache: the facts about blobs and manifests; derived, made anew if missing; see
                              `places` for when it is elsewhere
    <dir>/ingest/             recordings in progress: <name>.partial and <name>.journal, swept after two weeks
    <dir>/quarantine/         bytes that did not hash to their name, swept after two weeks

Invariant: the files are right, and the index is compared with them: with a model's before a request for it is answered,
with all others in the background. A file is hashed in full before it is moved among the blobs (ingest → verify →
publish); one that got there another way is hashed before its end is served.
"""

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from pullthrough.core.digest import Digest, trusted
from pullthrough.core.errors import StoreError
from pullthrough.core.manifest_json import DOCKER_TYPE, LONGEST
from pullthrough.core.records import BlobRecord, ManifestRecord, Name, canonical
from pullthrough.runtime import platform
from pullthrough.runtime.clock import Epoch, Moment
from pullthrough.runtime.executors import DiskThread
from pullthrough.runtime.gc_pause import gc_paused
from pullthrough.runtime.shared_file import SharedFile
from pullthrough.store.blob_files import BlobFile, partials, quarantined
from pullthrough.store.blob_table import BlobTable
from pullthrough.store.index import Index
from pullthrough.store.ingest import JOURNAL, PARTIAL, Ingest
from pullthrough.store.layout import folds_case, load_secret, prepare
from pullthrough.store.ledger import Grants, Ledger
from pullthrough.store.manifest_files import ModelFiles
from pullthrough.store.manifest_table import ManifestTable
from pullthrough.store.migration import migrate
from pullthrough.store.places import Place, lock_store, look_at, prepare_index
from pullthrough.store.reconciliation import Reconciliation
from pullthrough.store.rows import Contents, Members

_log = logging.getLogger(__name__)

KEPT_S: Final = 14 * 24 * 3600.0
"""How long partials and quarantined files are kept; Ollama's own client prunes partials after an hour (v0.21.0)."""

STAGING: Final = ".import-"
"""The prefix of an import's folder in `ingest/`."""


class Store:
    """Blobs and manifests on disk. Made by `open`; one per folder and process.

    `place`, `quarantine`, `partials`, `quarantined` and `remove_files` wait for the disk and change nothing in memory:
    the daemon calls them in a thread. Only the thread that owns the store calls the others.
    """

    def __init__(
        self,
        folder: Path,
        disk: Place,
        lock: contextlib.ExitStack,
        index: Index,
        contents: Contents,
        members: Members,
    ) -> None:
        """Build the store from the index's contents; `close` releases `lock`."""
        self.folder = folder
        self.disk = disk
        """How the store is kept on its disk."""
        self.secret = load_secret(folder, writable=not disk.unwritable)
        self._lock = lock
        self._index = index
        self._calls = DiskThread(may_hang=disk.shared)
        self.changes = Epoch()
        """Advances when the record of a blob or a manifest changes, except for the time of a pull."""
        self.ledger = Ledger(folder, index, contents)
        self._files = ModelFiles(folder, folds_case=folds_case(folder), change=self._calls.change)
        self._blobs = BlobTable(folder, index, contents.blobs, self.changes, self._calls)
        self._manifests = ManifestTable(index, contents, self.read_manifest)
        self._grants = Grants(index, self._files, members, self._manifests)
        self._survey = Reconciliation(
            self._files, self._manifests, self._grants, self._blobs, self._calls, self.changes.advance
        )
        self._denials = Epoch()
        self._manifests.open()

    @classmethod
    def open(cls, folder: Path, index_dir: Path | None = None) -> "Store":
        """Open the store in `folder`, making it if the folder is absent or empty.

        `index_dir` holds the index instead of the store's folder, and on a shared disk the lock too; without it, a
        shared disk uses a default folder of this machine. An existing store also opens on a full or read-only disk.
        Raises StoreError if the folder is foreign, newer, unsafe, used by another daemon, or on an unsuitable disk.
        """
        with gc_paused(), contextlib.ExitStack() as undo:
            try:
                found = prepare(folder)
                disk = look_at(folder, index_given=index_dir is not None)
                lock = undo.enter_context(contextlib.ExitStack())
                at = lock_store(folder, index_dir, disk, lock)
                migrate(folder, found)
                index, contents, members = Index.open(prepare_index(folder, at, disk, lock))
                undo.callback(index.close)
                store = cls(folder, disk, lock, index, contents, members)
                if not disk.unwritable:
                    store._sweep(oldest=time.time() - KEPT_S)
            except OSError as error:
                reason = error.strerror or error
                raise StoreError(f"store {folder}: expected a writable folder, got {reason}") from error
            undo.pop_all()
        return store

    def _sweep(self, *, oldest: float) -> None:
        """Remove partials and quarantined files older than `oldest`, and the folders of interrupted imports."""
        Ingest.sweep(self.folder / "ingest", oldest=oldest)
        for path in list((self.folder / "ingest").glob(f"{STAGING}*")):
            shutil.rmtree(path, ignore_errors=True)
        self.remove_files(path for path, (_, changed) in self.quarantined().items() if changed < oldest)

    async def settle(self) -> None:
        """Compare all records with the files. Raises StoreUnwritable if the disk cannot be read."""
        await self._survey.settle()

    def close(self) -> None:
        """Write what is pending, and release the folder."""
        self._manifests.close()
        self._files.close()
        self._index.close()
        self._lock.close()

    # --- blobs

    @property
    def is_silent(self) -> bool:
        """Whether the disk has stopped answering."""
        return self._calls.is_silent

    @property
    def held_bytes(self) -> int:
        """The size of all held blobs together (bytes)."""
        return self._blobs.held_bytes

    @property
    def evicted(self) -> int:
        """Blobs removed since the start, to make room or on request."""
        return self._blobs.evicted

    @property
    def evicted_bytes(self) -> int:
        """The bytes of the blobs in `evicted`."""
        return self._blobs.evicted_bytes

    def blob(self, digest: Digest) -> BlobRecord | None:
        """Return the blob's record, whether or not its bytes are here."""
        return self._blobs.find(digest)

    def is_public(self, digest: Digest) -> bool:
        """Return whether upstream has granted the blob to an anonymous request, and refused none since."""
        record = self._blobs.find(digest)
        return record is not None and record.public

    def held(self, digest: Digest) -> BlobRecord | None:
        """Return the record of a blob whose file is still the one that was verified, else None."""
        return self._blobs.held(digest)

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of the blob's file, or the path it would have."""
        return self._blobs.path(digest)

    def open_blob(self, digest: Digest) -> SharedFile | None:
        """Open the blob for reading; None if it is not a hit. Call `release` after use."""
        return self._blobs.acquire(digest)

    def disown(self, digest: Digest) -> None:
        """Drop a blob whose file can no longer be read; the next request records it again."""
        self._blobs.disown(digest)

    def evict(self, digests: Sequence[Digest]) -> list[Path]:
        """Mark the blobs as no longer held, and return their files, which the caller removes."""
        return self._blobs.evict(digests)

    def open_blobs(self) -> frozenset[Digest]:
        """Return the blobs that are being read."""
        return frozenset(self._blobs.open)

    def is_open(self, digest: Digest) -> bool:
        """Return whether the blob is being read."""
        return digest in self._blobs.open

    def partials(self) -> dict[Digest, tuple[int, float]]:
        """Return each partial's disk usage (bytes) and last change (Unix seconds)."""
        return partials(self.folder)

    def quarantined(self) -> dict[Path, tuple[int, float]]:
        """Return the same for quarantined files, whose bytes did not hash to their name."""
        return quarantined(self.folder)

    def remove_files(self, paths: Iterable[Path]) -> None:
        """Remove files of blobs, of the quarantine, and of partials with their journals. Failures are logged."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
                if path.suffix == PARTIAL:
                    path.with_suffix(JOURNAL).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("removing %s: %s", path, error)

    def ingest(self, digest: Digest) -> Ingest:
        """Return an ingest of `digest`, which can begin anew or resume the partial of an earlier recording."""
        disk, stranger = self.disk, self.blob_path(digest)
        return Ingest(self.folder / "ingest", digest, stranger, disk.in_order, disk.largest, change=self._calls.change)

    def place(self, digest: Digest, verified: Path) -> BlobFile:
        """Move a hashed, durable file to its place among the blobs; it is not a hit before `publish`.

        Raises StoreUnwritable if the disk refuses.
        """
        return self._blobs.place(digest, verified)

    def publish(self, digest: Digest, placed: BlobFile, *, now: float) -> BlobRecord:
        """Make the placed blob a hit, for as long as its file does not change, and return its record."""
        record = self._blobs.publish(digest, placed, now=now)
        self._manifests.take_in(digest)
        return record

    def quarantine(self, ingest: Ingest) -> Path:
        """Quarantine bytes that do not hash to their name, replacing the blob's older ones; returns their path."""
        path = self.folder / "quarantine" / f"{ingest.digest.file_name}-{secrets.token_hex(4)}"
        older = list(path.parent.glob(f"{ingest.digest.file_name}-*"))
        with contextlib.suppress(FileNotFoundError):
            os.replace(ingest.finished_path, path)
            if ingest.in_place:
                platform.sync_folder(path.parent)  # or a crash may bring it back among the blobs
        self.remove_files(older)
        ingest.forget()
        return path

    # --- membership and visibility

    def is_member(self, host: str, repository: str, digest: Digest) -> bool:
        """Return whether a manifest of the repository lists it, or upstream granted it there to anonymous requests."""
        records = self.manifests_of(host, repository).values()
        return digest in self._grants.of(_place(host, repository)) or any(record.lists(digest) for record in records)

    def repositories(self, digest: Digest) -> list[tuple[str, str]]:
        """Return every (host, repository) known to have the digest: where it can be fetched again."""
        records = self.manifests().items()
        listed = [name.place for name, record in records if not record.denied and record.lists(digest)]
        return list(dict.fromkeys(self._grants.places(digest) + listed))

    def confirm_public(self, host: str, repository: str, digest: Digest) -> None:
        """Note that upstream granted the blob of this repository to an anonymous request."""
        self._blobs.show(digest, public=True)
        place = _place(host, repository)
        self._survey.look(place)
        self._grants.add(place, [digest])

    def adopt(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest from the fleet: another of its caches has recorded every blob, and all are public."""
        self.put_manifest(name, record)
        for digest, size in record.sizes.items():
            known = self._blobs.find(digest) or BlobRecord()
            if known.size is None and size is not None:
                self._blobs.put(digest, known._replace(size=size))
            self.confirm_public(name.host, name.repository, digest)

    def is_denied(self, host: str, repository: str) -> bool:
        """Return whether a manifest of this repository is refused to everybody, by upstream or as it was imported."""
        self._survey.look(_place(host, repository))
        return bool(self._manifests.denied(_place(host, repository)))

    def is_refused(self, host: str, repository: str) -> bool:
        """Return whether upstream has refused this repository to everybody: since the start, or a stored manifest."""
        self._survey.look(place := _place(host, repository))
        return place in self._grants.refused or any(record.confirmed for record in self._manifests.denied(place))

    def deny(self, host: str, repository: str) -> bool:
        """Make the repository private, because upstream refuses an anonymous request in it.

        All of it, because access is granted per repository (`scope="repository:<name>:pull"`, OCI distribution-spec),
        including what the children of its lists list. A blob stays public while another repository is confirmed to
        have it. The bytes stay, for clients to which upstream grants them. Returns whether anything was public.
        """
        place = _place(host, repository)
        self._denials.advance(place)
        granted = self.manifests_of(host, repository)
        digests = set(map(trusted, self._grants.of(place)))
        was_known = bool(digests or granted)
        for name, record in granted.items():
            digests.update(record.digests)
            self._files.hide(name, record.body)
            self._manifests.put(name, record._replace(denied=True))
            self.changes.advance()
        self._grants.drop(place)
        for digest in digests:
            if not self._grants.places(digest):
                self._blobs.show(digest, public=False)
        return was_known

    def moment(self, host: str, repository: str) -> Moment:
        """Return the current moment: upstream's grants in the repository hold until it ends, at the next denial."""
        return self._denials.now(_place(host, repository))

    # --- manifests

    def manifest(self, name: Name) -> ManifestRecord | None:
        self._survey.look(_place(*name.place))
        return self.manifests().get(name)

    def manifest_by_digest(self, host: str, repository: str, digest: Digest) -> ManifestRecord | None:
        """Return the repository's manifest whose bytes have this digest, under whatever name it is stored."""
        records = self.manifests_of(host, repository).values()
        return next((record for record in records if record.digest == digest.hex), None)

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest that upstream gave to an anonymous request. A list gains what its known children list."""
        known = self.manifest(name)
        if known is None or (known.digest, known.denied) != (record.digest, record.denied):
            self._files.put(name, record.body, denied=record.denied)
        self.changes.advance()
        self._manifests.put(name, record)
        if not record.denied:
            self._grants.refused.pop(name.place, None)
        if known is not None and known.digest != record.digest:
            self._grants.keep(name.place)

    def drop_manifest(self, name: Name) -> None:
        """Forget this representation of the model; the blobs that it lists stay."""
        self._files.remove(name)
        self._manifests.drop(name)
        self._grants.keep(name.place)

    def drop_model(self, name: Name) -> None:
        """Forget the model, in whichever of its two representations are stored."""
        for each in (name, name.twin):
            if self.manifest(each) is not None:
                self.drop_manifest(each)

    def touch(self, name: Name, now: float, *, by_client: bool = True) -> None:
        """Note that the model was used: this representation, or the other one if this is not stored."""
        self._manifests.touch(name if name in self.manifests() else name.twin, now, by_client=by_client)

    def manifests_of(self, host: str, repository: str, *, private: bool = False) -> dict[Name, ManifestRecord]:
        """Return the repository's manifests, including those that became private if `private`."""
        self._survey.look(_place(host, repository))
        found = self._manifests.of(_place(host, repository))
        return {name: record for name, record in found if private or not record.denied}

    def manifests(self) -> Mapping[Name, ManifestRecord]:
        """Return all stored manifests, including those that became private."""
        return self._manifests.records

    def children(self) -> Mapping[Digest, ManifestRecord]:
        """Return the manifests that stored lists refer to and whose bytes are here."""
        return self._manifests.children

    def read_manifest(self, digest: Digest) -> ManifestRecord | None:
        """Parse a held blob as a manifest; None if it is not one, or not here."""
        known = self._blobs.find(digest)
        if known is None or (known.size or 0) > LONGEST or (file := self.open_blob(digest)) is None:
            return None
        try:
            body = self._calls.ask(partial(platform.read_at, file.descriptor, 0, file.size))
            record = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
        except OSError as error:
            _log.warning("reading the manifest %s: %s", digest.short, error)
            return None
        finally:
            file.release()
        return None if record is None or record.is_list or record.digest != digest.hex else record

    # --- all of it

    def known_blobs(self) -> dict[Digest, BlobRecord]:
        """Return a copy of all blobs' records, held or not: a millisecond for 60,000, because nothing is hashed."""
        return dict(self._blobs.records)

    def blobs(self) -> dict[Digest, BlobRecord]:
        """Return the records of all held blobs, by walking all records."""
        return {digest: record for digest, record in self._blobs.records.items() if record.held}


def _place(host: str, repository: str) -> tuple[str, str]:
    return canonical(host), repository
