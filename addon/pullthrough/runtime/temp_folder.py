"""A temporary folder for as long as this process lives, also when it is killed.

Whoever is killed leaves its folder, which may hold keys; the next to come removes it. A lock tells whether the owner
lives: process numbers do not, as another container that shares /tmp has its own.

Invariant: no folder is removed whose owner lives, and nothing that is not such a folder of this user's.
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
    """A folder for this user alone, removed by `cleanup`, at the end of the process, or by the next one."""

    def __init__(self) -> None:
        _remove_abandoned()
        super().__init__(prefix=_PREFIX)
        unlocked = Path(self.name, f"{_LOCK}.new")
        self._lock = unlocked.open("wb")
        lock_exclusively(self._lock)
        # Only now does it show: a folder without its lock's file is left alone.
        unlocked.rename(Path(self.name, _LOCK))

    def cleanup(self) -> None:
        self._lock.close()
        super().cleanup()


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed. Not on Windows, where an open file cannot be renamed."""
    if sys.platform == "win32":
        return
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is going, or another user's
            if path.is_symlink() or path.lstat().st_uid != os.geteuid():
                continue
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb+") as lock:
                if lock_exclusively(lock):
                    shutil.rmtree(path, ignore_errors=True)
