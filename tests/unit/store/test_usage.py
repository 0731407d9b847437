"""usage: what was saved never falls, and is what was served beyond the first time."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from pullthrough.store.usage import DAY_S, Totals, Usage, settled

COUNTS = st.integers(0, 1000)
STEPS = st.lists(st.tuples(COUNTS, COUNTS, st.integers(0, 2 * DAY_S), st.booleans()), max_size=30)
"""Bytes served and fetched since the last step, seconds, and whether the daemon is restarted then."""


def saved(days: dict[int, Totals]) -> int:
    return sum(totals.saved or 0 for totals in settled(days).values())


@given(STEPS, st.dictionaries(st.integers(0, 5), st.builds(Totals, COUNTS, COUNTS), max_size=4))
def test_saved_bytes_never_fall(steps: list[tuple[int, int, int, bool]], former: dict[int, Totals]) -> None:
    """Whatever is fetched ahead or by many, over days and restarts, and after days of an earlier version."""
    written, now, balance = dict(former), 6.0 * DAY_S, 0
    before = saved(written)
    usage, served, fetched = Usage(written), 0, 0
    started = sum(totals.served - totals.fetched for totals in written.values())
    most = max([before, *accumulate(t.served - t.fetched for _, t in sorted(former.items()))])
    for went, came, seconds, restarts in steps:
        now += seconds
        if restarts:
            usage, served, fetched = Usage(written), 0, 0
        served, fetched, balance = served + went, fetched + came, balance + went - came
        usage.count_up_to(served=served, fetched=fetched, now=now)
        written |= usage.take()
        assert saved(written) >= before
        before = saved(written)
        most = max(most, started + balance)
    # All that went out, but for one time of what came in, at its best.
    assert before == most
    assert before <= sum(totals.served for totals in written.values())


def test_what_is_saved() -> None:
    """The first client of a blob saves nothing, whenever it comes; each further one saves all of it."""
    usage = Usage()
    for served, fetched, expected in ((0, 100, 0), (100, 100, 0), (200, 100, 100), (200, 150, 100), (350, 150, 200)):
        usage.count_up_to(served=served, fetched=fetched, now=1.0)
        assert saved(usage.days) == expected
