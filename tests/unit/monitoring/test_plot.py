"""plot: a place for each day, and an axis that ends at a round number."""

import pytest

from pullthrough.monitoring.plot import DAYS, HEIGHT, STEP, plot

NOON = 20_000 * 86400 + 43_200.0
"""Of 2024-10-04."""


def test_days() -> None:
    """The newest last, days without traffic stay empty, and what lies before the first is left out."""
    days = [
        {"day": "2024-10-04", "served": 40, "fetched": 10},
        {"day": "2024-10-02", "served": 0, "fetched": 20},
        {"day": "2024-09-01", "served": 900, "fetched": 0},
    ]
    drawn = plot(days, NOON)
    assert [bar.day for bar in drawn.bars][-3:] == ["2024-10-02", "2024-10-03", "2024-10-04"]
    assert [bar.is_empty for bar in drawn.bars] == [True] * (DAYS - 3) + [False, True, False]
    assert [bar.x for bar in drawn.bars] == [STEP * place for place in range(DAYS)]
    last, before = drawn.bars[-1], drawn.bars[-3]
    assert (drawn.top, last.saved_top, last.fetched_top) == (50, pytest.approx(20), pytest.approx(80))
    # What was fetched and not served (prefetch) fits in too.
    assert before.saved_top == before.fetched_top == pytest.approx(60)


@pytest.mark.parametrize(
    ("most", "top"), [(1, 1), (2, 2), (3, 5), (6, 10), (10, 10), (11, 20), (49_000, 50_000), (10**12, 10**12)]
)
def test_axis(most: int, top: int) -> None:
    """Up to the next of 1, 2, 5, 10, …"""
    drawn = plot([{"day": "2024-10-04", "served": most, "fetched": 0}], NOON)
    assert drawn.top == top
    assert 0 <= drawn.bars[-1].saved_top < HEIGHT


def test_nothing() -> None:
    """No traffic, no axis."""
    assert plot([], NOON).top == 0
    assert all(bar.is_empty for bar in plot([], NOON).bars)
