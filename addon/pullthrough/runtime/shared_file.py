"""A descriptor that several readers share.

Invariant: it is open for as long as one of them has it, whatever happens to the file's name. Knows nothing of the file.
"""

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Final

from pullthrough.runtime import platform
from pullthrough.runtime.window_map import WindowMap

_PIECE: Final = 4 << 20


def at_once(work: Callable[[], object]) -> None:
    """Do it."""
    work()


class SharedFile:
    """A counted descriptor: it stays open for whoever reads it, whatever happens to the file's name."""

    __slots__ = ("_change", "_on_close", "_users", "descriptor", "size", "windows")

    def __init__(
        self,
        descriptor: int,
        size: int,
        on_close: Callable[[], object] = lambda: None,
        *,
        windows: WindowMap | None = None,
        change: Callable[[Callable[[], object]], None] = at_once,
    ) -> None:
        """`windows` tells where what is where, if the file is not in order; `change` does what may wait for a disk."""
        self._change = change
        self.descriptor = descriptor
        self.size = size
        self.windows = windows
        self._users = 0
        self._on_close = on_close

    def acquire(self) -> "SharedFile":
        self._users += 1
        return self

    def locate(self, start: int, stop: int) -> tuple[int, int]:
        """Return where the byte `start` lies, and up to where, at most `stop`, the file goes on behind it."""
        return (start, stop) if self.windows is None else self.windows.locate(start, stop)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` up to `stop`, or fewer of them; may block on the disk."""
        place, end = self.locate(start, stop)
        return platform.read_at(self.descriptor, place, end - start)

    def read_into(self, buffer: memoryview, start: int) -> int:
        """Read into `buffer` from `start`, and say how much; 0 at the end. May block on the disk."""
        place, end = self.locate(start, start + len(buffer))
        return platform.read_into(self.descriptor, buffer[: end - start], place)

    def copy(self, target: int, start: int, stop: int) -> None:
        """Put the bytes of `[start, stop)` where they belong in another open file. Raises OSError."""
        while start < stop:
            if not (data := self.read(start, min(start + _PIECE, stop))):
                raise OSError(errno.EIO, f"its file ends at byte {start}")
            platform.write_at(target, start, data)
            start += len(data)

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._on_close()
            self._change(partial(os.close, self.descriptor))
