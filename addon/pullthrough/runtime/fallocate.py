"""Disk space reserved for part of a file before it is written, by fallocate(2) itself.

Invariant: a file's size never changes, and of its bytes only those that `give_back` drops.
"""

import ctypes
import sys

_KEEP_SIZE = 0x01  # linux/falloc.h
_PUNCH_HOLE = 0x02


def reserve(descriptor: int, start: int, stop: int) -> bool:
    """Reserve disk space for `[start, stop)` of the file, in as few pieces as possible; False if that fails.

    Only on Linux, on file systems that support fallocate(2): on others posix_fallocate(3) would write to every block.
    """
    return _fallocate(descriptor, _KEEP_SIZE, start, stop)


def give_back(descriptor: int, start: int, stop: int) -> bool:
    """Free the disk space of `[start, stop)`, dropping the bytes there; False if that fails."""
    return _fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, stop)


def _fallocate(descriptor: int, mode: int, start: int, stop: int) -> bool:
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    call = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return bool(call(descriptor, mode, start, stop - start) == 0)
