"""The states of a recording, and of what is known of its source; what leads from one to another, as tables.

Pure.
"""

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where a recording stands."""

    BEGINNING = "beginning"
    """Nothing has told the size yet."""
    OPEN = "open"
    """Bytes come and are kept."""
    UNKEPT = "unkept"
    """The disk has no room for it: readers are served past the disk."""
    ENDED = "ended"


class Event(StrEnum):
    """What happens to a recording."""

    OPENED = "opened"
    """The size is known, and there is room."""
    UNKEPT = "unkept"
    """There is no room."""
    STORED = "stored"
    FAILED = "failed"
    LEFT = "left"
    """By all clients, for long."""
    EXPIRED = "expired"
    """It has not been kept for so long that the disk is worth another try."""


ENDINGS: Final = (Event.STORED, Event.FAILED, Event.LEFT, Event.UNKEPT)
"""What becomes of a recording, as it is counted and logged."""

TRANSITIONS: Final = {
    State.BEGINNING: {Event.OPENED: State.OPEN, Event.UNKEPT: State.UNKEPT, Event.FAILED: State.ENDED},
    State.OPEN: {
        Event.UNKEPT: State.UNKEPT,
        Event.STORED: State.ENDED,
        Event.FAILED: State.ENDED,
        Event.LEFT: State.ENDED,
    },
    # All of it may have come before there was no room left for more.
    State.UNKEPT: {Event.STORED: State.ENDED, Event.FAILED: State.ENDED, Event.EXPIRED: State.ENDED},
    State.ENDED: {},
}
"""What is not named changes nothing: it comes too late."""


class Ranges(StrEnum):
    """What is known of whether the source serves ranges."""

    UNKNOWN = "unknown"
    """The whole was asked for, and comes: another connection tries a range."""
    YES = "yes"
    """As far as is known: every recording but such a one begins so."""
    NO = "no"
    """It answers with the whole, from its first byte: that is fetched over one connection."""


class Got(StrEnum):
    """What a source has answered with."""

    PART = "part"
    """The range that it was asked for."""
    WHOLE = "whole"
    """The whole, though a range was asked for."""
    UNASKED = "unasked"
    """The whole, which is all that was asked for."""


LEARN: Final = {
    (Ranges.UNKNOWN, Got.PART): Ranges.YES,
    (Ranges.UNKNOWN, Got.WHOLE): Ranges.NO,
    (Ranges.UNKNOWN, Got.UNASKED): Ranges.UNKNOWN,
    (Ranges.YES, Got.PART): Ranges.YES,
    (Ranges.YES, Got.WHOLE): Ranges.NO,
    (Ranges.YES, Got.UNASKED): Ranges.UNKNOWN,
    (Ranges.NO, Got.PART): Ranges.NO,
    (Ranges.NO, Got.WHOLE): Ranges.NO,
    (Ranges.NO, Got.UNASKED): Ranges.NO,
}
