"""The folder of a store: its marker, its lock, its secret.

Invariant: a folder with anything else in it is never taken for a store, and two processes never have one at once.
Knows neither blobs nor manifests.
"""

import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import BinaryIO, Final

from pullthrough import platform
from pullthrough.errors import StoreError

FORMAT: Final = 1
MARKER: Final = "ollama-cache.json"
_FOLDERS: Final = ("index", "blobs", "ingest", "quarantine")


def prepare(folder: Path) -> None:
    """Make a store of an absent or empty folder, and see that an old one can be used. StoreError, OSError."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"store {folder}: expected a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    if marker.exists():
        check_marker(folder)
    else:
        # A fresh file system has lost+found; a crash while the marker was written leaves its temporary.
        names = [path.name for path in folder.iterdir()]
        if names := sorted(name for name in names if name != "lost+found" and not name.startswith(f".{MARKER}")):
            raise StoreError(
                f"store {folder}: expected an ollama-cache store or an empty folder, "
                f"got a folder with {names[0]!r} in it"
            )
        _write_new(marker, json.dumps({"format": FORMAT}).encode() + b"\n", mode=0o644)
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"x")


def check_marker(folder: Path) -> None:
    """See that `folder` is a store, of the format that we know. StoreError."""
    try:
        text = (folder / MARKER).read_text()
    except OSError as error:
        raise StoreError(f"expected an ollama-cache store in {folder}, got none; see --dir") from error
    try:
        found = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError):
        found = text[:40]
    if found != FORMAT:
        raise StoreError(f"store {folder}: expected format {FORMAT} in {MARKER}, got {found!r}")


def take_lock(folder: Path) -> BinaryIO:
    """The lock of the one daemon, until it is closed. StoreError if another process has it."""
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


def load_secret(folder: Path) -> bytes:
    """What signs capabilities; made where there is none."""
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
