"""Assemble a blob from byte intervals that arrive in any order.

Invariant: present, claimed and missing partition `[0, size)`; the frontier is the end of the present prefix, and the
hash never passes it. Touches no file, socket or hash: it only keeps track of which bytes are where.
"""

from pullthrough.core.intervals import Intervals
from pullthrough.runtime.clock import Epoch


class Assembly:
    """The bytes of a blob of `size` bytes: which are here, which are being fetched, and which are hashed."""

    __slots__ = ("_taken", "hashed", "present", "shown", "size", "versions")

    def __init__(self, size: int, present: Intervals | None = None) -> None:
        if size < 0:
            raise ValueError(f"expected a size of 0 or more, got {size}")
        self.size = size
        self.present = present.copy() if present is not None else Intervals()
        if self.present.size and not Intervals([(0, size)]).covers(*_bounds(self.present)):
            raise ValueError(f"expected intervals within 0-{size}, got {self.present!r}")
        self._taken = self.present.copy()
        self.hashed = 0
        """The length of the prefix that has been hashed."""
        self.shown = size
        """Readers get only the bytes before this offset: the rest waits for the verification."""
        self.versions = Epoch()
        """Advances when the blob is begun again: what was hashed before no longer counts."""

    def begin_again(self) -> None:
        """Forget every byte and every claim: the source serves another version."""
        self.versions.advance()
        self.present = Intervals()
        self._taken = Intervals()
        self.hashed = 0

    @property
    def complete(self) -> bool:
        return self.present.size == self.size

    @property
    def frontier(self) -> int:
        """The end of the contiguous prefix that is present."""
        return self.present.stop_at(0)

    @property
    def unclaimed(self) -> int:
        """How many bytes are neither present nor being fetched."""
        return self.size - self._taken.size

    def claim(self, start: int, stop: int) -> None:
        """Reserve `[start, stop)`, which must be free, for one fetch."""
        if not 0 <= start < stop <= self.size or next(self._taken.missing(start, stop), None) != (start, stop):
            raise ValueError(f"expected a free interval within 0-{self.size}, got {start}-{stop}")
        self._taken.add(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Give up a claim; the bytes of it that are present stay."""
        for gap in list(self.present.missing(start, stop)):
            self._taken.remove(*gap)

    def add(self, start: int, stop: int) -> None:
        """Note that `[start, stop)` has been written."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"expected an interval within 0-{self.size}, got {start}-{stop}")
        self.present.add(start, stop)
        self._taken.add(start, stop)

    def next_free(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the lowest gap within `[start, stop)` that is neither present nor claimed."""
        return next(self._taken.missing(start, stop), None)

    def free_from(self, offset: int) -> int:
        """Return where the free gap that holds `offset` begins (`offset` must be free)."""
        return self._taken.start_before(offset)

    def first_missing(self, start: int) -> int:
        """Return the lowest offset at or after `start` that is not present; `size` if there is none."""
        return min(self.size, self.present.stop_at(start))


def _bounds(intervals: Intervals) -> tuple[int, int]:
    every = list(intervals)
    return every[0][0], every[-1][1]
