"""A descriptor that several readers share.

Invariant: it stays open as long as one of them uses it, even if the file is renamed or removed. Knows nothing of the
file's contents.
"""

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from pullthrough.runtime import platform
from pullthrough.runtime.window_map import WindowMap

_PIECE: Final = 4 << 20


def at_once(work: Callable[[], object]) -> None:
    """Do `work` in the calling thread."""
    work()


class SharedFile:
    """A descriptor with a count of its readers, closed when the last one releases it."""

    __slots__ = ("_change", "_lock", "_on_close", "_users", "descriptor", "size", "windows")

    def __init__(
        self,
        descriptor: int,
        size: int,
        on_close: Callable[[], object] = lambda: None,
        *,
        windows: WindowMap | None = None,
        change: Callable[[Callable[[], object]], None] = at_once,
    ) -> None:
        """`windows` maps offsets to places in a file that is not in order; `change` runs what may wait for the disk."""
        self._change = change
        self.descriptor = descriptor
        self.size = size
        self.windows = windows
        self._lock = threading.Lock()
        self._users = 0
        self._on_close = on_close

    def acquire(self) -> "SharedFile":
        with self._lock:
            self._users += 1
        return self

    def locate(self, start: int, stop: int) -> tuple[int, int]:
        """Return the place of byte `start` in the file, and the end (at most `stop`) of the contiguous bytes there."""
        return (start, stop) if self.windows is None else self.windows.locate(start, stop)

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes from `start` up to `stop`, or fewer; may block on the disk."""
        place, end = self.locate(start, stop)
        return platform.read_at(self.descriptor, place, end - start)

    def read_into(self, buffer: memoryview, start: int) -> int:
        """Read into `buffer` from `start`; returns the byte count, 0 at the end. May block on the disk."""
        place, end = self.locate(start, start + len(buffer))
        return platform.read_into(self.descriptor, buffer[: end - start], place)

    def copy(self, target: int, start: int, stop: int) -> None:
        """Copy the bytes of `[start, stop)` to the same offsets of another open file. Raises OSError."""
        while start < stop:
            if not (data := self.read(start, min(start + _PIECE, stop))):
                raise OSError(errno.EIO, f"its file ends at byte {start}")
            platform.write_at(target, start, data)
            start += len(data)

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            is_last = self._users == 0
        if is_last:
            self._on_close()
            self._change(partial(os.close, self.descriptor))
