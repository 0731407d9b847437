"""The files of blobs: below `public/` those that everybody may have, below `private/` all others; and the other files
that take room: recordings and quarantine.

Invariant: a blob moves from one root to the other by a rename, so it is always in exactly one of them. Only regular
files are blobs.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest
from pullthrough.runtime import file_system, platform
from pullthrough.store.ingest import INGEST, PARTIAL, QUARANTINE
from pullthrough.store.ollama_dir import BLOBS, parse_blob_path

PUBLIC: Final = "public"
PRIVATE: Final = "private"
ROOTS: Final = (PUBLIC, PRIVATE)


class BlobFile(NamedTuple):
    """The current state of a blob's file."""

    digest: Digest
    public: bool
    """Whether it lies below `public/`."""
    size: int
    mtime_ns: int
    inode: int
    """0 on a disk whose inode numbers do not last."""


class BlobFiles:
    """The blob files of one store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._public = f"{folder}/{PUBLIC}/{BLOBS}/"
        self._private = f"{folder}/{PRIVATE}/{BLOBS}/"
        self._keeps_inodes = file_system.keeps_inodes(folder)

    def path(self, digest: Digest, *, public: bool) -> Path:
        """Return the blob's path in that root, whether or not it is there."""
        return self._folder / (PUBLIC if public else PRIVATE) / BLOBS / digest.file_name

    def look(self, digest: Digest, *, public: bool) -> BlobFile | None:
        """Return the blob's file, trying the given root first. Raises OSError if the disk fails."""
        for root in (public, not public):
            try:
                # Not `path`: building a Path takes five times as long, and this runs for each request.
                status = os.lstat((self._public if root else self._private) + digest.file_name)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            if stat.S_ISREG(status.st_mode):
                return BlobFile(digest, root, status.st_size, status.st_mtime_ns, self._inode(status))
        return None

    def move(self, digest: Digest, *, public: bool) -> None:
        """Move the blob to that root if it is in the other one. Raises OSError if the disk refuses."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path(digest, public=not public), self.path(digest, public=public))

    def remove(self, digest: Digest) -> None:
        """Remove the blob's file. Raises OSError if the disk refuses."""
        for public in (True, False):
            self.path(digest, public=public).unlink(missing_ok=True)

    def walk(self) -> Iterator[BlobFile]:
        """Yield each file with its state at the moment it is reached. Raises OSError if the disk refuses."""
        for root in (self._public, self._private):
            with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
                for entry in entries:
                    digest = parse_blob_path(f"{BLOBS}/{entry.name}")
                    if digest is None:
                        continue
                    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            inode = self._inode(status)
                            yield BlobFile(digest, root == self._public, status.st_size, status.st_mtime_ns, inode)

    def _inode(self, status: os.stat_result) -> int:
        return status.st_ino if self._keeps_inodes else 0


def partials(store: Path) -> dict[Digest, tuple[int, float]]:
    """Return each partial's disk usage (bytes) and last change (Unix seconds), of running and abandoned recordings."""
    found = {}
    for name, taken in _taken(store / INGEST, PARTIAL):
        with contextlib.suppress(InvalidRequest):
            found[Digest.parse(name.removesuffix(PARTIAL))] = taken
    return found


def quarantined(store: Path) -> dict[Path, tuple[int, float]]:
    """Return the same for quarantined files, whose bytes did not hash to their name."""
    return {store / QUARANTINE / name: taken for name, taken in _taken(store / QUARANTINE, "")}


def _taken(folder: Path, suffix: str) -> Iterator[tuple[str, tuple[int, float]]]:
    """Yield the name of each blob's file in the folder that ends so, with its disk usage and last change.

    What cannot be looked at is left out: who needs the folder to write finds out why.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("sha256-") and entry.name.endswith(suffix):
                with contextlib.suppress(OSError):
                    # Not the entry's own `stat`: on Windows that is of when the file was opened.
                    status = os.lstat(entry.path)
                    yield entry.name, (platform.allocated(status), status.st_mtime)
