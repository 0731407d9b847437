"""The status page: what `watch` sees, as HTML.

Invariant: every text from outside (model names, upstream's errors) is escaped by the template engine; script and
style are inline, and the page's policy names their hashes, so that nothing else runs or loads.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jinja2

from pullthrough.core.humanize import ago_text, size_text
from pullthrough.library.listing import JSON
from pullthrough.monitoring.status import Sight

SHARE: Final = Path(__file__).parent / "share"
PARTS: Final = ("recordings", "saved", "models", "health")
"""What changes, each replaced as a whole: the macros of parts.html, and ids of the page."""

DAYS: Final = 30
PLOT_HEIGHT: Final = 80


@dataclass(frozen=True, slots=True)
class Bar:
    """One day of the plot: from the ground up what came from upstream, then what did not need to."""

    day: str
    served: int
    fetched: int
    saved_top: float
    fetched_top: float
    """Both in units of the plot, downwards."""


class StatusPage:
    """The templates, read once."""

    def __init__(self) -> None:
        templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(SHARE),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        templates.filters.update(size=size_text, ago=ago_text, span=span_text, bars=bars)
        self._style = (SHARE / "status.css").read_text(encoding="utf-8")
        self._script = (SHARE / "status.js").read_text(encoding="utf-8")
        self._page = templates.get_template("status.html")
        self._parts = templates.get_template("parts.html").module
        self.policy = "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(self._script)}",
                f"style-src {_hash(self._style)}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )
        """Content-Security-Policy of the page."""

    def parts(self, sight: Sight) -> dict[str, str]:
        """The parts that change, as HTML."""
        return {name: getattr(self._parts, name)(sight) for name in PARTS}

    def page(self, parts: dict[str, str]) -> str:
        """The whole page."""
        return self._page.render(parts=parts, style=self._style, script=self._script)


def bars(days: list[JSON]) -> list[Bar]:
    """The plot of the last DAYS days that there was something on, the newest last."""
    shown = [(day["day"], day["served"], day["fetched"]) for day in days[:DAYS]][::-1]
    most = max((max(served, fetched) for _, served, fetched in shown), default=0) or 1
    scale = PLOT_HEIGHT / most
    return [
        Bar(day, served, fetched, PLOT_HEIGHT - max(served, fetched) * scale, PLOT_HEIGHT - fetched * scale)
        for day, served, fetched in shown
    ]


def span_text(seconds: float | None) -> str:
    """How long still: `40 s`, `12 min`, `3 h`; None is not known."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _hash(text: str) -> str:
    """A source expression of CSP level 3, section 2.3.1."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
