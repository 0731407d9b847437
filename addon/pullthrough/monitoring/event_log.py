"""The log lines that anybody may see: what has happened to the cache, for the status page.

A line is shown only if the code that logs it says so (`extra=SHOWN`), as others may name private models. Invariant:
memory is bounded; lines that the log omits because of its level are not shown, either.
"""

import logging
from collections import deque
from types import TracebackType
from typing import Final, NamedTuple, Self

KEPT: Final = 50
_OURS: Final = "pullthrough"


class Event(NamedTuple):
    """A line of the log."""

    time: float
    """Unix seconds."""
    text: str
    is_trouble: bool


class EventLog(logging.Handler):
    """The last lines that were logged during its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._events: deque[Event] = deque(maxlen=KEPT)

    def __enter__(self) -> Self:
        logging.getLogger(_OURS).addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger(_OURS).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line if it may be shown."""
        if getattr(record, "is_shown", False):
            self._events.appendleft(Event(record.created, record.getMessage(), record.levelno >= logging.WARNING))

    def latest(self, count: int) -> tuple[Event, ...]:
        """Return the last lines, the newest first. Any thread may log meanwhile."""
        return tuple(self._events.copy())[:count]
