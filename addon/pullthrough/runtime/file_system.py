"""What a file system can do: known by its type, or else found out by trying.

Invariant: an examination leaves nothing behind, and takes about a second even on a slow disk. It states facts and
draws no conclusions from them. Knows nothing of the store.
"""

import contextlib
import errno
import os
import shutil
import sqlite3
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from pullthrough.runtime import platform

_ABLE: Final = frozenset(
    [
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "zfs",
        "f2fs",
        "bcachefs",
        "jfs",
        "tmpfs",
        "overlay",
        "apfs",
        "ntfs",
        "refs",
    ]
)
"""File systems that need no trial: they can do everything."""
_SHARED: Final = frozenset(
    [
        *("nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "webdav", "9p", "virtiofs", "drvfs"),
        *("vboxsf", "vmhgfs", "prl_fs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "gfs2", "ocfs2"),
    ]
)
"""File systems that belong to another machine, or that other machines may have mounted too."""
_LOCAL_FUSE: Final = frozenset(["fuse.exfat", "fuse.fusefat", "fuse.ntfs", "fuse.ntfs-3g", "fuse.fuse-overlayfs"])
"""FUSE drivers for local disks, besides `fuseblk`, whose name says so."""
_FAT: Final = frozenset(["vfat", "msdos", "msdosfs", "fat", "fat32", "fuse.fusefat"])
_WITHOUT_MODES: Final = _FAT | {
    "exfat",
    "fuse.exfat",
    "ntfs",
    "ntfs3",
    "fuseblk",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "drvfs",
}
"""File systems that show all files with the owner and mode of their mount."""
_LARGEST_OF_FAT: Final = (4 << 30) - 1
_TRIAL: Final = ".trial-"
_LENGTH: Final = 8 << 20
"""Length of the trial file: a slow disk that fills it with zeros takes a second."""
_FULL: Final = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The properties of the file system under one folder."""

    kind: str
    """Its type, as the system calls it; "" if unknown."""
    shared: bool = False
    """Whether other machines may write to it, so that locks may not reach all of them."""
    problem: str = ""
    """Why nothing can be written; "" if it can."""
    full: bool = False
    """Whether the problem is lack of space."""
    holes: bool = True
    """Whether gaps that were never written take neither space nor time."""
    renames: bool = True
    """Whether a rename replaces a file, leaves an open one readable, and the renamed one can be written to."""
    databases: bool = True
    """Whether SQLite works on it."""
    locks: bool = True
    """Whether a locked file refuses a second lock on this machine."""
    largest: int | None = None
    """The longest possible file (bytes); None if there is no limit that matters."""


def kind_of(path: Path) -> str:
    """Return the type of the file system that holds the existing path, as the system calls it; "" if unknown."""
    found = ("", "")
    place = str(path.resolve())
    with contextlib.suppress(OSError):
        for entry in psutil.disk_partitions(all=True):
            inside = place == entry.mountpoint or place.startswith(f"{entry.mountpoint.rstrip('/')}/")
            if inside and len(entry.mountpoint) >= len(found[0]):  # a later mount hides an earlier one
                found = (entry.mountpoint, entry.fstype)
    return found[1].lower()


def is_shared(kind: str) -> bool:
    """Return whether other machines may write to a file system of that type."""
    is_fuse = kind in ("fuse", "macfuse", "osxfuse") or kind.startswith("fuse.")
    return kind in _SHARED or (is_fuse and kind not in _LOCAL_FUSE)


def lacks_modes(path: Path) -> bool:
    """Return whether the owners and modes of files mean nothing on the disk that holds the path."""
    return kind_of(path) in _WITHOUT_MODES


def keeps_inodes(path: Path) -> bool:
    """Return whether a file keeps its inode number for life; FUSE, FAT and some shares may renumber files."""
    kind = kind_of(path)
    return not kind.startswith("fuse") and kind not in _WITHOUT_MODES


def examine(folder: Path) -> Facts:
    """Find out what the disk under the existing folder can do. Raises OSError if it cannot even be tried."""
    kind = kind_of(folder)
    largest = _LARGEST_OF_FAT if kind in _FAT else None
    known = Facts(kind=kind, shared=is_shared(kind), largest=largest)
    trial = None
    try:
        trial = Path(tempfile.mkdtemp(prefix=_TRIAL, dir=folder))
        (trial / "probe").write_bytes(bytes(64 << 10))
        if kind in _ABLE or sys.platform == "win32":
            return known
        return replace(
            known,
            holes=_has_holes(trial / "long"),
            renames=_renames(trial),
            databases=_holds_databases(trial / "database"),
            locks=_locks(trial / "locked"),
        )
    except OSError as error:
        if error.errno not in (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return replace(known, problem=error.strerror or str(error), full=error.errno in _FULL)
    finally:
        if trial is not None:
            shutil.rmtree(trial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a process left that was killed during its trial."""
    for path in folder.glob(f"{_TRIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _has_holes(path: Path) -> bool:
    descriptor = platform.open_descriptor(path, os.O_RDWR | os.O_CREAT)
    try:
        platform.write_at(descriptor, _LENGTH - 1, b"x")
        os.fsync(descriptor)
        return platform.allocated(os.fstat(descriptor)) < _LENGTH // 2
    finally:
        os.close(descriptor)


def _renames(trial: Path) -> bool:
    """Return whether a rename replaces a file, works on an open file, and leaves it writable."""
    for name in ("old", "new"):
        (trial / name).write_bytes(name.encode())
    try:
        with (trial / "new").open("rb") as file:
            os.replace(trial / "new", trial / "old")
            if not file.read() == b"new" == (trial / "old").read_bytes():
                return False
        descriptor = platform.open_descriptor(trial / "old", os.O_WRONLY)
        try:
            platform.write_at(descriptor, 3, b"er")
        finally:
            os.close(descriptor)
        return (trial / "old").read_bytes() == b"newer"
    except OSError:
        return False


def _holds_databases(path: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA journal_mode = wal")
            connection.execute("CREATE TABLE trial (x)")
    except sqlite3.Error:
        return False
    return True


def _locks(path: Path) -> bool:
    """Return whether a second handle on a locked file is refused the lock."""
    with path.open("wb") as first, path.open("r+b") as second:
        return platform.lock_exclusively(first) and not platform.lock_exclusively(second)
