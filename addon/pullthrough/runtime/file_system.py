"""What a file system can do: told by its type where that is known, and by trying it elsewhere.

Invariant: looking leaves nothing behind, and takes a fraction of a second also where every byte is slow. Says what is
so, and nothing of what follows from it. Knows no store.
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
"""File systems that are not tried: they can do all that is asked of one."""
_SHARED: Final = frozenset(
    [
        *("nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "webdav", "9p", "virtiofs", "drvfs"),
        *("vboxsf", "vmhgfs", "prl_fs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "gfs2", "ocfs2"),
    ]
)
"""File systems that other machines may have mounted too, or that are another machine's."""
_LOCAL_FUSE: Final = frozenset(["fuse.exfat", "fuse.fusefat", "fuse.ntfs", "fuse.ntfs-3g", "fuse.fuse-overlayfs"])
"""Drivers outside the kernel for disks of this machine, besides what says so by itself (`fuseblk`)."""
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
"""File systems that show the same owner and mode for all files, as their mount says."""
_LARGEST_OF_FAT: Final = (4 << 30) - 1
_TRIAL: Final = ".trial-"
_LENGTH: Final = 8 << 20
"""Of the file that is tried: a disk that fills it with zeros takes a second where it is slow."""
_FULL: Final = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the file system under one folder."""

    kind: str
    """Its type, as the system calls it; "" where that is not known."""
    shared: bool = False
    """Other machines may write to it: locks may not reach them."""
    problem: str = ""
    """Why nothing can be written, "" if that is not so."""
    full: bool = False
    """The problem is lack of room."""
    holes: bool = True
    """What was never written takes no room, and no time."""
    renames: bool = True
    """A rename replaces a file; an open file stays what it is, and a renamed one can be written to."""
    databases: bool = True
    """SQLite works there."""
    locks: bool = True
    """A locked file is refused to whoever else opens it here."""
    largest: int | None = None
    """How long a file may be (bytes), None where that is no matter."""


def kind_of(path: Path) -> str:
    """Return the type of the file system that holds the existing path, as the system calls it; "" where that is not
    known.
    """
    found = ("", "")
    place = str(path.resolve())
    with contextlib.suppress(OSError):
        for entry in psutil.disk_partitions(all=True):
            inside = place == entry.mountpoint or place.startswith(f"{entry.mountpoint.rstrip('/')}/")
            if inside and len(entry.mountpoint) >= len(found[0]):  # a later mount hides an earlier one
                found = (entry.mountpoint, entry.fstype)
    return found[1].lower()


def is_shared(kind: str) -> bool:
    """Return whether a file system of that type may be written to from elsewhere."""
    is_fuse = kind in ("fuse", "macfuse", "osxfuse") or kind.startswith("fuse.")
    return kind in _SHARED or (is_fuse and kind not in _LOCAL_FUSE)


def lacks_modes(path: Path) -> bool:
    """Return whether owner and mode of files mean nothing on the disk that holds the path."""
    return kind_of(path) in _WITHOUT_MODES


def keeps_inodes(path: Path) -> bool:
    """Return whether a file has the same inode for as long as it is there; FUSE, FAT and some shares number files
    anew.
    """
    kind = kind_of(path)
    return not kind.startswith("fuse") and kind not in _WITHOUT_MODES


def examine(folder: Path) -> Facts:
    """Tell what the disk under the existing folder can do. Raises OSError if it cannot be asked at all."""
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
    """Remove what a process that was killed while it looked has left."""
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
    """Return whether a rename takes a file's place, also of one that is open, and what is renamed can be written to."""
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
    """Return whether a second opening of a locked file is refused its lock."""
    with path.open("wb") as first, path.open("r+b") as second:
        return platform.lock_exclusively(first) and not platform.lock_exclusively(second)
