"""The store: recorded blobs and manifests on disk, and what is known of them.

    <dir>/ollama-cache.json   the marker: this folder is a store, and of which format
    <dir>/lock                held by the one daemon
    <dir>/secret              signs capabilities (0600)
    <dir>/index/              diskcache: what is known of blobs and manifests
    <dir>/blobs/sha256-<hex>  verified blobs, complete, never changed
    <dir>/ingest/             recordings in progress: <name>.partial and <name>.journal, swept after two weeks
    <dir>/quarantine/         bytes that did not hash to their name, swept after two weeks

Invariant: a file under `blobs/` was hashed in full before it was moved there (ingest → verify → publish), and it is
a hit only while its size, time and inode are those of that moment. Blob files lie beside diskcache's own folder
because its `check(fix=True)` deletes files that it does not know (5.6.3). Knows no network.
"""

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final

from pullthrough import platform
from pullthrough.digest import Digest, trusted
from pullthrough.errors import InvalidRequest, StoreError, StoreUnwritable
from pullthrough.gcpause import gc_paused
from pullthrough.index import Index
from pullthrough.ingest import JOURNAL, PARTIAL, Ingest, SharedFile
from pullthrough.ledger import Ledger
from pullthrough.manifestjson import DOCKER_TYPE, LONGEST
from pullthrough.manifesttable import ManifestTable
from pullthrough.records import BlobRecord, ManifestRecord, Name, canonical
from pullthrough.storefolder import load_secret, prepare, take_lock

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

    def __init__(self, folder: Path, lock: BinaryIO, index: Index, secret: bytes) -> None:
        self.folder = folder
        self.secret = secret
        self._lock = lock
        self._index = index
        contents = index.load()
        self.changes = 0
        """How often what is known of a blob or a manifest has changed, but for the time of a pull."""
        self.ledger = Ledger(index, contents)
        self._blobs = contents.blobs
        self.held_bytes = sum([record.size or 0 for record in self._blobs.values() if record.held])
        """What all held blobs take together."""
        self.evicted = 0
        """Blobs that have gone since the start, to make room or because somebody said so."""
        self.evicted_bytes = 0
        self._manifests = ManifestTable(index, contents, self.read_manifest)
        self._members = index.load_members()
        """What upstream has granted of each (host, repository) to an anonymous request, besides the manifests."""
        self._open: dict[Digest, SharedFile] = {}
        self._denials: Counter[tuple[str, str]] = Counter()
        self._manifests.open()

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open the store in `folder`, making it if the folder is absent or empty.

        StoreError: a foreign or newer folder, another daemon, an unwritable disk, a corrupt index.
        """
        with gc_paused(), ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as undo:
            try:
                prepare(folder)
                lock = undo.enter_context(take_lock(folder))
                index = Index(folder / "index")
                undo.callback(index.close)
                names = beside.submit(os.listdir, folder / "blobs")  # a Path for each of many costs seconds
                store = cls(folder, lock, index, load_secret(folder))
                store._sweep(oldest=time.time() - KEPT_S)
                store._adopt_orphans(names.result())
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

    def _adopt_orphans(self, names: Sequence[str]) -> None:
        """Blob files that the index does not know become complete partials: hashed again before they are hits.

        `names` are those of the folder. Only they are looked at: a file that is not the one that was verified is
        adopted when it is asked for.
        """
        folder = self.folder / "blobs"
        texts = {name.replace("-", ":", 1): name for name in names}
        for text in texts.keys() - {digest for digest, record in self._blobs.items() if record.held}:
            with contextlib.suppress(InvalidRequest):  # whatever it is, it is not ours to touch
                Ingest.adopt(self.folder / "ingest", Digest.parse(text), folder / texts[text])

    def close(self) -> None:
        """Write out what is pending and give the folder free."""
        self._manifests.close()
        self._index.close()
        self._lock.close()

    # --- blobs

    def blob(self, digest: Digest) -> BlobRecord | None:
        """What is known of `digest`, whether or not its bytes are here."""
        return self._blobs.get(digest)

    def is_public(self, digest: Digest) -> bool:
        """Whether an anonymous request for it has succeeded upstream, and none was refused since."""
        record = self._blobs.get(digest)
        return record is not None and record.public

    def held(self, digest: Digest) -> BlobRecord | None:
        """The record of a blob whose verified file is still the one that was verified, else None."""
        record = self._blobs.get(digest)
        if record is None or not record.held:
            return None
        if digest in self._open:
            return record
        try:
            # Not by blob_path: a Path takes five times as long, and this is asked for each request.
            status = os.stat(f"{self.folder}/blobs/{digest.file_name}")  # noqa: PTH116
        except OSError:
            return None
        return record if record.is_file(status.st_size, status.st_mtime_ns, status.st_ino) else None

    def blob_path(self, digest: Digest) -> Path:
        return self.folder / "blobs" / digest.file_name

    def open_blob(self, digest: Digest) -> SharedFile | None:
        """The blob's bytes to read, None when they are not here; `release` it after use."""
        record = self.held(digest)
        if record is None:
            return None
        blob = self._open.get(digest)
        if blob is None:
            try:
                descriptor = platform.open_descriptor(self.blob_path(digest), os.O_RDONLY)
            except OSError:
                return None
            blob = self._open[digest] = SharedFile(descriptor, record.size or 0, lambda: self._open.pop(digest))
        return blob.acquire()

    def disown(self, digest: Digest) -> None:
        """The blob's file cannot be read any more: it is no hit from now on, and recorded anew when asked for."""
        record = self._blobs.get(digest)
        if record is not None and record.held:
            self._put_blob(digest, record._replace(held=False))
            with contextlib.suppress(OSError):
                self.blob_path(digest).unlink()

    def evict(self, digests: Sequence[Digest]) -> list[Path]:
        """Their blobs are no hits from now on; the files that are returned are the caller's to remove."""
        for digest in digests:
            self.evicted += 1
            self.evicted_bytes += self._blobs[digest].size or 0
            self._put_blob(digest, self._blobs[digest]._replace(held=False))
        return [self.blob_path(digest) for digest in digests]

    def open_blobs(self) -> frozenset[Digest]:
        """Those that somebody reads now."""
        return frozenset(self._open)

    def is_open(self, digest: Digest) -> bool:
        """Whether somebody reads the blob."""
        return digest in self._open

    def partials(self) -> dict[Digest, tuple[int, float]]:
        """What recordings, running or left, take of the disk: bytes, and when they last changed (Unix seconds)."""
        found = {}
        for path in (self.folder / "ingest").glob(f"*{PARTIAL}"):
            with contextlib.suppress(InvalidRequest, FileNotFoundError):
                found[Digest.parse(path.stem)] = _taken(path)
        return found

    def quarantined(self) -> dict[Path, tuple[int, float]]:
        """The same of the bytes that did not hash to their name."""
        return {path: _taken(path) for path in (self.folder / "quarantine").glob("sha256-*")}

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
        """The ingest of `digest`: a new one, or the partial that an earlier recording left."""
        return Ingest(self.folder / "ingest", digest, self.blob_path(digest))

    def place(self, digest: Digest, verified: Path) -> os.stat_result:
        """Move a file among the blobs; it is no hit before `publish`.

        The caller has hashed it; its bytes are already durable. StoreUnwritable if the disk refuses.
        """
        path = self.blob_path(digest)
        try:
            # Readable bytes under the final name first, then the index: a crash between leaves an orphan, which is
            # hashed again, never an index entry without its file.
            os.replace(verified, path)
            platform.sync_folder(path.parent)
            return path.stat()
        except OSError as error:
            raise StoreUnwritable(f"publishing {digest}: {error}") from error

    def publish(self, digest: Digest, placed: os.stat_result, *, now: float) -> BlobRecord:
        """The blob is a hit from now on, as long as its file is the one that was placed."""
        record = self._blobs.get(digest, BlobRecord())._replace(
            size=placed.st_size,
            held=True,
            mtime_ns=placed.st_mtime_ns,
            inode=placed.st_ino,
            recorded=now,
        )
        self._put_blob(digest, record)
        self._manifests.take_in(digest)
        return record

    def quarantine(self, ingest: Ingest) -> Path:
        """Put away bytes that do not hash to their name, in place of older ones; returns where they lie now."""
        path = self.folder / "quarantine" / f"{ingest.digest.file_name}-{secrets.token_hex(4)}"
        older = list(path.parent.glob(f"{ingest.digest.file_name}-*"))
        with contextlib.suppress(FileNotFoundError):
            os.replace(ingest.partial_path, path)
        self.remove_files(older)
        ingest.forget()
        return path

    def _put_blob(self, digest: Digest, record: BlobRecord) -> None:
        known = self._blobs.get(digest, BlobRecord())
        self.held_bytes += (record.size or 0) * record.held - (known.size or 0) * known.held
        self._blobs[digest] = record
        self.changes += 1
        self._index.put_blob(digest, record)

    # --- membership and visibility

    def is_member(self, host: str, repository: str, digest: Digest) -> bool:
        """A stored manifest of the repository lists it, or upstream granted it there to an anonymous request."""
        granted = self._members.get(_place(host, repository), "")
        return digest in granted or any(record.lists(digest) for record in self.manifests_of(host, repository).values())

    def repositories(self, digest: Digest) -> list[tuple[str, str]]:
        """Every (host, repository) that the digest is known to belong to: where a source can be obtained again."""
        granted = [place for place, digests in self._members.items() if digest in digests]
        records = self.manifests().items()
        listed = [name.place for name, record in records if not record.denied and record.lists(digest)]
        return list(dict.fromkeys(granted + listed))

    def confirm_public(self, host: str, repository: str, digest: Digest) -> None:
        """Upstream granted the blob of this repository to an anonymous request."""
        known = self._blobs.get(digest, BlobRecord())
        if not known.public:
            self._put_blob(digest, known._replace(public=True))
        place = _place(host, repository)
        members = self._members.get(place, "")
        if digest not in members:
            self._members[place] = members = f"{members} {digest}".lstrip()
            self._index.put_members(*place, members)

    def adopt(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest of the fleet's: a cache of it has recorded every blob, and each is public."""
        self.put_manifest(name, record)
        for digest, size in record.sizes.items():
            known = self._blobs.get(digest, BlobRecord())
            if known.size is None and size is not None:
                self._put_blob(digest, known._replace(size=size))
            self.confirm_public(name.host, name.repository, digest)

    def is_denied(self, host: str, repository: str) -> bool:
        """Whether upstream has refused an anonymous request in this repository, and granted none since."""
        return any(record.denied for record in self.manifests_of(host, repository, private=True).values())

    def deny(self, host: str, repository: str) -> bool:
        """Upstream refuses an anonymous request in this repository: nothing of it is known any more.

        All of it, because a repository is what access is granted to (`scope="repository:<name>:pull"`, OCI
        distribution-spec); what the children of its lists list, too. A blob stays public while another repository is
        confirmed to have it. The bytes stay, for those whom upstream grants them. Returns whether anything was known.
        """
        place = _place(host, repository)
        self._denials[place] += 1
        digests = set(map(trusted, self._members.get(place, "").split()))
        granted = self.manifests_of(host, repository)
        was_known = bool(digests or granted)
        for name, record in granted.items():
            digests.update(record.digests)
            self.put_manifest(name, record._replace(denied=True))
        if self._members.pop(place, None) is not None:
            self._index.delete_members(*place)
        for digest in digests.difference(" ".join(self._members.values()).split()):
            if (known := self._blobs.get(digest)) is not None and known.public:
                self._put_blob(digest, known._replace(public=False))
        return was_known

    def denials(self, host: str, repository: str) -> int:
        """How often the repository was denied since the start: an older yes than the last denial counts no more."""
        return self._denials[_place(host, repository)]

    # --- manifests

    def manifest(self, name: Name) -> ManifestRecord | None:
        return self.manifests().get(name)

    def manifest_by_digest(self, host: str, repository: str, digest: Digest) -> ManifestRecord | None:
        """The manifest of the repository whose bytes have this digest, whatever it was asked for by."""
        records = self.manifests_of(host, repository).values()
        return next((record for record in records if record.digest == digest.hex), None)

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest that an anonymous request got. A list grows by what is known of its children."""
        self.changes += 1
        self._manifests.put(name, record)

    def drop_manifest(self, name: Name) -> None:
        """Forget this representation of the model; its blobs stay, and so do those that other manifests list."""
        self._manifests.drop(name)

    def drop_model(self, name: Name) -> None:
        """Forget the model, in both representations, as far as it is there."""
        for each in (name, name.twin):
            if each in self.manifests():
                self._manifests.drop(each)

    def touch(self, name: Name, now: float) -> None:
        """A client has pulled the model `now`: this representation, or the other one where this is not stored."""
        self._manifests.touch(name if name in self.manifests() else name.twin, now)

    def manifests_of(self, host: str, repository: str, *, private: bool = False) -> dict[Name, ManifestRecord]:
        """The repository's manifests; those that are private by now only if asked for."""
        found = self._manifests.of(_place(host, repository))
        return {name: record for name, record in found if private or not record.denied}

    def manifests(self) -> Mapping[Name, ManifestRecord]:
        """All stored manifests, those that are private by now too."""
        return self._manifests.records

    def children(self) -> Mapping[Digest, ManifestRecord]:
        """The manifests that stored lists refer to, as far as their bytes have come."""
        return self._manifests.children

    def read_manifest(self, digest: Digest) -> ManifestRecord | None:
        """The manifest that a held blob is; None where it is none, or not here."""
        known = self._blobs.get(digest)
        if known is None or (known.size or 0) > LONGEST or (file := self.open_blob(digest)) is None:
            return None
        try:
            record = ManifestRecord.parse(platform.read_at(file.descriptor, 0, file.size), DOCKER_TYPE, now=0.0)
        except OSError as error:
            _log.warning("reading the manifest %s: %s", digest.short, error)
            return None
        finally:
            file.release()
        return None if record is None or record.is_list or record.digest != digest.hex else record

    # --- all of it

    def known_blobs(self) -> dict[Digest, BlobRecord]:
        """All that is known of blobs, held or not; a copy that costs a millisecond for 60,000, as it hashes nothing."""
        return dict(self._blobs)

    def blobs(self) -> dict[Digest, BlobRecord]:
        """All held blobs; walks all that are known."""
        return {digest: record for digest, record in self._blobs.items() if record.held}


def _place(host: str, repository: str) -> tuple[str, str]:
    return canonical(host), repository


def _taken(path: Path) -> tuple[int, float]:
    status = path.stat()
    return platform.allocated(status), status.st_mtime
