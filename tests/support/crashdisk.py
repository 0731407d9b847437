"""A simulated disk: a real folder, every change to it written down in order, and what a death leaves of them.

`Disk` stands in the way of every call that changes files under `ingest/`, the two `blobs/` and `quarantine/` of a
store. A
death is a cut of what it has written down, from which the files are made anew.

- `kill -9`: everything before the cut has happened; a write at the cut, in part.
- Power loss: of what no sync has covered each write is kept, lost, torn or garbage, each change of a size and each
  change of a name (creation, renaming, removal) is kept or lost, all by themselves: POSIX promises no order. A name
  is covered by a sync of the folder that it is in after the change.
- The index loses the youngest of its rows, any number, in both. SQLite's own safety is not simulated.

Times and numbers of blob files are always as the index has them, if it is that file: that is when `Store.held` trusts
most. Not simulated: a medium that lies about a sync, and threads. Knows no recording.
"""

import contextlib
import functools
import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diskcache
import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.records import BlobRecord
from pullthrough.runtime import platform
from pullthrough.store import index, layout, rows

FOLDERS = ("ingest", "public/blobs", "private/blobs", "quarantine")


@dataclass(frozen=True)
class Written:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sized:
    file: int
    size: int


@dataclass(frozen=True)
class Named:
    """`file` has the name `new` instead of `old`: created, renamed or removed."""

    file: int
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Synced:
    """All bytes of a file, or all names in a folder."""

    what: int | str


@dataclass(frozen=True)
class Row:
    """The index was told about the blob file of that time."""

    key: str
    value: Any
    file: int | None


Change = Written | Sized | Named | Synced | Row

Choose = Callable[[int, Change | None], int]
"""What a death leaves of a change, or of all rows: nothing (0) up to everything (the number given)."""


Names = dict[str, int]
Files = dict[int, bytes]


def result(changes: list[Change]) -> tuple[Names, Files]:
    """Which file each path names, and what is in each file."""
    names: Names = {}
    files: Files = {}
    for change in changes:
        match change:
            case Named(file, old, new):
                names.pop(old or "", None)
                if new is not None:
                    names[new] = file
            case Sized(file, size):
                files[file] = files.get(file, b"")[:size].ljust(size, b"\0")
            case Written(file, offset, data):
                before = files.get(file, b"").ljust(offset, b"\0")
                files[file] = before[:offset] + data + before[offset + len(data) :]
    return names, {file: files.get(file, b"") for file in names.values()}


def survivors(changes: list[Change], choose: Choose) -> list[Change]:
    """What of the changes has reached the medium."""
    synced: set[int | str] = set()
    kept: list[Change] = []
    for change in reversed(changes):
        match change:
            case Synced(what):
                synced.add(what)
            case Named(_, old, new) if (new or old or "").rpartition("/")[0] not in synced:
                if not choose(1, change):
                    continue
            case Sized(file) if file not in synced:
                if not choose(1, change):
                    continue
            case Written(file, offset, data) if file not in synced:
                fate = choose(3, change)
                if fate == 0:
                    continue
                if fate == 1:
                    start, stop = choose(len(data), change), choose(len(data), change)
                    change = Written(file, offset + start, data[start:stop])
                if fate == 2:
                    change = Written(file, offset, (b"\xff\n" * len(data))[: len(data)])
        kept.append(change)
    files = {change.file for change in kept if isinstance(change, Named)}
    return [*reversed(kept), *map(Synced, files), *map(Synced, FOLDERS)]


def cut(changes: Sequence[Change], at: int, choose: Choose, *, torn: int) -> list[Change]:
    """What the kernel and the index have after so many changes, and so many bytes of the next if that is a write."""
    done = list(changes[:at])
    if torn and at < len(changes) and isinstance(last := changes[at], Written):
        done.append(replace(last, data=last.data[:torn]))
    rows = [id(change) for change in done if isinstance(change, Row)]
    lost = rows[choose(len(rows), None) :]
    return [change for change in done if id(change) not in lost]


class Disk[P]:
    """The folders of a store in `folder`, as `changes` have left them, and what is done to them from here on."""

    def __init__(self, folder: Path, changes: list[Change], promise: P) -> None:
        self.changes: list[Change] = []
        self.promises: list[P] = []
        """What had been promised when each change began."""
        self.promise = promise
        self.during_sync: Callable[[], object] | None = None
        """Done once, in a sync that does not cover it."""
        self.rows = Rows(self._note_row)
        self._folder = folder
        self._before = changes
        self._numbers = itertools.count(
            1 + max((change.file for change in changes if isinstance(change, Named)), default=0)
        )
        self._by_inode: dict[int, int] = {}
        (folder / layout.MARKER).write_text(json.dumps({"format": layout.FORMAT}))
        (folder / "secret").write_bytes(bytes(32))
        (folder / "index").mkdir()
        (folder / "index" / index.DATABASE).touch()
        self.rows.put(rows.VERSION_KEY, rows.VERSION)
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, mode=0o755)
        (folder / "private").chmod(0o700)
        (folder / "secret").chmod(0o600)
        names, files = result(changes)
        for path, file in names.items():
            (folder / path).write_bytes(files[file])
            self._by_inode[(folder / path).stat().st_ino] = file
        for row in (change for change in changes if isinstance(change, Row)):
            record = BlobRecord._make(json.loads(row.value))
            for path in (path for path, file in names.items() if file == row.file and record.mtime_ns):
                status = (folder / path).stat()
                record = record._replace(inode=status.st_ino, mtime_ns=status.st_mtime_ns)
            self.rows.put(row.key, json.dumps(record))

    def install(self, patch: pytest.MonkeyPatch, boot_id: str) -> None:
        """Stand in the way of the calls."""
        patch.setattr(platform, "boot_id", lambda: boot_id)
        patch.setattr(platform, "sync_data", self._sync_data)
        patch.setattr(platform, "sync_folder", self._sync_folder)
        patch.setattr(platform, "open_descriptor", functools.partial(self._open, platform.open_descriptor))
        patch.setattr(platform, "write_at", functools.partial(self._write_at, platform.write_at))
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(os, "ftruncate", functools.partial(self._ftruncate, os.ftruncate))
        patch.setattr(os, "replace", functools.partial(self._replace, os.replace))
        patch.setattr(os, "unlink", functools.partial(self._unlink, os.unlink))
        patch.setattr(diskcache, "Cache", lambda *arguments, **options: self.rows)
        patch.setattr(index, "ThreadPoolExecutor", AtOnce)

    def assert_nothing_missed(self) -> None:
        """No file has changed past this simulation."""
        names, files = result(self._before + self.changes)
        found = {
            str(path.relative_to(self._folder)): path for name in FOLDERS for path in (self._folder / name).iterdir()
        }
        assert {path: file.read_bytes() for path, file in found.items()} == {path: files[names[path]] for path in names}

    def _note_row(self, key: str, value: str) -> None:
        names, _ = result(self._before + self.changes)
        name = Digest.parse(key.split()[1]).file_name
        self._note(Row(key, value, names.get(f"public/blobs/{name}", names.get(f"private/blobs/{name}"))))

    def _note(self, change: Change) -> None:
        self.promises.append(self.promise)
        self.changes.append(change)

    def _name(self, path: Any) -> str | None:
        """The path within the store if it is in one of the folders."""
        name = os.fspath(path).removeprefix(f"{self._folder}/")
        return name if name.rpartition("/")[0] in FOLDERS else None

    def _file(self, place: int | Path) -> int | None:
        status = os.fstat(place) if isinstance(place, int) else place.stat()
        return self._by_inode.get(status.st_ino)

    def _open(self, system: Callable[[Path, int], int], path: Path, flags: int) -> int:
        is_new = not path.exists()
        descriptor = system(path, flags)
        if is_new and self._name(path) is not None:
            file = self._by_inode[os.fstat(descriptor).st_ino] = next(self._numbers)
            self._note(Named(file, None, self._name(path)))
        return descriptor

    def _write_at(self, system: Callable[..., None], descriptor: int, offset: int, data: bytes | memoryview) -> None:
        if (file := self._file(descriptor)) is not None:
            self._note(Written(file, offset, bytes(data)))
        system(descriptor, offset, data)

    def _ftruncate(self, system: Callable[[int, int], None], descriptor: int, size: int) -> None:
        if (file := self._file(descriptor)) is not None:
            self._note(Sized(file, size))
        system(descriptor, size)

    def _replace(self, system: Callable[[Any, Any], None], source: Any, target: Any) -> None:
        if (old := self._name(source)) is not None and (file := self._file(Path(source))) is not None:
            self._note(Named(file, old, self._name(target)))
        system(source, target)

    def _unlink(self, system: Callable[..., None], path: Any, **options: Any) -> None:
        if (name := self._name(path)) is not None and (file := os.path.lexists(path) and self._file(Path(path))):
            self._note(Named(file, name, None))
        system(path, **options)

    def _sync_folder(self, path: Path) -> None:
        if (name := str(path.relative_to(self._folder))) in FOLDERS:
            self._note(Synced(name))

    def _sync_data(self, descriptor: int) -> None:
        if (file := self._file(descriptor)) is None:
            return
        self._note(Synced(file))
        work, self.during_sync = self.during_sync, None
        if work is not None:
            work()


class Rows:
    """In place of diskcache's Cache: its table, of which nothing is on the disk."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        self._note = note
        connection = sqlite3.connect(":memory:")
        connection.execute("CREATE TABLE Cache (key BLOB UNIQUE, raw INTEGER, mode INTEGER, value BLOB)")
        self._sql = connection.execute
        self.transact = contextlib.nullcontext
        self.close = connection.close

    def put(self, key: str, value: str) -> None:
        """Not noted."""
        self._sql("INSERT OR REPLACE INTO Cache VALUES (?, 1, ?, ?)", (key, diskcache.core.MODE_RAW, value))

    def set(self, key: str, value: str) -> None:
        self._note(key, value)
        self.put(key, value)


class AtOnce:
    """In place of the index's thread."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.shutdown = lambda wait: None

    def submit(self, work: Callable[..., object], *arguments: Any) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(work(*arguments))
        return done
