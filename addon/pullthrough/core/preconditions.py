"""Conditional requests (RFC 9110 section 13): whether a GET or HEAD of a blob is answered as if it had no conditions.

Invariant: evaluated before Range and If-Range, in the order of section 13.2.2. A blob has an entity tag and no
modification date, so If-Unmodified-Since and If-Modified-Since are ignored (sections 13.1.4 and 13.1.3); If-Range is
handled in `ranges`.
"""

import re
from enum import Enum, auto

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
# Recipients must take empty list elements (RFC 9110 section 5.6.1.2).
_LIST = re.compile(rf"[ \t,]*(?:{_TAG}[ \t]*(?:,[ \t,]*|$))+")
_TAGS = re.compile(_TAG)


class Precondition(Enum):
    """The result of the conditions."""

    HOLDS = auto()
    FAILED = auto()
    """412."""
    NOT_MODIFIED = auto()
    """304."""


def evaluate(if_match: str | None, if_none_match: str | None, entity_tag: str) -> Precondition:
    """Evaluate the two fields of a GET or HEAD of the representation with the strong `entity_tag`.

    A field that is not a list of entity tags matches nothing.
    """
    # If-Match compares strongly (section 13.1.1), If-None-Match weakly (section 13.1.2).
    if if_match is not None and not _matches(if_match, {entity_tag}):
        return Precondition.FAILED
    if if_none_match is not None and _matches(if_none_match, {entity_tag, f"W/{entity_tag}"}):
        return Precondition.NOT_MODIFIED
    return Precondition.HOLDS


def _matches(field: str, accepted: set[str]) -> bool:
    if field.strip(" \t") == "*":
        return True
    return _LIST.fullmatch(field) is not None and not accepted.isdisjoint(_TAGS.findall(field))
