"""The places of a file's windows while it is written, on a disk that fills every gap with zeros.

On such a disk, a write far beyond the end of a file takes as long as writing all that it skips. So windows are placed
one after another in the order of their first write, and put into their proper order when all have come. A file that
grows from its beginning is always in order.

Invariant: a window never changes its place. Touches no file.
"""

from collections.abc import Iterable, Iterator
from typing import Final

WINDOW: Final = 8 << 20
"""The most bytes that a write skips; AHEAD times as many if that keeps a file in order."""
AHEAD: Final = 8
"""How many windows may be skipped, and left room, to keep a file in order that grows in several places."""

IN_ORDER: Final = (AHEAD + 1) * WINDOW
"""A file of at most this length is always in order."""


class WindowMap:
    """The map of one file."""

    def __init__(self, order: Iterable[int] = (), *, window: int = WINDOW) -> None:
        """`order` lists the windows that have a place, in the order of their places."""
        self._window = window
        self.order: list[int] = list(order)
        self._places = {number: place for place, number in enumerate(self.order)}
        self.in_order = self.order == list(range(len(self.order)))
        """Whether each window that has a place lies at its own offset."""

    def make_places(self, start: int, stop: int) -> list[int]:
        """Give the windows of `[start, stop)` places; returns those that are new. For one thread at a time."""
        first, last = start // self._window, -(-stop // self._window)
        count = len(self.order)
        if self.in_order and count < first <= count + AHEAD:
            first = count
        for number in range(first, last):
            if number not in self._places:
                self.in_order = self.in_order and number == len(self.order)
                self._places[number] = len(self.order)
                self.order.append(number)
        return self.order[count:]

    def locate(self, start: int, stop: int) -> tuple[int, int]:
        """Return the place of byte `start` in the file, and the end (at most `stop`) of the contiguous bytes there."""
        number = start // self._window
        place = self._places[number]
        end = number + 1
        while end * self._window < stop and self._places.get(end) == place + end - number:
            end += 1
        return place * self._window + start % self._window, min(stop, end * self._window)

    def beyond(self, length: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield the intervals of a file of `size` bytes that have no place, or one beyond its first `length` bytes."""
        for number in range(-(-size // self._window)):
            place = self._places.get(number)
            there = 0 if place is None else min(self._window, max(0, length - place * self._window))
            start, stop = number * self._window + there, min(size, (number + 1) * self._window)
            if start < stop:
                yield start, stop
