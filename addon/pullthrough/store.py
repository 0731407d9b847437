"""The store: recorded blobs and manifests on disk, and what is known of them.

    <dir>/ollama-cache.json   the marker: this folder is a store, and of which format
    <dir>/lock                held by the one daemon
    <dir>/secret              signs capabilities (0600)
    <dir>/index/              diskcache: what is known of blobs and manifests
    <dir>/blobs/sha256-<hex>  verified blobs, complete, never changed
    <dir>/ingest/             recordings in progress: <name>.partial and <name>.journal
    <dir>/quarantine/         bytes that did not hash to their name

Invariant: a file under `blobs/` was hashed in full before it was moved there (ingest → verify → publish), and it is
a hit only while its size, time and inode are those of that moment. The index is resident: reading it costs no SQL.
Blob files lie beside diskcache's own folder because its `check(fix=True)` deletes files it does not know, and
`cull_limit=0` because its culling drops ten rows of any size (diskcache 5.6.3). Knows no network.
"""

import contextlib
import json
import logging
import os
import secrets
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final

import diskcache

from pullthrough import platform
from pullthrough.digest import Digest
from pullthrough.errors import InvalidRequest, StoreError, StoreUnwritable
from pullthrough.ingest import Ingest, SharedFile

_log = logging.getLogger(__name__)

FORMAT: Final = 1
MARKER: Final = "ollama-cache.json"
_FOLDERS: Final = ("index", "blobs", "ingest", "quarantine")

# Every fact of the index is one row; `limit` is never reached because eviction is ours.
_NO_LIMIT: Final = 1 << 62


class PlainDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no annotations
    """A diskcache Disk that stores text, bytes and numbers only and never unpickles.

    A pickle in an index that somebody else may write to is code that runs here.
    """

    def put(self, key: object) -> Any:
        if type(key) is not str:
            raise TypeError(f"expected a str key, got {type(key).__name__}")
        return super().put(key)

    def get(self, key: object, raw: bool) -> Any:  # noqa: FBT001  # diskcache's signature
        if not raw:
            raise StoreError(f"expected a plain key in the index, got a pickled one ({key!r:.40})")
        return super().get(key, raw)

    def store(self, value: object, read: bool, key: object = diskcache.UNKNOWN) -> Any:  # noqa: FBT001
        if type(value) not in (str, bytes):
            raise TypeError(f"expected a str or bytes value, got {type(value).__name__}")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> Any:  # noqa: FBT001
        if mode == diskcache.core.MODE_PICKLE:
            raise StoreError("expected a plain value in the index, got a pickled one")
        return super().fetch(mode, filename, value, read)


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """What is known of one digest; `size` None and no file where only its visibility is known."""

    size: int
    held: bool
    """Its bytes are here, verified."""
    public: bool
    """An anonymous request for it succeeded upstream."""
    mtime_ns: int = 0
    inode: int = 0
    recorded: float = 0.0
    """When it was verified, Unix seconds."""


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """A stored manifest: upstream's bytes, untouched, and when upstream last confirmed them (Unix seconds)."""

    body: bytes
    content_type: str
    confirmed: float
    digests: frozenset[Digest]
    """The blobs it lists."""
    sizes: dict[Digest, int]

    @property
    def digest(self) -> str:
        return sha256(self.body).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """(host, repository, reference): under which a manifest is asked for."""

    host: str
    repository: str
    reference: str

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}:{self.reference}"


class Store:
    """Blobs and manifests on disk. Made by `open`; one per folder and process.

    `publish` and `quarantine` may wait for the disk: the daemon calls them in a thread. The rest does not.
    """

    def __init__(self, folder: Path, lock: BinaryIO, index: diskcache.Cache, secret: bytes) -> None:
        self.folder = folder
        self.secret = secret
        self._lock = lock
        self._index = index
        self._blobs: dict[Digest, BlobRecord] = {}
        self._manifests: dict[Name, ManifestRecord] = {}
        self._listed: dict[tuple[str, str], dict[Digest, int]] = {}
        self._confirmed: set[tuple[str, str, Digest]] = set()
        self._open: dict[Digest, SharedFile] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ollama-cache-index")

    # --- opening and closing

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open the store in `folder`, making it if the folder is absent or empty.

        StoreError: a foreign or newer folder, another daemon, an unwritable disk, a corrupt index.
        """
        try:
            _prepare_folder(folder)
            lock = _take_lock(folder)
        except OSError as error:
            raise StoreError(f"store {folder}: expected a writable folder, got {error.strerror or error}") from error
        try:
            index = diskcache.Cache(
                str(folder / "index"),
                disk=PlainDisk,
                disk_min_file_size=_NO_LIMIT,
                size_limit=_NO_LIMIT,
                cull_limit=0,
                eviction_policy="none",
                statistics=0,
                tag_index=0,
            )
            store = cls(folder, lock, index, _load_secret(folder))
            store._load()
        except (sqlite3.DatabaseError, StoreError, ValueError, KeyError, TypeError) as error:
            lock.close()
            raise StoreError(
                f"store {folder}: expected a sound index in {folder / 'index'}, got: {error}; "
                f"move that folder away and start again: blobs are kept and re-verified, manifests fetched anew"
            ) from error
        except OSError as error:
            lock.close()
            raise StoreError(f"store {folder}: expected a writable folder, got {error.strerror or error}") from error
        store._adopt_orphans()
        return store

    def _load(self) -> None:
        for (problem,) in self._index._sql("PRAGMA quick_check(1)"):
            if problem != "ok":
                raise StoreError(str(problem))
        bodies: dict[str, bytes] = {}
        facts: list[tuple[Name, dict[str, Any]]] = []
        for key in self._index:
            value = self._index[key]
            kind, _, rest = key.partition(" ")
            match kind:
                case "blob":
                    self._blobs[Digest.parse(rest)] = BlobRecord(**json.loads(value))
                case "manifest":
                    facts.append((Name(*rest.split(" ")), json.loads(value)))
                case "body":
                    bodies[rest] = value
                case "pair":
                    host, repository, digest = rest.split(" ")
                    self._confirmed.add((host, repository, Digest.parse(digest)))
                case _:
                    raise StoreError(f"unknown key {key!r:.80}")
        for name, fact in facts:
            sizes = {Digest.parse(text): size for text, size in fact["sizes"].items()}
            record = ManifestRecord(
                bodies[fact["body"]], fact["content_type"], fact["confirmed"], frozenset(sizes), sizes
            )
            self._manifests[name] = record
            self._listed.setdefault((name.host, name.repository), {}).update(sizes)

    def _adopt_orphans(self) -> None:
        """Blob files that the index does not know become complete partials: hashed again before they are hits."""
        for path in (self.folder / "blobs").iterdir():
            try:
                digest = Digest.parse(path.name)
            except InvalidRequest:
                continue  # whatever it is, it is not ours to touch
            if self.held(digest) is None:
                Ingest.adopt(self.folder / "ingest", digest, path)

    def close(self) -> None:
        """Write out what is pending and give the folder free."""
        # diskcache keeps a connection per thread: each is closed where it was opened.
        self._writer.submit(self._index.close)
        self._writer.shutdown(wait=True)
        self._index.close()
        self._lock.close()

    # --- blobs

    def blob(self, digest: Digest) -> BlobRecord | None:
        """What is known of `digest`, whether or not its bytes are here."""
        return self._blobs.get(digest)

    def held(self, digest: Digest) -> BlobRecord | None:
        """The record of a blob whose verified file is still the one that was verified, else None."""
        record = self._blobs.get(digest)
        if record is None or not record.held:
            return None
        if digest in self._open:
            return record
        try:
            status = self.blob_path(digest).stat()
        except OSError:
            return None
        same = (status.st_size, status.st_mtime_ns, status.st_ino) == (record.size, record.mtime_ns, record.inode)
        return record if same else None

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
            blob = self._open[digest] = SharedFile(descriptor, record.size, lambda: self._open.pop(digest))
        return blob.acquire()

    def ingest(self, digest: Digest) -> Ingest:
        """The ingest of `digest`: a new one, or the partial that an earlier recording left."""
        return Ingest(self.folder / "ingest", digest)

    def publish(self, ingest: Ingest, *, public: bool, now: float) -> BlobRecord:
        """Move a verified ingest among the blobs. The caller has hashed it; its bytes are already durable.

        StoreUnwritable if the disk refuses.
        """
        digest = ingest.digest
        path = self.blob_path(digest)
        try:
            # Readable bytes under the final name first, then the index: a crash between leaves an orphan, which is
            # hashed again, never an index entry without its file.
            os.replace(ingest.partial_path, path)
            platform.sync_folder(path.parent)
            status = path.stat()
        except OSError as error:
            raise StoreUnwritable(f"publishing {digest}: {error}") from error
        known = self._blobs.get(digest)
        record = BlobRecord(
            size=status.st_size,
            held=True,
            public=public or (known is not None and known.public),
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            recorded=now,
        )
        self._put_blob(digest, record)
        ingest.forget()
        return record

    def quarantine(self, ingest: Ingest) -> Path:
        """Put away bytes that do not hash to their name; returns where they lie now."""
        path = self.folder / "quarantine" / f"{ingest.digest.file_name}-{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(ingest.partial_path, path)
        ingest.forget()
        return path

    def _put_blob(self, digest: Digest, record: BlobRecord) -> None:
        self._write(f"blob {digest}", json.dumps(asdict(record)))
        self._blobs[digest] = record

    # --- membership and visibility

    def listed_size(self, host: str, repository: str, digest: Digest) -> int | None:
        """The size under which a stored manifest of the repository lists the digest."""
        return self._listed.get((host, repository), {}).get(digest)

    def is_member(self, host: str, repository: str, digest: Digest) -> bool:
        """A stored manifest of the repository lists it, or upstream confirmed the pair to an anonymous request."""
        return (host, repository, digest) in self._confirmed or (
            self.listed_size(host, repository, digest) is not None
        )

    def repositories(self, digest: Digest) -> list[tuple[str, str]]:
        """Every (host, repository) that the digest is known to belong to: where a source can be obtained again."""
        confirmed = [(host, repository) for host, repository, other in self._confirmed if other == digest]
        listed = [pair for pair, digests in self._listed.items() if digest in digests]
        return list(dict.fromkeys(confirmed + listed))

    def confirm_public(self, host: str, repository: str, digest: Digest, size: int | None) -> None:
        """Upstream answered an anonymous request for this pair."""
        known = self._blobs.get(digest)
        if known is None and size is not None:
            self._put_blob(digest, BlobRecord(size=size, held=False, public=True))
        elif known is not None and not known.public:
            self._put_blob(digest, replace(known, public=True))
        if not self.is_member(host, repository, digest):
            self._confirmed.add((host, repository, digest))
            self._write(f"pair {host} {repository} {digest}", "")

    # --- manifests

    def manifest(self, name: Name) -> ManifestRecord | None:
        return self._manifests.get(name)

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest that an anonymous request got."""
        previous = self._manifests.get(name)
        if previous is None or previous.body != record.body:
            self._write(f"body {record.digest}", record.body)
        fact = {
            "body": record.digest,
            "content_type": record.content_type,
            "confirmed": record.confirmed,
            "sizes": {str(digest): size for digest, size in record.sizes.items()},
        }
        self._write(f"manifest {name.host} {name.repository} {name.reference}", json.dumps(fact))
        self._manifests[name] = record
        self._listed.setdefault((name.host, name.repository), {}).update(record.sizes)

    def models(self) -> list[Name]:
        return sorted(self._manifests)

    def blobs(self) -> dict[Digest, BlobRecord]:
        """All held blobs."""
        return {digest: record for digest, record in self._blobs.items() if record.held}

    def _write(self, key: str, value: str | bytes) -> None:
        # In order, off the caller's thread: an index write waits for SQLite, a pull must not wait for it.
        self._writer.submit(self._write_now, key, value)

    def _write_now(self, key: str, value: str | bytes) -> None:
        try:
            self._index.set(key, value, retry=True)
        except Exception:
            # The resident index stays right; what is lost is only remembered until the next start.
            _log.exception("index write failed: %s", key)

    def flush(self) -> None:
        """Wait until every write so far is in the index."""
        self._writer.submit(lambda: None).result()


def _prepare_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"store {folder}: expected a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    try:
        text = marker.read_text()
    except FileNotFoundError:
        # A fresh file system has lost+found; a crash while the marker was written leaves its temporary.
        names = [path.name for path in folder.iterdir()]
        if names := sorted(name for name in names if name != "lost+found" and not name.startswith(f".{MARKER}")):
            raise StoreError(
                f"store {folder}: expected an ollama-cache store or an empty folder, got a folder with {names[0]!r} in it"
            ) from None
        _write_new(marker, json.dumps({"format": FORMAT}).encode() + b"\n", mode=0o644)
    else:
        try:
            found = json.loads(text)["format"]
        except (ValueError, KeyError, TypeError):
            found = text[:40]
        if found != FORMAT:
            raise StoreError(f"store {folder}: expected format {FORMAT} in {MARKER}, got {found!r}")
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"x")


def _take_lock(folder: Path) -> BinaryIO:
    lock = (folder / "lock").open("a+b")
    if not platform.lock_exclusively(lock):
        lock.seek(0)
        holder = lock.read(64).decode("ascii", "replace").strip()
        lock.close()
        raise StoreError(f"store {folder}: expected a free store, got one in use by process {holder or 'unknown'}")
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n".encode())
    lock.flush()
    return lock


def _load_secret(folder: Path) -> bytes:
    path = folder / "secret"
    if not path.exists():
        _write_new(path, secrets.token_bytes(32), mode=0o600)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise StoreError(f"expected 32 bytes in {path}, got {len(secret)}; delete the file to make a new secret")
    return secret


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Put a small file in place whole: a crash leaves none or all of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        platform.write_at(descriptor, 0, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    platform.sync_folder(path.parent)
