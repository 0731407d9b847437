"""The store: recorded blobs and manifests on disk, and what is known of them.

    <dir>/ollama-cache.json   the marker: this folder is a store, and of which format
    <dir>/lock                held by the one daemon
    <dir>/owner               the same where locks do not reach every machine that has the disk
    <dir>/secret              signs capabilities (0600)
    <dir>/pins                models that stay, besides those that the option names: a pattern on each line
    <dir>/public/             what everybody may have, in the shape of an Ollama models folder:
        blobs/sha256-<hex>    verified blobs, complete, never changed
        manifests/, manifests-v2/, other-names/   as `manifest_files` says
    <dir>/private/            the same of what upstream refuses to an anonymous request, or has not been asked (0700);
        grants/               what it has granted to one besides what manifests list
    <dir>/verified            proofs that blobs were verified (0600)
    <dir>/index/              diskcache: what is known of blobs and manifests; derived, made anew where it is missing;
                              elsewhere where `places` says so
    <dir>/ingest/             recordings in progress: <name>.partial and <name>.journal, swept after two weeks
    <dir>/quarantine/         bytes that did not hash to their name, swept after two weeks

Invariant: the files are right, and the index is compared with them: with those of a model before it is answered for,
with all behind that. A file that is moved among the blobs was hashed in full before (ingest → verify → publish); one
that came there otherwise is hashed before its end is served.
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
"""How long a partial and a quarantined file stay; Ollama's own client prunes partials after an hour (v0.21.0)."""

STAGING: Final = ".import-"
"""What the folder of an import begins with, in `ingest/`."""


class Store:
    """Blobs and manifests on disk. Made by `open`; one per folder and process.

    `place`, `quarantine`, `partials`, `quarantined` and `remove_files` wait for the disk and change nothing that is
    resident: the daemon calls them in a thread. The rest is for the one thread that owns the store.
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
        """Of what the index says; `lock` is let go of at the end."""
        self.folder = folder
        self.disk = disk
        """What follows from the disk under it."""
        self.secret = load_secret(folder, writable=not disk.unwritable)
        self._lock = lock
        self._index = index
        self._calls = DiskThread(may_hang=disk.shared)
        self.changes = Epoch()
        """Goes on when what is known of a blob or a manifest changes, but for the time of a pull."""
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

        `index_dir` holds the index and the lock in place of the folder, as a folder of this machine does where the
        disk is shared. A store that is there is opened on a disk that is full or read-only too.
        Raises StoreError: a foreign or newer folder, another daemon, a folder that is not safe, a disk that is no use.
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
        """Remove partials that nobody has come back for, and evidence that nobody has looked at."""
        Ingest.sweep(self.folder / "ingest", oldest=oldest)
        for path in list((self.folder / "ingest").glob(f"{STAGING}*")):
            shutil.rmtree(path, ignore_errors=True)
        self.remove_files(path for path, (_, changed) in self.quarantined().items() if changed < oldest)

    async def settle(self) -> None:
        """Wait until all that is known has been compared with the files. Raises StoreUnwritable if that cannot be."""
        await self._survey.settle()

    def close(self) -> None:
        """Write out what is pending and give the folder free."""
        self._manifests.close()
        self._files.close()
        self._index.close()
        self._lock.close()

    # --- blobs

    @property
    def is_silent(self) -> bool:
        """Whether the disk does not answer now."""
        return self._calls.is_silent

    @property
    def held_bytes(self) -> int:
        """What all held blobs take together."""
        return self._blobs.held_bytes

    @property
    def evicted(self) -> int:
        """Blobs that have gone since the start, to make room or because somebody said so."""
        return self._blobs.evicted

    @property
    def evicted_bytes(self) -> int:
        """What they took."""
        return self._blobs.evicted_bytes

    def blob(self, digest: Digest) -> BlobRecord | None:
        """Return what is known of `digest`, whether or not its bytes are here."""
        return self._blobs.find(digest)

    def is_public(self, digest: Digest) -> bool:
        """Return whether an anonymous request for it has succeeded upstream, and none was refused since."""
        record = self._blobs.find(digest)
        return record is not None and record.public

    def held(self, digest: Digest) -> BlobRecord | None:
        """Return the record of a blob whose verified file is still the one that was verified, else None."""
        return self._blobs.held(digest)

    def blob_path(self, digest: Digest) -> Path:
        """Return where its file lies, or would."""
        return self._blobs.path(digest)

    def open_blob(self, digest: Digest) -> SharedFile | None:
        """Return the blob's bytes to read, None when they are not here; `release` it after use."""
        return self._blobs.acquire(digest)

    def disown(self, digest: Digest) -> None:
        """The blob's file cannot be read any more: it is no hit from now on, and recorded anew when asked for."""
        self._blobs.disown(digest)

    def evict(self, digests: Sequence[Digest]) -> list[Path]:
        """Return their blobs are no hits from now on; the files that are returned are the caller's to remove."""
        return self._blobs.evict(digests)

    def open_blobs(self) -> frozenset[Digest]:
        """Return those that somebody reads now."""
        return frozenset(self._blobs.open)

    def is_open(self, digest: Digest) -> bool:
        """Return whether somebody reads the blob."""
        return digest in self._blobs.open

    def partials(self) -> dict[Digest, tuple[int, float]]:
        """Return what recordings, running or left, take of the disk: bytes, and when they last changed (Unix
        seconds).
        """
        return partials(self.folder)

    def quarantined(self) -> dict[Path, tuple[int, float]]:
        """Return the same of the bytes that did not hash to their name."""
        return quarantined(self.folder)

    def remove_files(self, paths: Iterable[Path]) -> None:
        """Remove blobs' files, quarantined bytes, and partials with their journals; what the disk refuses is logged."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
                if path.suffix == PARTIAL:
                    path.with_suffix(JOURNAL).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("removing %s: %s", path, error)

    def ingest(self, digest: Digest) -> Ingest:
        """Return the ingest of `digest`: a new one, or the partial that an earlier recording left."""
        disk, stranger = self.disk, self.blob_path(digest)
        return Ingest(self.folder / "ingest", digest, stranger, disk.in_order, disk.largest, change=self._calls.change)

    def place(self, digest: Digest, verified: Path) -> BlobFile:
        """Move a file among the blobs; it is no hit before `publish`.

        The caller has hashed it; its bytes are already durable. Raises StoreUnwritable if the disk refuses.
        """
        return self._blobs.place(digest, verified)

    def publish(self, digest: Digest, placed: BlobFile, *, now: float) -> BlobRecord:
        """Return the blob is a hit from now on, as long as its file is the one that was placed."""
        record = self._blobs.publish(digest, placed, now=now)
        self._manifests.take_in(digest)
        return record

    def quarantine(self, ingest: Ingest) -> Path:
        """Put away bytes that do not hash to their name, in place of older ones; returns where they lie now."""
        path = self.folder / "quarantine" / f"{ingest.digest.file_name}-{secrets.token_hex(4)}"
        older = list(path.parent.glob(f"{ingest.digest.file_name}-*"))
        with contextlib.suppress(FileNotFoundError):
            os.replace(ingest.finished_path, path)
            if ingest.in_place:
                platform.sync_folder(path.parent)  # else it may be back among the blobs
        self.remove_files(older)
        ingest.forget()
        return path

    # --- membership and visibility

    def is_member(self, host: str, repository: str, digest: Digest) -> bool:
        """Return a stored manifest of the repository lists it, or upstream granted it there to an anonymous request."""
        records = self.manifests_of(host, repository).values()
        return digest in self._grants.of(_place(host, repository)) or any(record.lists(digest) for record in records)

    def repositories(self, digest: Digest) -> list[tuple[str, str]]:
        """Every (host, repository) that the digest is known to belong to: where a source can be obtained again."""
        records = self.manifests().items()
        listed = [name.place for name, record in records if not record.denied and record.lists(digest)]
        return list(dict.fromkeys(self._grants.places(digest) + listed))

    def confirm_public(self, host: str, repository: str, digest: Digest) -> None:
        """Upstream granted the blob of this repository to an anonymous request."""
        self._blobs.show(digest, public=True)
        place = _place(host, repository)
        self._survey.look(place)
        self._grants.add(place, [digest])

    def adopt(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest of the fleet's: a cache of it has recorded every blob, and each is public."""
        self.put_manifest(name, record)
        for digest, size in record.sizes.items():
            known = self._blobs.find(digest) or BlobRecord()
            if known.size is None and size is not None:
                self._blobs.put(digest, known._replace(size=size))
            self.confirm_public(name.host, name.repository, digest)

    def is_denied(self, host: str, repository: str) -> bool:
        """Return whether upstream has refused an anonymous request in this repository, and granted none since."""
        return bool(self.refused(host, repository))

    def refused(self, host: str, repository: str) -> list[ManifestRecord]:
        """Return the manifests of the repository that upstream has refused to an anonymous request."""
        self._survey.look(_place(host, repository))
        return self._manifests.denied(_place(host, repository))

    def deny(self, host: str, repository: str) -> bool:
        """Upstream refuses an anonymous request in this repository: nothing of it is known any more.

        All of it, because a repository is what access is granted to (`scope="repository:<name>:pull"`, OCI
        distribution-spec); what the children of its lists list, too. A blob stays public while another repository is
        confirmed to have it. The bytes stay, for those whom upstream grants them. Returns whether anything was known.
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
        """Return the moment until the repository is denied again: a yes to what was asked in it counts until then."""
        return self._denials.now(_place(host, repository))

    # --- manifests

    def manifest(self, name: Name) -> ManifestRecord | None:
        self._survey.look(_place(*name.place))
        return self.manifests().get(name)

    def manifest_by_digest(self, host: str, repository: str, digest: Digest) -> ManifestRecord | None:
        """Return the manifest of the repository whose bytes have this digest, whatever it was asked for by."""
        records = self.manifests_of(host, repository).values()
        return next((record for record in records if record.digest == digest.hex), None)

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest that an anonymous request got. A list grows by what is known of its children."""
        known = self.manifest(name)
        if known is None or (known.digest, known.denied) != (record.digest, record.denied):
            self._files.put(name, record.body, denied=record.denied)
        self.changes.advance()
        self._manifests.put(name, record)
        if known is not None and known.digest != record.digest:
            self._grants.keep(name.place)

    def drop_manifest(self, name: Name) -> None:
        """Forget this representation of the model; its blobs stay, and so do those that other manifests list."""
        self._files.remove(name)
        self._manifests.drop(name)

    def drop_model(self, name: Name) -> None:
        """Forget the model, in both representations, as far as it is there."""
        for each in (name, name.twin):
            if self.manifest(each) is not None:
                self.drop_manifest(each)

    def touch(self, name: Name, now: float, *, by_client: bool = True) -> None:
        """Note that the model was used: this representation, or the other one where this is not stored."""
        self._manifests.touch(name if name in self.manifests() else name.twin, now, by_client=by_client)

    def manifests_of(self, host: str, repository: str, *, private: bool = False) -> dict[Name, ManifestRecord]:
        """Return the repository's manifests; those that are private by now only if asked for."""
        self._survey.look(_place(host, repository))
        found = self._manifests.of(_place(host, repository))
        return {name: record for name, record in found if private or not record.denied}

    def manifests(self) -> Mapping[Name, ManifestRecord]:
        """Return all stored manifests, those that are private by now too."""
        return self._manifests.records

    def children(self) -> Mapping[Digest, ManifestRecord]:
        """Return the manifests that stored lists refer to, as far as their bytes have come."""
        return self._manifests.children

    def read_manifest(self, digest: Digest) -> ManifestRecord | None:
        """Return the manifest that a held blob is; None where it is none, or not here."""
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
        """Return all that is known of blobs, held or not; a copy that costs a millisecond for 60,000, as it hashes
        nothing.
        """
        return dict(self._blobs.records)

    def blobs(self) -> dict[Digest, BlobRecord]:
        """Return all held blobs; walks all that are known."""
        return {digest: record for digest, record in self._blobs.records.items() if record.held}


def _place(host: str, repository: str) -> tuple[str, str]:
    return canonical(host), repository
