"""A temporary folder for as long as this process lives, removed even if the process is killed.

A killed process leaves its folder, which may hold keys; the next process removes it. A lock tells whether the owner is
alive: process numbers cannot, because another container that shares /tmp has its own.

Invariant: only such folders of this user are removed, and none whose owner is alive.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from pullthrough.runtime.platform import lock_exclusively

_PREFIX: Final = "ollama-cache-"
_LOCK: Final = "lock"


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A folder that only this user can open, removed by `cleanup`, when the process ends, or by the next process."""

    def __init__(self) -> None:
        _remove_abandoned()
        super().__init__(prefix=_PREFIX)
        unlocked = Path(self.name, f"{_LOCK}.new")
        self._lock = unlocked.open("wb")
        lock_exclusively(self._lock)
        # Rename after locking: `_remove_abandoned` leaves a folder without a lock file alone. Windows renames no open
        # file, and abandoned folders are not looked for there.
        if sys.platform != "win32":
            unlocked.rename(Path(self.name, _LOCK))

    def cleanup(self) -> None:
        self._lock.close()
        super().cleanup()


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed. Not on Windows, where they have no lock file."""
    if sys.platform == "win32":
        return
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # being removed, or another user's
            if path.is_symlink() or path.lstat().st_uid != os.geteuid():
                continue
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb+") as lock:
                if lock_exclusively(lock):
                    shutil.rmtree(path, ignore_errors=True)
