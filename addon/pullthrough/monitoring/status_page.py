"""The HTML pages about the cache, for people.

Invariant: every text from outside (model names, upstream's errors, search terms) is escaped by the template engine;
script and style are inline, and the pages' policy names their hashes, so that nothing else runs or loads.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, urlencode

import jinja2

from pullthrough.core.humanize import ago_text, size_text
from pullthrough.core.records import Name
from pullthrough.library.listing import JSON
from pullthrough.monitoring.manual import START, Manual
from pullthrough.monitoring.model_detail import ModelDetail
from pullthrough.monitoring.model_index import Order, Page
from pullthrough.monitoring.plot import plot
from pullthrough.monitoring.status import ClientRow, Holdings, Sight
from pullthrough.pki.client_setup import KINDS, SetupGuide
from pullthrough.runtime.version import own_version

SHARE: Final = Path(__file__).parent / "share"
PARTS: Final = ("notice", "saved", "recordings", "pulls", "models", "clients", "health", "events")
"""The parts that change, each replaced as a whole: macros of parts.html, and ids in the overview."""
PLACES: Final = (
    ("/", "Overview"),
    ("/models", "Models"),
    ("/clients", "Clients"),
    ("/setup", "Set up"),
    ("/docs/", "Docs"),
)
MOST: Final = 200
"""How many layers and tags a model's page lists, and how many clients their page."""
PULLERS: Final = 20
"""How many clients a model's page lists."""
_BESIDE: Final = 2
"""How many pages are linked on either side of the current one."""


@dataclass(frozen=True, slots=True)
class ModelQuery:
    """A request for a page of the list of models."""

    text: str = ""
    order: Order = Order.PULLED
    number: int = 1

    @classmethod
    def parse(cls, fields: Mapping[str, str]) -> Self:
        """Parse the query of an address; what makes no sense is ignored."""
        order, number = fields.get("sort", ""), fields.get("page", "")
        return cls(
            fields.get("q", "").strip(),
            Order(order) if order in tuple(Order) else Order.PULLED,
            int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else 1,
        )

    def link(self, **changes: Any) -> str:
        """Return the address of another page: the first, unless `number` is among the changes."""
        other = replace(self, **{"number": 1, **changes})
        fields = {"q": other.text, "sort": other.order, "page": str(other.number)}
        usual = {"q": "", "sort": Order.PULLED, "page": "1"}
        query = urlencode({name: value for name, value in fields.items() if value != usual[name]})
        return f"/models?{query}" if query else "/models"


class StatusPage:
    """The templates, read once."""

    def __init__(self) -> None:
        self._templates = templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(SHARE),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        templates.filters.update(
            size=size_text, ago=ago_text, span=span_text, plot=plot, numbers=_numbers,
            model_path=model_path, tag_path=_tag_path, kind=_kind,
        )  # fmt: skip
        style = (SHARE / "status.css").read_text(encoding="utf-8")
        script = (SHARE / "status.js").read_text(encoding="utf-8")
        self.manual = Manual()
        """The documentation, without pages if it was not installed."""
        places = PLACES if self.manual.pages else PLACES[:-1]
        templates.globals.update(style=style, script=script, version=own_version(), places=places, here="")
        templates.globals.update(files=KINDS, most=MOST, shown=PULLERS, start=START)
        self._parts = templates.get_template("parts.html").module
        self.policy = "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(script)}",
                f"style-src {_hash(style)}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'self'",
                "frame-ancestors 'none'",
            )
        )
        """The Content-Security-Policy of all pages but those of the documentation, which has pictures."""
        self.docs_policy = self.policy.replace("img-src", "img-src 'self'")

    def parts(self, sight: Sight) -> dict[str, str]:
        """Return the parts of the overview that change, as HTML."""
        return {name: getattr(self._parts, name)(sight) for name in PARTS}

    def overview(self, parts: Mapping[str, str], guide: SetupGuide, *, welcome: bool) -> str:
        """Return the front page; with `welcome` it begins with how to set up clients."""
        return self._render("status.html", here="/", parts=parts, guide=guide, welcome=welcome)

    def models(self, holdings: Holdings, query: ModelQuery, now: float) -> str:
        """Return a page of the list of models."""
        page = holdings.models.page(query.text, query.order, query.number)
        return self._render(
            "models.html", here="/models", query=query, page=page, now=now, total=len(holdings.models),
            private=holdings.private, private_bytes=holdings.private_bytes,
        )  # fmt: skip

    def model(self, model: ModelDetail, pullers: Sequence[tuple[str, float]], now: float) -> str:
        """Return the page of one model; `pullers` are the clients that pulled it and when, the latest first."""
        return self._render("model.html", model=model, pullers=pullers, now=now)

    def clients(self, rows: Sequence[ClientRow], total: int, now: float) -> str:
        """Return the page of the most recently seen clients, of `total`."""
        return self._render("clients.html", here="/clients", rows=rows, total=total, now=now)

    def missing(self) -> str:
        """Return the page for a model that is not stored."""
        return self._render("missing.html")

    def setup(self, guide: SetupGuide) -> str:
        """Return the page about setting up clients."""
        return self._render("setup.html", here="/setup", guide=guide)

    def docs(self, name: str) -> str:
        """Return a page of the documentation, by the name of its file."""
        title, html = self.manual.page(name)
        return self._render("manual.html", here="/docs/", name=name, title=title, html=html)

    def _render(self, template: str, **values: object) -> str:
        return self._templates.get_template(template).render(values)


def model_path(name: Name) -> str:
    """Return the address of a model's page."""
    return f"/model?name={quote(str(name), safe='/:@')}"


def span_text(seconds: float | None) -> str:
    """Return a duration: `40 s`, `12 min`, `3 h`, `5 days`; None means unknown."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


def _tag_path(row: JSON) -> str:
    return model_path(Name(row["host"], row["repository"], row["reference"]))


def _kind(media_type: str) -> str:
    """Return `application/vnd.ollama.image.model` as "model"."""
    return media_type.rpartition("vnd.ollama.image.")[2] or media_type


def _numbers(page: Page) -> list[int | None]:
    """Return the pages to link: the first, the last and those around the current one; None for a gap."""
    near = range(page.number - _BESIDE, page.number + _BESIDE + 1)
    shown = sorted({1, page.pages, *(number for number in near if 1 <= number <= page.pages)})
    numbers: list[int | None] = []
    for number in shown:
        if numbers and number - 1 not in shown:
            numbers.append(None)
        numbers.append(number)
    return numbers


def _hash(text: str) -> str:
    """Return a hash as a source expression (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
