"""A set of byte offsets, kept as half-open intervals.

Invariant: the intervals are sorted, disjoint, non-adjacent and non-empty.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Intervals:
    """Half-open byte intervals; adding and removing cost O(intervals touched + log n)."""

    __slots__ = ("_starts", "_stops", "size")

    size: int
    """How many bytes the set holds."""

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.size = 0
        for start, stop in intervals:
            self.add(start, stop)

    # "Empty", "complete" and "nothing new" are three different questions: none of them is a truth value.
    def __bool__(self) -> bool:
        raise TypeError("ask .size, .covers() or .missing(), not the truth of an interval set")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    @property
    def count(self) -> int:
        """How many intervals there are."""
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Intervals):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Intervals({list(self)})"

    def copy(self) -> "Intervals":
        """Return an independent set with the same offsets."""
        other = Intervals()
        other._starts, other._stops, other.size = self._starts.copy(), self._stops.copy(), self.size
        return other

    def add(self, start: int, stop: int) -> None:
        """Add `[start, stop)`, merged with the intervals that it overlaps or touches."""
        if start >= stop:
            return
        low = bisect_left(self._stops, start)
        high = bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self.size += (stop - start) - self._measure(low, high)
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]

    def remove(self, start: int, stop: int) -> None:
        """Remove `[start, stop)`; offsets that are not in the set are ignored."""
        if start >= stop:
            return
        low = bisect_right(self._stops, start)
        high = bisect_left(self._starts, stop)
        if low >= high:
            return
        starts: list[int] = []
        stops: list[int] = []
        if self._starts[low] < start:
            starts.append(self._starts[low])
            stops.append(start)
        if self._stops[high - 1] > stop:
            starts.append(stop)
            stops.append(self._stops[high - 1])
        kept = sum(b - a for a, b in zip(starts, stops, strict=True))
        self.size -= self._measure(low, high) - kept
        self._starts[low:high] = starts
        self._stops[low:high] = stops

    def covers(self, start: int, stop: int) -> bool:
        """Return whether every offset of `[start, stop)` is in the set."""
        return start >= stop or self.stop_at(start) >= stop

    def stop_at(self, offset: int) -> int:
        """Return where the interval that holds `offset` stops; `offset` itself when no interval holds it."""
        index = bisect_right(self._starts, offset) - 1
        return max(offset, self._stops[index]) if index >= 0 else offset

    def start_before(self, offset: int) -> int:
        """Return where the gap in front of `offset` begins: the last stop at or before it, 0 when there is none.

        Meaningful where `offset` itself is not in the set.
        """
        index = bisect_right(self._stops, offset) - 1
        return self._stops[index] if index >= 0 else 0

    def missing(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the gaps within `[start, stop)`, lowest first. The set must not change while iterating."""
        index = bisect_right(self._stops, start)
        while start < stop:
            gap_stop = min(stop, self._starts[index]) if index < len(self._starts) else stop
            if start < gap_stop:
                yield start, gap_stop
            if index >= len(self._starts):
                return
            start = self._stops[index]
            index += 1

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the parts of the set that lie in `[start, stop)`."""
        low = bisect_right(self._stops, start)
        high = bisect_left(self._starts, stop)
        pairs = zip(self._starts[low:high], self._stops[low:high], strict=True)
        return [(max(start, a), min(stop, b)) for a, b in pairs]

    def _measure(self, low: int, high: int) -> int:
        return sum(self._stops[low:high]) - sum(self._starts[low:high])
