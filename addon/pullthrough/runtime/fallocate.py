"""Room on the disk for a part of a file, before it is written: fallocate(2) itself.

Invariant: the bytes that a file has, and its size, stay as they are, but for those that `give_back` is asked to drop.
"""

import ctypes
import sys

_KEEP_SIZE = 0x01  # linux/falloc.h
_PUNCH_HOLE = 0x02


def reserve(descriptor: int, start: int, stop: int) -> bool:
    """Give the file its room on the disk for `[start, stop)`, in as few pieces as there are; False where it cannot be.

    Linux, on file systems that know fallocate(2); posix_fallocate(3) writes to every block on those that do not.
    """
    return _fallocate(descriptor, _KEEP_SIZE, start, stop)


def give_back(descriptor: int, start: int, stop: int) -> bool:
    """Take the file's room on the disk for `[start, stop)` from it, and the bytes there; False where it cannot be."""
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
