"""trials: one request at a time finds out whether a client reaches the blob server."""

import itertools
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.trials import SETTLED_S, WAIT_S, Trials

HOUR: Final = SETTLED_S
SENT, KEPT = "sent", "kept"
ARRIVES: Final = "arrives"

# (seconds, what happens at that time); a request that asks is either sent on or kept.
STORIES: Final = {
    "one on trial, the others are kept meanwhile": [(0, SENT), (0, KEPT), (1, KEPT)],
    "it arrives, and all are sent": [(0, SENT), (1, ARRIVES), (1, SENT), (1, SENT), (1.5, ARRIVES), (9, SENT)],
    "it does not, and all are kept for an hour": [(0, SENT), (2, KEPT), (HOUR + 1.9, KEPT), (HOUR + 2, SENT)],
    "nobody looks until the hour is over": [(0, SENT), (HOUR + 3, SENT), (HOUR + 3, KEPT)],
    "too late is not at all": [(0, SENT), (2, ARRIVES), (2, KEPT), (HOUR, KEPT)],
    "nobody was sent": [(0, ARRIVES), (0, SENT), (0, KEPT)],
    "an hour after the last arrival it is tried again": [
        *[(0, SENT), (1, ARRIVES), (5, SENT), (6, ARRIVES)],
        *[(HOUR + 5, SENT), (HOUR + 5, ARRIVES), (2 * HOUR + 5, SENT), (2 * HOUR + 5, KEPT)],
    ],
    "one that is lost on the way makes a new trial": [
        *[(0, SENT), (1, ARRIVES), (10, SENT), (11, SENT), (12, SENT), (12, KEPT)],
        *[(12, ARRIVES), (13, SENT), (13, SENT)],
    ],
    "and the trial decides": [(0, SENT), (1, ARRIVES), (10, SENT), (12, SENT), (14, KEPT), (HOUR + 14, SENT)],
    "of several only the first since the last arrival counts": [
        *[(0, SENT), (0, ARRIVES), (10, SENT), (11, SENT), (11.9, ARRIVES), (13, SENT), (14.9, SENT), (15, SENT)],
        *[(15, KEPT)],
    ],
}


@pytest.mark.parametrize("story", STORIES.values(), ids=list(STORIES))
def test_story(story: list[tuple[float, str]]) -> None:
    """Each step's answer."""
    trials = Trials()
    for number, (now, event) in enumerate(story):
        if event == ARRIVES:
            trials.arrived("a", now=now)
        else:
            assert trials.permits("a", now=now) is (event == SENT), f"step {number}"


def test_verdicts_are_told_once() -> None:
    """One line each for the log, not one for each part."""
    told: list[tuple[str, bool]] = []
    trials = Trials(lambda client, reaches: told.append((client, reaches)))
    for now in (0, 1, 1, 5):
        trials.permits("a", now=now)
        trials.arrived("a", now=now)
    for now in (0, 3, 4):
        trials.permits("b", now=now)
    assert told == [("a", True), ("b", False)]


def test_clients_do_not_mix_and_are_forgotten() -> None:
    """Each has its own trial; of too many, the one not seen for longest begins anew."""
    trials = Trials(limit=2)
    assert trials.permits("a", now=0)
    assert trials.permits("b", now=0)
    trials.arrived("a", now=1)
    assert not trials.permits("b", now=1)
    assert trials.permits("c", now=1)
    assert not trials.permits("b", now=1)
    assert trials.permits("a", now=1)
    assert not trials.permits("a", now=1)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, WAIT_S)), max_size=60))
def test_a_port_that_is_closed_costs_one_request_an_hour(steps: list[tuple[bool, float]]) -> None:
    """Whatever comes when: without an arrival no two requests are sent within an hour."""
    trials, now, sent = Trials(), 0.0, []
    for long_pause, pause in steps:
        now += pause + (HOUR / 3 if long_pause else 0)
        if trials.permits("a", now=now):
            sent.append(now)
    assert all(later - earlier >= HOUR for earlier, later in itertools.pairwise(sent))


@given(st.lists(st.floats(0, WAIT_S - 0.01), max_size=60))
def test_a_port_that_is_open_costs_no_verdict(pauses: list[float]) -> None:
    """A client whose requests all arrive in time is never kept again."""
    trials, now = Trials(), 0.0
    for pause in pauses:
        assert trials.permits("a", now=now)
        now += pause
        trials.arrived("a", now=now)
