"""states: the tables say what leads where, and nothing leads out of the end."""

import pytest

from pullthrough.recording.states import ENDINGS, LEARN, TRANSITIONS, Event, Got, Ranges, State

BEGIN, OPEN, UNKEPT, END = State.BEGINNING, State.OPEN, State.UNKEPT, State.ENDED
EXPECTED = {
    # In the order of the states.
    Event.OPENED: (OPEN, OPEN, UNKEPT, END),
    Event.UNKEPT: (UNKEPT, UNKEPT, UNKEPT, END),
    Event.STORED: (BEGIN, END, END, END),
    Event.FAILED: (END, END, END, END),
    Event.LEFT: (BEGIN, END, UNKEPT, END),
    Event.EXPIRED: (BEGIN, OPEN, END, END),
}


@pytest.mark.parametrize("event", Event)
def test_what_becomes_of_a_recording(event: Event) -> None:
    """Every event in every state; what is no news changes nothing."""
    assert tuple(TRANSITIONS[state].get(event, state) for state in (BEGIN, OPEN, UNKEPT, END)) == EXPECTED[event]


def test_every_end_is_counted() -> None:
    """What leads to the end is an ending, but that one has waited long enough for room."""
    ends = {event for row in TRANSITIONS.values() for event, state in row.items() if state is END}
    assert ends - {Event.EXPIRED} == set(ENDINGS) - {Event.UNKEPT}


@pytest.mark.parametrize(
    ("known", "part", "whole", "unasked"),
    [
        (Ranges.UNKNOWN, Ranges.YES, Ranges.NO, Ranges.UNKNOWN),
        (Ranges.YES, Ranges.YES, Ranges.NO, Ranges.UNKNOWN),
        (Ranges.NO, Ranges.NO, Ranges.NO, Ranges.NO),
    ],
)
def test_what_is_learnt_of_ranges(known: Ranges, part: Ranges, whole: Ranges, unasked: Ranges) -> None:
    """One answer with the whole, where a range was asked for, settles it for a recording."""
    assert (LEARN[known, Got.PART], LEARN[known, Got.WHOLE], LEARN[known, Got.UNASKED]) == (part, whole, unasked)
