"""Tables of states and transitions: of a recording, and of what is known about its source.

Pure.
"""

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """The state of a recording."""

    BEGINNING = "beginning"
    """The size is not known yet."""
    OPEN = "open"
    """Bytes arrive and are kept."""
    UNKEPT = "unkept"
    """The disk has no room for it: readers are served past the disk."""
    ENDED = "ended"


class Event(StrEnum):
    """An event in a recording's life."""

    OPENED = "opened"
    """The size is known, and there is room."""
    UNKEPT = "unkept"
    """There is no room."""
    STORED = "stored"
    FAILED = "failed"
    LEFT = "left"
    """All clients have been gone for long."""
    EXPIRED = "expired"
    """It was passed through for long enough: the disk is worth another try."""


ENDINGS: Final = (Event.STORED, Event.FAILED, Event.LEFT, Event.UNKEPT)
"""The outcomes of a recording that are counted and logged."""

TRANSITIONS: Final = {
    State.BEGINNING: {Event.OPENED: State.OPEN, Event.UNKEPT: State.UNKEPT, Event.FAILED: State.ENDED},
    State.OPEN: {
        Event.UNKEPT: State.UNKEPT,
        Event.STORED: State.ENDED,
        Event.FAILED: State.ENDED,
        Event.LEFT: State.ENDED,
    },
    # All bytes may have come before the room ran out.
    State.UNKEPT: {Event.STORED: State.ENDED, Event.FAILED: State.ENDED, Event.EXPIRED: State.ENDED},
    State.ENDED: {},
}
"""An event that a state does not list comes too late, and changes nothing."""


class Ranges(StrEnum):
    """What is known about whether the source serves ranges."""

    UNKNOWN = "unknown"
    """The first request had no Range: another connection tries one."""
    YES = "yes"
    """Assumed until proven wrong: every other recording begins so."""
    NO = "no"
    """It answers with the whole blob from byte 0, which one connection fetches."""


class Got(StrEnum):
    """The kind of a source's answer."""

    PART = "part"
    """The requested range."""
    WHOLE = "whole"
    """The whole blob, though a range was requested."""
    UNASKED = "unasked"
    """The whole blob, as requested: no range was."""


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
