"""The plot of bytes by day, as geometry.

Invariant: each day of the calendar has room for one bar, even if nothing was pulled on it, and the axis ends at a round
number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from pullthrough.library.listing import JSON

DAYS: Final = 30
WIDTH: Final = 300
"""The size of the drawing, without a unit: it is stretched to fit its place."""
HEIGHT: Final = 100
STEP: Final = WIDTH // DAYS


@dataclass(frozen=True, slots=True)
class Bar:
    """One day: at the bottom the bytes from upstream, above them those that the cache saved."""

    day: str
    x: int
    served: int
    fetched: int
    saved_top: float
    fetched_top: float
    """Both in units of the drawing, from the top."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was pulled on that day."""
        return not (self.served or self.fetched)


@dataclass(frozen=True, slots=True)
class Plot:
    """The last DAYS days, the newest last."""

    bars: list[Bar]
    top: int
    """Bytes at the upper end of the axis; 0 if nothing was pulled on any of the days."""


def plot(days: Sequence[JSON], now: float) -> Plot:
    """Draw `days`, as `statistics` of listing returns them, up to `now` in Unix seconds."""
    known = {day["day"]: (day["served"], day["fetched"]) for day in days}
    today = datetime.fromtimestamp(now, UTC).date()
    shown = [(str(today - timedelta(days=back))) for back in range(DAYS - 1, -1, -1)]
    values = [known.get(day, (0, 0)) for day in shown]
    top = _round_up(max(map(max, values)))
    scale = HEIGHT / (top or 1)
    return Plot(
        [
            Bar(day, STEP * place, served, fetched, HEIGHT - max(served, fetched) * scale, HEIGHT - fetched * scale)
            for place, (day, (served, fetched)) in enumerate(zip(shown, values, strict=True))
        ],
        top,
    )


def _round_up(value: int) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, …"""
    unit = 1
    while value > 10 * unit:
        unit *= 10
    return next(unit * step for step in (1, 2, 5, 10) if value <= unit * step) if value else 0
