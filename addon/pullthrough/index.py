"""The index: what is known of blobs and manifests, in diskcache.

Invariant: keys are text, values are text or bytes, and nothing is ever unpickled: a pickle in an index that somebody
else may write to is code that runs here. All of it is resident in its reader, so reading costs no SQL; writes are
queued to one thread, in order, because SQLite may wait. `cull_limit=0`, because diskcache's own culling drops ten
rows of any size. Rows are

    blob <digest>                         JSON of a BlobRecord, as a list
    manifest <host> <repository> <ref>    JSON of a ManifestRecord's facts
    body <sha256>                         a manifest's bytes
    pair <host> <repository> <digest>     empty: upstream confirmed the pair to an anonymous request
    pin <pattern>                         empty: models that stay, besides those that the option names
    day <day number>                      JSON: bytes served and fetched on that day

Knows no files of blobs.
"""

import contextlib
import gc
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import diskcache

from pullthrough.digest import Digest
from pullthrough.errors import CacheError, StoreError
from pullthrough.records import BlobRecord, ManifestRecord, Name
from pullthrough.traffic import Totals

_log = logging.getLogger(__name__)

_NO_LIMIT: Final = 1 << 62
_ROWS: Final = "SELECT key, raw, mode, value FROM Cache"
"""All rows at once: a look-up by key for each takes ten times as long."""


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
    pins: set[str] = field(default_factory=set)
    days: dict[int, Totals] = field(default_factory=dict)


def look(folder: Path) -> Contents:
    """All that the index in `folder` holds at this moment, whoever writes to it. Nothing is made, locked or changed.

    StoreError where there is no sound index.
    """
    path = (folder / "cache.db").absolute()
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            return _read(connection.execute(_ROWS))
    except (sqlite3.Error, CacheError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"store {folder.parent}: expected an index in {folder}, got: {error}") from error


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
            for (problem,) in self.cache._sql("PRAGMA quick_check(1)"):
                if problem != "ok":
                    raise StoreError(str(problem))
            return _read(self.cache._sql(_ROWS))
        except (sqlite3.DatabaseError, CacheError, ValueError, KeyError, TypeError) as error:
            raise self._unsound(error) from error

    def put_blob(self, digest: Digest, record: BlobRecord) -> None:
        self._put(f"blob {digest}", json.dumps(record))

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

    def put_pin(self, pattern: str) -> None:
        self._put(f"pin {pattern}", "")

    def delete_pin(self, pattern: str) -> None:
        self._write_later(self.cache.delete, f"pin {pattern}")

    def put_day(self, day: int, totals: Totals) -> None:
        self._put(f"day {day}", json.dumps(asdict(totals)))

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


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let the garbage collector wait: a third of the time, where nothing but keepers is made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def _read(rows: Iterable[tuple[Any, int, int, Any]]) -> Contents:
    contents = Contents()
    bodies: dict[str, bytes] = {}
    blobs: list[tuple[str, str]] = []
    facts: list[tuple[Name, str]] = []
    for key, raw, mode, value in rows:
        if not raw or mode != diskcache.core.MODE_RAW:
            raise StoreError("expected plain keys and values in the index, got others")
        kind, _, rest = key.partition(" ")
        match kind:
            case "blob":
                blobs.append((rest, value))
            case "manifest":
                facts.append((Name(*rest.split(" ")), value))
            case "body":
                bodies[rest] = value
            case "pair":
                host, repository, digest = rest.split(" ")
                contents.pairs.add((host, repository, Digest.parse(digest)))
            case "pin":
                contents.pins.add(rest)
            case "day":
                contents.days[int(rest)] = Totals(**json.loads(value))
            case _:
                raise StoreError(f"unknown key {key!r:.80}")
    # One text for all: a big index is read in a third of the time.
    digests = Digest.parse_all(text for text, _ in blobs)
    contents.blobs.update(zip(digests, map(BlobRecord._make, _parse_all(value for _, value in blobs)), strict=True))
    known: dict[str, Digest] = dict(zip(digests, digests, strict=True))
    for (name, _), fact in zip(facts, _parse_all(value for _, value in facts), strict=True):
        contents.manifests[name] = ManifestRecord(
            bodies[fact["body"]],
            fact["content_type"],
            fact["confirmed"],
            {known.get(text) or Digest.parse(text): size for text, size in fact["sizes"].items()},
            tuple(fact["oldest"]) if fact["oldest"] is not None else None,
            fact["denied"],
            fact["pulled"],
        )
    return contents


def _parse_all(texts: Iterable[str]) -> Any:
    return json.loads(f"[{','.join(texts)}]")
