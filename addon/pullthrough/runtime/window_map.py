"""Where the windows of a file lie while it is written, on a disk that fills every gap with zeros.

There a write far behind the end of a file takes as long as all that it skips. So windows of the file are put one behind
the other as they are first written to, and into their order when all have come. A file that grows from its beginning is
in order at any time.

Invariant: a window stays where it is. Touches no file.
"""

from collections.abc import Iterable, Iterator
from typing import Final

WINDOW: Final = 8 << 20
"""No write skips more than this, and AHEAD times as much where that keeps a file in order."""
AHEAD: Final = 8
"""So many windows that are still to come are left room, to keep a file in order that grows in many places."""

IN_ORDER: Final = (AHEAD + 1) * WINDOW
"""A file that is no longer is always in order."""


class WindowMap:
    """Of one file."""

    def __init__(self, order: Iterable[int] = (), *, window: int = WINDOW) -> None:
        """`order` are the windows that have a place, in the order of these."""
        self._window = window
        self.order: list[int] = list(order)
        self._places = {number: place for place, number in enumerate(self.order)}
        self.in_order = self.order == list(range(len(self.order)))
        """Whether what has a place lies where it belongs."""

    def make_places(self, start: int, stop: int) -> list[int]:
        """Give the windows of `[start, stop)` their places; returns those that got one. For one thread at a time."""
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
        """Return where the byte `start` lies, and up to where, at most `stop`, the file goes on behind it."""
        number = start // self._window
        place = self._places[number]
        end = number + 1
        while end * self._window < stop and self._places.get(end) == place + end - number:
            end += 1
        return place * self._window + start % self._window, min(stop, end * self._window)

    def beyond(self, length: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield the intervals of a file of `size` bytes that have no place, or one behind `length` bytes."""
        for number in range(-(-size // self._window)):
            place = self._places.get(number)
            there = 0 if place is None else min(self._window, max(0, length - place * self._window))
            start, stop = number * self._window + there, min(size, (number + 1) * self._window)
            if start < stop:
                yield start, stop
