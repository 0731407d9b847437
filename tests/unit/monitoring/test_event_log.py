"""event_log: what may be shown is kept, and nothing else."""

import logging

import pytest

from pullthrough.core.access_log import SHOWN
from pullthrough.monitoring.event_log import KEPT, Event, EventLog


@pytest.fixture(autouse=True)
def ours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pullthrough")


def test_what_is_shown() -> None:
    """Lines that say so, the newest first, with their time and whether they tell of trouble."""
    log = logging.getLogger("pullthrough.anything")
    with EventLog() as events:
        log.info("evicted %d blobs", 3, extra=SHOWN)
        log.warning("%s is private", "library/secret")
        log.warning("down", extra=SHOWN)
        log.debug("left out by the level", extra=SHOWN)
    log.info("after the end", extra=SHOWN)
    assert [event[1:] for event in events.latest(9)] == [("down", True), ("evicted 3 blobs", False)]
    assert all(isinstance(event, Event) and event.time > 1e9 for event in events.latest(9))
    assert len(events.latest(1)) == 1


def test_bounds() -> None:
    """So many, however much happens."""
    with EventLog() as events:
        for number in range(KEPT + 5):
            logging.getLogger("pullthrough").info("%d", number, extra=SHOWN)
    assert [event.text for event in events.latest(KEPT + 5)] == [str(number) for number in range(KEPT + 4, 4, -1)]
