"""The public models of a store, to be searched, sorted and paged through.

Invariant: an index is made once for all viewers, in a thread, and never changes; a query costs one pass over the names.
Models of the same size or time are in the order of their names, whichever way they are sorted. Private models are not
in the index.
"""

from enum import StrEnum
from typing import Final, NamedTuple

from pullthrough.core.records import Name
from pullthrough.library.listing import View, is_whole, size_of

LONGEST: Final = 200
"""How many characters of a search are used."""
PAGE: Final = 50
"""Models on one page."""


class Row(NamedTuple):
    """A model as a list shows it."""

    name: Name
    typed: str
    """The name as users type it."""
    size: int
    pulled: float
    """When a client last pulled it, Unix seconds; 0 for never."""
    is_whole: bool
    is_pinned: bool


class Order(StrEnum):
    """An order of models. Each has a natural direction; a leading `-` reverses it."""

    PULLED = "pulled"
    OLDEST = "-pulled"
    NAME = "name"
    LAST_NAME = "-name"
    SIZE = "size"
    SMALLEST = "-size"


class Page(NamedTuple):
    """A page of the models that were found."""

    rows: list[Row]
    number: int
    """Counted from 1."""
    pages: int
    found: int
    """Models on all pages together."""


class ModelIndex:
    """An index of the models at one moment."""

    def __init__(self, view: View) -> None:
        """Build the index. Walks all models, so call it in a thread."""
        rows = [
            Row(
                name,
                name.typed,
                size_of(view, records),
                max(record.pulled for record in records),
                is_whole(view, records),
                name.is_among(view.pins),
            )
            for name, records in view.models.items()
            if not records[0].denied
        ]
        rows.sort(key=lambda row: row.typed)
        self._texts = {row.typed: row.typed.casefold() for row in rows}
        self._orders = {
            Order.NAME: rows,
            Order.LAST_NAME: rows[::-1],
            # Sorting is stable: equals stay in the order of names.
            Order.PULLED: sorted(rows, key=lambda row: -row.pulled),
            Order.OLDEST: sorted(rows, key=lambda row: row.pulled),
            Order.SIZE: sorted(rows, key=lambda row: -row.size),
            Order.SMALLEST: sorted(rows, key=lambda row: row.size),
        }

    def __len__(self) -> int:
        return len(self._texts)

    def latest(self, count: int) -> list[Row]:
        """Return the `count` models that were pulled last."""
        return self._orders[Order.PULLED][:count]

    def page(self, text: str = "", order: Order = Order.PULLED, number: int = 1) -> Page:
        """Return a page of the models whose names contain every word of `text`; the last page if `number` is beyond."""
        words = set(text[:LONGEST].casefold().split())
        found = self._orders[order]
        if words:
            texts = self._texts
            found = [row for row in found if all(word in texts[row.typed] for word in words)]
        pages = max(1, -(-len(found) // PAGE))
        number = min(max(1, number), pages)
        return Page(found[PAGE * (number - 1) : PAGE * number], number, pages, len(found))
