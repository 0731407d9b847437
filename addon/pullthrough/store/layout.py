"""The folder of a store: its marker, its lock, its secret, its pins.

Invariant: a folder that holds anything else is never taken for a store, no two processes use a store at once, nothing
in it is a link to elsewhere, and only its owner and group may write to it.
"""

import contextlib
import errno
import json
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

from pullthrough.core.errors import StoreError
from pullthrough.runtime import file_system, platform
from pullthrough.store.blob_files import PRIVATE, PUBLIC
from pullthrough.store.ollama_dir import BLOBS, MANIFESTS, NAMED_DOCUMENTS
from pullthrough.store.proofs import VERIFIED

FORMAT: Final = 2
"""Format 1 had all blobs in `blobs/`, and manifests and pins only in the index."""
OLDEST_FORMAT: Final = 1
"""The oldest format that `migration` can convert."""
MARKER: Final = "ollama-cache.json"
PINS: Final = "pins"
_LOCK: Final = "lock"
_SECRET: Final = "secret"  # noqa: S105 -- a file's name
_FOLDERS: Final = (
    "index",
    "ingest",
    "quarantine",
    PUBLIC,
    f"{PUBLIC}/{BLOBS}",
    f"{PUBLIC}/{MANIFESTS}",
    f"{PUBLIC}/{NAMED_DOCUMENTS}",
    PRIVATE,
    f"{PRIVATE}/{BLOBS}",
)


def prepare(folder: Path) -> int:
    """Make a store of an absent or empty folder, or check that an existing one is usable; returns its format.

    Raises StoreError, OSError.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"store {folder}: expected a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    marker = folder / MARKER
    if marker.exists():
        found = read_marker(folder)
    else:
        # A fresh file system has lost+found; a crash while the marker was written leaves its temporary.
        names = [path.name for path in folder.iterdir()]
        if names := sorted(name for name in names if name != "lost+found" and not name.startswith(f".{MARKER}")):
            raise StoreError(
                f"store {folder}: expected an ollama-cache store or an empty folder, "
                f"got a folder with {names[0]!r} in it"
            )
        write_marker(folder)
        found = FORMAT
    check_safe(folder)
    try:
        make_folders(folder)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
    return found


def make_folders(folder: Path) -> None:
    """Make the store's folders that are missing. Raises OSError if the disk refuses."""
    for name in _FOLDERS:
        if not (path := folder / name).is_dir():
            path.mkdir(exist_ok=True, mode=0o700 if name == PRIVATE else 0o755)


def restore(folder: Path) -> None:
    """Make the store's folders again if someone has removed them.

    Raises OSError if the disk refuses, is gone, or is read-only.
    """
    if not (folder / MARKER).exists():
        # Another disk, or none, is mounted there now: make nothing on it.
        raise FileNotFoundError(errno.ENOENT, f"no store any more, {MARKER} has gone", str(folder))
    make_folders(folder)
    if not os.access(folder, os.W_OK):
        raise OSError(errno.EROFS, "not writable", str(folder))


def check_safe(folder: Path) -> None:
    """Check that only owner and group can write to the store, only the owner reads its secret, and no link leads away.

    Raises StoreError. Not on Windows, whose access rights are inherited from the user's folder.
    """
    if sys.platform == "win32":
        return
    _check_mode(folder, folder.stat(), 0o002, "chmod o-w")
    for name in (*_FOLDERS, MARKER, _LOCK, _SECRET, PINS, VERIFIED):
        path = folder / name
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise StoreError(
                    f"{path} is a link to {path.readlink()}, which the store does not follow: "
                    "remove it, and move the whole store or mount the other disk there instead"
                )
            if (name in _FOLDERS) != stat.S_ISDIR(status.st_mode):
                raise StoreError(f"{path}: expected a {'folder' if name in _FOLDERS else 'file'}, got another kind")
            if name in (_SECRET, VERIFIED):
                _check_mode(path, status, 0o077, "chmod 600")
            elif name == PRIVATE:
                _check_mode(path, status, 0o077, "chmod 700")
            else:
                _check_mode(path, status, 0o002, "chmod o-w")


def _check_mode(path: Path, status: os.stat_result, forbidden: int, mend: str) -> None:
    if sys.platform == "win32":  # has no owners or modes of this kind
        return
    if status.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise StoreError(
            f"{path} belongs to user {status.st_uid}: run this as that user, or give the store a new owner"
        )
    # In a sticky folder, users cannot rename or remove each other's files.
    is_open = status.st_mode & forbidden and not (forbidden == 0o002 and status.st_mode & stat.S_ISVTX)
    if is_open and not file_system.lacks_modes(path):
        raise StoreError(
            f"{path}: other users of this machine may {'write to' if forbidden == 0o002 else 'use'} it "
            f"(mode {stat.S_IMODE(status.st_mode):04o}): {mend} {shlex.quote(str(path))}"
        )


def read_marker(folder: Path) -> int:
    """Return the format of the store in `folder`. Raises StoreError if it is not a store or its format is unknown."""
    try:
        text = (folder / MARKER).read_text()
    except OSError as error:
        raise StoreError(f"expected an ollama-cache store in {folder}, got none; see --dir") from error
    try:
        found = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError):
        found = text[:40]
    if found not in range(OLDEST_FORMAT, FORMAT + 1):
        raise StoreError(
            f"store {folder}: expected format {OLDEST_FORMAT} to {FORMAT} in {MARKER}, got {found!r}: "
            "a newer version of ollama-cache made it"
        )
    return int(found)


def check_marker(folder: Path) -> None:
    """Check that `folder` is a store of the current format. Raises StoreError if it is not."""
    if read_marker(folder) != FORMAT:
        raise StoreError(f"store {folder} is of an earlier format: start the cache once, which converts it")


def write_marker(folder: Path) -> None:
    """Mark the folder as a store of the current format."""
    _write_new(folder / MARKER, json.dumps({"format": FORMAT}).encode() + b"\n", mode=0o644)


def take_lock(folder: Path, *, writable: bool = True) -> contextlib.ExitStack:
    """Take the lock that only one daemon can have; closing it releases it. Raises StoreError if another process has it.

    The lock file names the holder. The folder is locked as well, because someone may remove the file. Systems that
    cannot lock folders lock only the file; a store that cannot be written to locks only the folder.
    """
    with contextlib.ExitStack() as undo:
        lock = None
        if writable:
            file = platform.open_descriptor(folder / _LOCK, os.O_RDWR | os.O_CREAT | platform.NO_LINK)
            lock = undo.enter_context(os.fdopen(file, "r+b"))
        guard = platform.open_folder(folder)
        if guard is not None:
            undo.callback(os.close, guard)
        is_taken = lock is not None and not platform.lock_exclusively(lock)
        if is_taken or (guard is not None and not platform.lock_folder(guard)):
            holder = ""
            with contextlib.suppress(OSError):
                holder = (folder / _LOCK).read_bytes()[:64].decode("ascii", "replace").strip()
            raise StoreError(
                f"store {folder}: expected a free store, got one in use by process {holder or 'unknown'}; "
                "stop that one first, or name another store in ollama_cache_dir"
            )
        if lock is not None:
            lock.truncate(0)
            lock.seek(0)
            lock.write(f"{os.getpid()}\n".encode())
            lock.flush()
        return undo.pop_all()


def load_secret(folder: Path, *, writable: bool = True) -> bytes:
    """Return the key that signs capabilities, making one if there is none.

    Without `writable`, a new key lasts only as long as this process.
    """
    path = folder / _SECRET
    if not path.exists():
        if not writable:
            return secrets.token_bytes(32)
        _write_new(path, secrets.token_bytes(32), mode=0o600)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise StoreError(f"expected 32 bytes in {path}, got {len(secret)}; delete the file to make a new secret")
    return secret


def load_pins(folder: Path) -> set[str]:
    """Return the patterns of pinned models, one on each line. Raises StoreError if the file cannot be read."""
    try:
        text = (folder / PINS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"expected a pattern on each line of {folder / PINS}, got: {error}") from error
    return {line.strip() for line in text.splitlines()} - {""}


def save_pins(folder: Path, pins: Collection[str]) -> None:
    """Replace the stored pins. Raises OSError if the disk refuses."""
    _write_new(folder / PINS, "".join(f"{pattern}\n" for pattern in sorted(pins)).encode(), mode=0o644)


def folds_case(folder: Path) -> bool:
    """Return whether the disk treats names that differ only in case as the same."""
    return (folder / MARKER.upper()).exists()


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Write a small file atomically: after a crash it is whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        platform.write_at(descriptor, 0, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    platform.sync_folder(path.parent)
