"""intervals: against a set of offsets."""

from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pullthrough.core.intervals import Intervals

OFFSET = st.integers(0, 24)


@pytest.mark.parametrize(
    ("before", "added", "after"),
    [
        pytest.param([], (2, 4), [(2, 4)], id="first"),
        pytest.param([(2, 4)], (6, 8), [(2, 4), (6, 8)], id="apart"),
        pytest.param([(2, 4)], (4, 6), [(2, 6)], id="touches behind"),
        pytest.param([(2, 4)], (0, 2), [(0, 4)], id="touches before"),
        pytest.param([(2, 4), (6, 8)], (4, 6), [(2, 8)], id="closes the gap"),
        pytest.param([(2, 4), (6, 8)], (3, 7), [(2, 8)], id="bridges"),
        pytest.param([(2, 4), (6, 8)], (0, 9), [(0, 9)], id="covers all"),
        pytest.param([(2, 8)], (3, 5), [(2, 8)], id="covered"),
        pytest.param([(2, 4)], (3, 3), [(2, 4)], id="empty"),
    ],
)
def test_add(before: list[tuple[int, int]], added: tuple[int, int], after: list[tuple[int, int]]) -> None:
    """Adding merges what overlaps or touches."""
    intervals = Intervals(before)
    intervals.add(*added)
    assert list(intervals) == after


def test_has_no_truth() -> None:
    """Empty, complete and nothing new are different questions."""
    with pytest.raises(TypeError):
        bool(Intervals())


class AgainstASet(RuleBasedStateMachine):
    """Every answer is what a plain set of offsets gives."""

    def __init__(self) -> None:
        super().__init__()
        self.intervals = Intervals()
        self.model: set[int] = set()

    @rule(start=OFFSET, stop=OFFSET)
    def add(self, start: int, stop: int) -> None:
        self.intervals.add(start, stop)
        self.model |= set(range(start, stop))

    @rule(start=OFFSET, stop=OFFSET)
    def remove(self, start: int, stop: int) -> None:
        self.intervals.remove(start, stop)
        self.model -= set(range(start, stop))

    @rule(start=OFFSET, stop=OFFSET)
    def missing(self, start: int, stop: int) -> None:
        gaps = list(self.intervals.missing(start, stop))
        assert all(a < b for a, b in gaps)
        assert {offset for gap in gaps for offset in range(*gap)} == set(range(start, stop)) - self.model

    @rule(start=OFFSET, stop=OFFSET)
    def within(self, start: int, stop: int) -> None:
        parts = self.intervals.within(start, stop) if start < stop else []
        assert {offset for part in parts for offset in range(*part)} == set(range(start, stop)) & self.model

    @rule(start=OFFSET, stop=OFFSET)
    def covers(self, start: int, stop: int) -> None:
        assert self.intervals.covers(start, stop) == (set(range(start, stop)) <= self.model)

    @rule(offset=OFFSET)
    def bounds(self, offset: int) -> None:
        stop = offset
        while stop in self.model:
            stop += 1
        assert self.intervals.stop_at(offset) == stop
        if offset not in self.model:
            start = offset
            while start > 0 and start - 1 not in self.model:
                start -= 1
            assert self.intervals.start_before(offset) == start

    @rule()
    def copy_is_independent(self) -> None:
        other = self.intervals.copy()
        assert other == self.intervals
        other.add(100, 101)
        assert other != self.intervals

    @invariant()
    def sorted_disjoint_apart(self) -> None:
        pairs = list(self.intervals)
        assert all(start < stop for start, stop in pairs)
        assert all(left[1] < right[0] for left, right in pairwise(pairs))
        assert {offset for pair in pairs for offset in range(*pair)} == self.model
        assert self.intervals.size == len(self.model)


TestAgainstASet = AgainstASet.TestCase
