"""The index: what is known of blobs and manifests, in diskcache.

Invariant: keys are text, values are text or bytes, and nothing is ever unpickled: a pickle in an index that somebody
else may write to is code that runs here. All of it is resident in its reader, so reading costs no SQL; writes are
queued to one thread, in order, because SQLite may wait. `cull_limit=0`, because diskcache's own culling drops ten
rows of any size. Rows are

    blob <digest>                         JSON of a BlobRecord
    manifest <host> <repository> <ref>    JSON of a ManifestRecord's facts
    body <sha256>                         a manifest's bytes
    pair <host> <repository> <digest>     empty: upstream confirmed the pair to an anonymous request

Knows no files of blobs.
"""

import json
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import diskcache

from pullthrough.digest import Digest
from pullthrough.errors import CacheError, StoreError
from pullthrough.records import BlobRecord, ManifestRecord, Name

_log = logging.getLogger(__name__)

_NO_LIMIT: Final = 1 << 62


class PlainDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no annotations
    """A diskcache Disk for text and bytes that never unpickles."""

    def put(self, key: object) -> Any:
        if type(key) is not str:
            raise TypeError(f"expected a str key, got {type(key).__name__}")
        return super().put(key)

    def get(self, key: object, raw: bool) -> Any:
        if not raw:
            raise StoreError("expected a plain key in the index, got a pickled one")
        return super().get(key, raw)

    def store(self, value: object, read: bool, key: object = diskcache.UNKNOWN) -> Any:
        if type(value) not in (str, bytes):
            raise TypeError(f"expected a str or bytes value, got {type(value).__name__}")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> Any:
        if mode == diskcache.core.MODE_PICKLE:
            raise StoreError("expected a plain value in the index, got a pickled one")
        return super().fetch(mode, filename, value, read)


@dataclass
class Contents:
    """All that an index holds."""

    blobs: dict[Digest, BlobRecord] = field(default_factory=dict)
    manifests: dict[Name, ManifestRecord] = field(default_factory=dict)
    pairs: set[tuple[str, str, Digest]] = field(default_factory=set)


class Index:
    """The index in `folder`. StoreError from the constructor and `load` if it is not sound."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.cache = diskcache.Cache(
                str(folder),
                disk=PlainDisk,
                disk_min_file_size=_NO_LIMIT,
                size_limit=_NO_LIMIT,
                cull_limit=0,
                eviction_policy="none",
                statistics=0,
                tag_index=0,
            )
        except sqlite3.DatabaseError as error:
            raise self._unsound(error) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ollama-cache-index")

    def load(self) -> Contents:
        """Read all of it."""
        try:
            return self._load()
        except (sqlite3.DatabaseError, CacheError, ValueError, KeyError, TypeError) as error:
            raise self._unsound(error) from error

    def _load(self) -> Contents:
        for (problem,) in self.cache._sql("PRAGMA quick_check(1)"):
            if problem != "ok":
                raise StoreError(str(problem))
        contents = Contents()
        bodies: dict[str, bytes] = {}
        facts: list[tuple[Name, dict[str, Any]]] = []
        for key in self.cache:
            value = self.cache[key]
            kind, _, rest = key.partition(" ")
            match kind:
                case "blob":
                    contents.blobs[Digest.parse(rest)] = BlobRecord(**json.loads(value))
                case "manifest":
                    facts.append((Name(*rest.split(" ")), json.loads(value)))
                case "body":
                    bodies[rest] = value
                case "pair":
                    host, repository, digest = rest.split(" ")
                    contents.pairs.add((host, repository, Digest.parse(digest)))
                case _:
                    raise StoreError(f"unknown key {key!r:.80}")
        for name, fact in facts:
            sizes = {Digest.parse(text): size for text, size in fact["sizes"].items()}
            oldest = tuple(fact["oldest"]) if fact["oldest"] is not None else None
            contents.manifests[name] = ManifestRecord(
                bodies[fact["body"]],
                fact["content_type"],
                fact["confirmed"],
                sizes,
                oldest,
                fact["denied"],
                fact["pulled"],
            )
        return contents

    def put_blob(self, digest: Digest, record: BlobRecord) -> None:
        self._put(f"blob {digest}", json.dumps(asdict(record)))

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        fact = {
            "body": record.digest,
            "content_type": record.content_type,
            "confirmed": record.confirmed,
            "oldest": record.oldest,
            "denied": record.denied,
            "pulled": record.pulled,
            "sizes": {str(digest): size for digest, size in record.sizes.items()},
        }
        self._put(f"body {record.digest}", record.body)
        self._put(f"manifest {name.host} {name.repository} {name.reference}", json.dumps(fact))

    def delete_manifest(self, name: Name, body: str | None) -> None:
        """`body` is the digest of the bytes, None where another manifest has the same."""
        self._write_later(self.cache.delete, f"manifest {name.host} {name.repository} {name.reference}")
        if body is not None:
            self._write_later(self.cache.delete, f"body {body}")

    def put_pair(self, host: str, repository: str, digest: Digest) -> None:
        self._put(f"pair {host} {repository} {digest}", "")

    def delete_pair(self, host: str, repository: str, digest: Digest) -> None:
        self._write_later(self.cache.delete, f"pair {host} {repository} {digest}")

    def flush(self) -> None:
        """Wait until every write so far is in the database."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is queued, and close."""
        # diskcache keeps a connection per thread: each is closed where it was opened.
        self._writer.submit(self.cache.close)
        self._writer.shutdown(wait=True)
        self.cache.close()

    def _put(self, key: str, value: str | bytes) -> None:
        self._write_later(self.cache.set, key, value)

    def _write_later(self, change: Callable[..., object], key: str, *value: str | bytes) -> None:
        self._writer.submit(self._write, change, key, *value)

    def _write(self, change: Callable[..., object], key: str, *value: str | bytes) -> None:
        try:
            change(key, *value, retry=True)
        except (sqlite3.Error, OSError, diskcache.Timeout):
            # What is resident stays right; it is only forgotten at the next start, and then learnt again.
            _log.exception("index write of %s failed", key)

    def _unsound(self, error: Exception) -> StoreError:
        return StoreError(
            f"store {self._folder.parent}: expected a sound index in {self._folder}, got: {error}; "
            f"move that folder away and start again: blobs are kept and re-verified, manifests fetched anew"
        )
