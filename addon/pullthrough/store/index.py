"""The index: the facts about blobs and manifests, in diskcache; `rows` defines its rows.

Invariant: its reader keeps all of it in memory, so a look-up needs no SQL. One thread does the writing, because SQLite
may block. Whatever arrives during a write goes into the next transaction, and a large write is followed by a rest; a
write that failed is repeated with the next one. `cull_limit=0`, because diskcache's own culling drops ten rows of any
size.
"""

import contextlib
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import diskcache

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError
from pullthrough.core.humanize import count_text
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.store import rows
from pullthrough.store.rows import Contents, Members
from pullthrough.store.usage import Totals

_log = logging.getLogger(__name__)

DATABASE: Final = "cache.db"
"""The name of diskcache's SQLite file."""
LOCKED_S: Final = 3.0
"""The longest wait for another process to unlock the database."""

RATE: Final = 2_000_000
"""After a write the writer rests as long as this many bytes a second would take, up to REST_LIMIT_S: the members of a
repository are one row, which each new blob of a model of thousands writes anew."""
REST_LIMIT_S: Final = 1.0

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
    """The index in `folder`. The constructor and `load` raise StoreError if it is not sound."""

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
                timeout=LOCKED_S,
            )
        except sqlite3.DatabaseError as error:
            raise self._unsound(error) from error
        self._lock = threading.Lock()
        self._pending: dict[str, Callable[[], str | bytes] | None] = {}
        """Rows not yet written."""
        self._is_asked = False
        """Whether a write of the pending rows is scheduled."""
        self._rest_until = 0.0
        self._hurry = threading.Event()
        """Set while someone waits for the writer: it does not rest."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ollama-cache-index")

    @classmethod
    def open(cls, folder: Path) -> tuple["Index", Contents, Members]:
        """Open the index and return it with its contents. A damaged one, or one of another version, is made anew.

        Raises StoreError if another process has it locked.
        """
        check_free(folder)
        if (folder / DATABASE).exists():
            try:
                return cls(folder)._loaded()
            except Exception as error:  # a damaged database can make diskcache raise anything
                _log.warning("the index in %s is made anew from the files of the store: %s", folder, error)
                shutil.rmtree(folder)
        index = cls(folder)
        index._put(rows.VERSION_KEY, lambda: rows.VERSION)
        index.flush()
        return index._loaded()

    def _loaded(self) -> tuple["Index", Contents, Members]:
        try:
            return self, self.load(), self.load_members()
        except BaseException:
            self.close()
            raise

    def load(self) -> Contents:
        """Check the index, and read all but the members. Raises StoreError if it is not sound."""
        # The private `_sql`: diskcache's public interface reads row by row, a minute for a store of 10,000 models.
        checked = self._writer.submit(lambda: rows.check(self.cache._sql))
        try:
            found = rows.read(self.cache._sql)
            checked.result()
            return found
        except rows.UNSOUND as error:
            raise self._unsound(error) from error

    def load_members(self) -> Members:
        """Read the members. Raises StoreError if the index is not sound."""
        try:
            return rows.read_members(self.cache._sql)
        except rows.UNSOUND as error:
            raise self._unsound(error) from error

    def put_blob(self, digest: Digest, record: BlobRecord) -> None:
        self._put(rows.blob_key(digest), partial(rows.blob_value, record))

    def put_manifest(self, name: Name, record: ManifestRecord) -> None:
        self._put(rows.body_key(record.digest), lambda: record.body)
        self._put(rows.manifest_key(name), partial(rows.manifest_value, record))

    def put_child(self, digest: Digest, record: ManifestRecord) -> None:
        self._put(rows.body_key(record.digest), lambda: record.body)
        self._put(rows.child_key(digest), partial(rows.manifest_value, record))

    def delete_child(self, digest: Digest) -> None:
        """Delete the child's facts; its bytes stay."""
        self._put(rows.child_key(digest), None)

    def delete_manifest(self, name: Name) -> None:
        """Delete the manifest's facts; its bytes stay."""
        self._put(rows.manifest_key(name), None)

    def delete_body(self, digest: str) -> None:
        """Delete the bytes that no manifest or child has any more."""
        self._put(rows.body_key(digest), None)

    def put_day(self, day: int, totals: Totals) -> None:
        self._put(rows.day_key(day), partial(rows.day_value, replace(totals)))

    def put_address(self, key: str, digest: Digest, until: float) -> None:
        self._put(rows.address_key(key), partial(rows.address_value, digest, until))

    def delete_address(self, key: str) -> None:
        self._put(rows.address_key(key), None)

    def put_members(self, host: str, repository: str, digests: Collection[str]) -> None:
        """Write the members; another thread reads `digests` when it writes the row."""
        self._put(rows.members_key(host, repository), lambda: " ".join(list(digests)))

    def delete_members(self, host: str, repository: str) -> None:
        self._put(rows.members_key(host, repository), None)

    def flush(self) -> None:
        """Wait until every write so far is in the database."""
        self._hurry.set()
        self._writer.submit(self._hurry.clear).result()

    def close(self) -> None:
        """Write the pending rows, and close."""
        self._hurry.set()
        self._writer.submit(self._write)
        # diskcache keeps a connection per thread, so each thread closes its own.
        self._writer.submit(self.cache.close)
        self._writer.shutdown(wait=True)
        self.cache.close()

    def _put(self, key: str, value: Callable[[], str | bytes] | None) -> None:
        """Set the row's value, None for no row. The writer's thread calls `value`, and only the latest one."""
        with self._lock:
            self._pending[key] = value
            was_asked, self._is_asked = self._is_asked, True
        if not was_asked:
            self._writer.submit(self._write)

    def _write(self) -> None:
        """Write the rows that are pending, all or none."""
        self._hurry.wait(max(0.0, self._rest_until - time.monotonic()))
        with self._lock:
            pending, self._pending = self._pending, {}
            self._is_asked = False
        if not pending:
            return
        written = 0
        try:
            with self.cache.transact():
                for key, value in pending.items():
                    if value is None:
                        self.cache.delete(key)
                    else:
                        row = value()
                        written += len(row)
                        self.cache.set(key, row)
        except (sqlite3.Error, OSError, diskcache.Timeout):
            # What is in memory stays right; what is never written is lost at the next start, and learnt again.
            _log.exception(
                "index write of %s failed, the first is %s", count_text(len(pending), "row"), next(iter(pending))
            )
            with self._lock:
                self._pending = pending | self._pending
        except Exception:
            # A bug of ours: the same rows would fail again, and all others with them.
            _log.exception("index rows given up: %s", ", ".join(pending))
        self._rest_until = time.monotonic() + min(REST_LIMIT_S, written / RATE)

    def _unsound(self, error: Exception) -> StoreError:
        return StoreError(f"store {self._folder.parent}: expected a sound index in {self._folder}, got: {error}")


def check_free(folder: Path) -> None:
    """Check that the database is not locked. Raises StoreError if another process still has it after LOCKED_S seconds.

    diskcache would wait a minute, and then say only that the database is locked.
    """
    if not (folder / DATABASE).exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(folder / DATABASE, timeout=LOCKED_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreError(
                f"the index in {folder} is locked by another process for {LOCKED_S:.0f} s: end that process"
            ) from error
    except sqlite3.DatabaseError:
        return  # the damage is found when it is read
