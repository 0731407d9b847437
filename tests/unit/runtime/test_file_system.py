"""file_system: what a disk can do, told by its type or found by trying it."""

import errno
import os
import sqlite3
import sys
from pathlib import Path

import pytest

from pullthrough.runtime import file_system, platform
from pullthrough.runtime.file_system import Facts, examine, is_shared, keeps_inodes


@pytest.mark.parametrize(
    ("kind", "shared", "inodes"),
    [
        ("ext4", False, True),
        ("xfs", False, True),
        ("tmpfs", False, True),
        ("", False, True),
        ("nfs4", True, True),
        ("cifs", True, False),
        ("9p", True, False),
        ("fuse", True, False),
        ("fuse.sshfs", True, False),
        ("fuseblk", False, False),
        ("fuse.fusefat", False, False),
        ("vfat", False, False),
        ("exfat", False, False),
    ],
)
def test_types(kind: str, shared: bool, inodes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are written to from elsewhere, and which number their files anew."""
    monkeypatch.setattr(file_system, "kind_of", lambda path: kind)
    assert (is_shared(kind), keeps_inodes(tmp_path)) == (shared, inodes)


def test_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying finds what is known of its type, and leaves nothing."""
    if (kind := file_system.kind_of(tmp_path)) not in ("ext4", "xfs", "btrfs", "tmpfs", "overlay"):
        pytest.skip(f"tests run on {kind or 'an unknown disk'}, of which it is not known what can be expected")
    known = examine(tmp_path)
    monkeypatch.setattr(file_system, "kind_of", lambda path: "strange")
    assert (known, examine(tmp_path)) == (Facts(kind=kind), Facts(kind="strange"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is tried there")
def test_a_poor_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills gaps, renames nothing that is there, and lets everybody lock."""

    def replace(old: Path, new: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def connect(path: Path) -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(file_system, "kind_of", lambda path: "vfat")
    monkeypatch.setattr(platform, "allocated", lambda status: status.st_size)
    monkeypatch.setattr(platform, "lock_exclusively", lambda file: True)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(file_system.sqlite3, "connect", connect)
    expected = Facts(kind="vfat", holes=False, renames=False, databases=False, locks=False, largest=(4 << 30) - 1)
    assert examine(tmp_path) == expected


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EROFS, False), (errno.EACCES, False)])
def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, full: bool) -> None:
    """The reason is told; what else it can do is not tried."""

    def write(path: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_system, "kind_of", lambda path: "ext4")
    monkeypatch.setattr(Path, "write_bytes", write)
    assert examine(tmp_path) == Facts(kind="ext4", problem=os.strerror(number), full=full)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no fact about it."""

    def write(path: Path, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match="Input/output"):
        examine(tmp_path)


def test_what_a_killed_process_left(tmp_path: Path) -> None:
    """It is removed, and nothing else."""
    (tmp_path / ".trial-x").mkdir()
    (tmp_path / ".trial-x" / "long").touch()
    (tmp_path / "trial").touch()
    file_system.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]
