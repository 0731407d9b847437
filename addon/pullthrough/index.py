"""The index: what is known of blobs and manifests, in diskcache; `contents` has its rows.

Invariant: all of it is resident in its reader, so reading costs no SQL. Writes are left to one thread, because SQLite
may wait; what comes while it writes is one transaction, and what could not be written is tried again with what comes
next. `cull_limit=0`, because diskcache's own culling drops ten rows of any size. Knows no files of blobs.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import diskcache

from pullthrough import contents
from pullthrough.contents import Contents, Members
from pullthrough.digest import Digest
from pullthrough.errors import StoreError
from pullthrough.records import BlobRecord, ManifestRecord, Name
from pullthrough.traffic import Totals

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
        self._lock = threading.Lock()
        self._pending: dict[str, Callable[[], str | bytes] | None] = {}
        """What is not written yet."""
        self._is_asked = False
        """Whether the writer will look at it."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ollama-cache-index")

    def load(self) -> Contents:
        """Check it, and read all but the members."""
        try:
            contents.rename_aliases(self.cache._sql)
        except contents.UNSOUND as error:
            raise self._unsound(error) from error
        checked = self._writer.submit(lambda: contents.check(self.cache._sql))
        try:
            found = contents.read(self.cache._sql)
            checked.result()
            return found
        except contents.UNSOUND as error:
            raise self._unsound(error) from error

    def load_members(self) -> Members:
        """StoreError."""
        try:
            return contents.read_members(self.cache._sql)
        except contents.UNSOUND as error:
            raise self._unsound(error) from error

    def put_blob(self, digest: Digest, record: BlobRecord) -> None:
        self._put(contents.blob_key(digest), partial(contents.blob_value, record))

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        self._put(contents.body_key(record.digest), lambda: record.body)
        self._put(contents.manifest_key(name), partial(contents.manifest_value, record))

    def put_child(self, digest: Digest, record: ManifestRecord) -> None:
        self._put(contents.body_key(record.digest), lambda: record.body)
        self._put(contents.child_key(digest), partial(contents.manifest_value, record))

    def delete_child(self, digest: Digest) -> None:
        """Its bytes stay."""
        self._put(contents.child_key(digest), None)

    def delete_manifest(self, name: Name) -> None:
        """Its bytes stay."""
        self._put(contents.manifest_key(name), None)

    def delete_body(self, digest: str) -> None:
        """Those bytes, which no manifest has any more."""
        self._put(contents.body_key(digest), None)

    def put_pin(self, pattern: str) -> None:
        self._put(contents.pin_key(pattern), str)

    def delete_pin(self, pattern: str) -> None:
        self._put(contents.pin_key(pattern), None)

    def put_day(self, day: int, totals: Totals) -> None:
        self._put(contents.day_key(day), partial(contents.day_value, replace(totals)))

    def put_address(self, key: str, digest: Digest, until: float) -> None:
        self._put(contents.address_key(key), partial(contents.address_value, digest, until))

    def delete_address(self, key: str) -> None:
        self._put(contents.address_key(key), None)

    def put_members(self, host: str, repository: str, digests: str) -> None:
        self._put(contents.members_key(host, repository), lambda: digests)

    def delete_members(self, host: str, repository: str) -> None:
        self._put(contents.members_key(host, repository), None)

    def flush(self) -> None:
        """Wait until every write so far is in the database."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is left, and close."""
        self._writer.submit(self._write)
        # diskcache keeps a connection per thread: each is closed where it was opened.
        self._writer.submit(self.cache.close)
        self._writer.shutdown(wait=True)
        self.cache.close()

    def _put(self, key: str, value: Callable[[], str | bytes] | None) -> None:
        """The row's value from now on, None for no row. It is made in the writer's thread, and only the last one."""
        with self._lock:
            self._pending[key] = value
            was_asked, self._is_asked = self._is_asked, True
        if not was_asked:
            self._writer.submit(self._write)

    def _write(self) -> None:
        """Write what has come since the last time, all of it or nothing."""
        with self._lock:
            pending, self._pending = self._pending, {}
            self._is_asked = False
        if not pending:
            return
        try:
            with self.cache.transact(retry=True):
                for key, value in pending.items():
                    if value is None:
                        self.cache.delete(key, retry=True)
                    else:
                        self.cache.set(key, value(), retry=True)
        except (sqlite3.Error, OSError, diskcache.Timeout):
            # What is resident stays right; what is never written is forgotten at the next start, and learnt again.
            _log.exception("index write of %d rows failed, the first is %s", len(pending), next(iter(pending)))
            with self._lock:
                self._pending = pending | self._pending
        except Exception:
            # A fault of ours: the same rows would fail again, and all others with them.
            _log.exception("index rows given up: %s", ", ".join(pending))

    def _unsound(self, error: Exception) -> StoreError:
        return StoreError(
            f"store {self._folder.parent}: expected a sound index in {self._folder}, got: {error}; "
            f"move that folder away and start again: blobs are kept and re-verified, manifests fetched anew"
        )
