"""rate_limit: nobody gets more than the rate, all get the same, and those who are waited for come first."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.recording.rate_limit import BURST_S, LEAST_PER_CONNECTION, STAND_BACK_S, RateLimit


def simulate(rate_limit: RateLimit, spenders: list[tuple[int, bool]], seconds: float) -> list[int]:
    """Spenders that take a batch whenever they may, each of its own size and live or not; what each got."""
    got = [0] * len(spenders)
    turns = [(0.0, number) for number in range(len(spenders))]
    while turns[0][0] <= seconds:
        now, number = heapq.heappop(turns)
        size, live = spenders[number]
        got[number] += size
        wait = rate_limit.spend(size, live=live, now=now)
        heapq.heappush(turns, (now + max(wait, 1e-4), number))
    return got


@given(
    rate=st.integers(100_000, 10_000_000),
    spenders=st.lists(st.tuples(st.integers(1_000, 300_000), st.booleans()), min_size=1, max_size=8),
)
def test_never_more_than_the_rate(rate: int, spenders: list[tuple[int, bool]]) -> None:
    """Over ten seconds at most ten seconds' worth, a burst, and what was under way."""
    got = simulate(RateLimit(rate), spenders, 10.0)
    under_way = sum(size for size, _ in spenders)
    assert sum(got) <= rate * (10 + BURST_S) + under_way


@given(rate=st.integers(1_000_000, 10_000_000), count=st.integers(2, 8))
def test_equal_spenders_get_equal_shares(rate: int, count: int) -> None:
    """Within a batch or two."""
    got = simulate(RateLimit(rate), [(50_000, True)] * count, 10.0)
    assert max(got) - min(got) <= 100_000
    assert sum(got) >= rate * 9


def test_the_background_stands_back() -> None:
    """While a live reader is served the background gets a batch each second; without one it gets all."""
    rate = 1_000_000
    live, background = simulate(RateLimit(rate), [(50_000, True), (50_000, False)], 10.0)
    assert background <= 11 * 50_000
    assert live >= rate * 9
    assert sum(simulate(RateLimit(rate), [(50_000, False)], 10.0)) >= rate * 9


def test_no_limit() -> None:
    """Without a rate nobody waits for bytes, and all connections are used."""
    rate_limit = RateLimit(None)
    assert rate_limit.spend(10**12, live=True, now=1.0) == 0
    assert rate_limit.connections(16) == 16


@pytest.mark.parametrize(("rate", "connections"), [(1, 1), (LEAST_PER_CONNECTION * 5, 5), (10**9, 16)])
def test_slow_lines_get_few_connections(rate: int, connections: int) -> None:
    """Each of them moves."""
    assert RateLimit(rate).connections(16) == connections


def test_stand_back_ends() -> None:
    """A second after the last live byte the background goes on."""
    rate_limit = RateLimit(1e9)
    rate_limit.spend(1, live=True, now=5.0)
    assert rate_limit.spend(1, live=False, now=5.5) == pytest.approx(STAND_BACK_S - 0.5)
    assert rate_limit.spend(1, live=False, now=6.5) == 0
