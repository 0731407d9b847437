"""Which models go when room is needed.

Invariant: nothing kept or in flight is ever chosen, models go whole (a blob goes only when nothing that stays needs
it), and nothing goes unless enough goes. Pure: sizes and times are arguments.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

from pullthrough.core.records import Name


@dataclass(frozen=True, slots=True)
class Holding:
    """What goes or stays as one: a model, or something that no model lists."""

    name: Name | None
    parts: frozenset[Hashable]
    """Its blobs, by whatever names them."""
    used: float
    """When it was last pulled or brought, Unix seconds."""
    kept: bool = False
    """Pinned."""
    is_leftover: bool = False
    """What a recording has left; goes before models."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What goes."""

    holdings: tuple[Holding, ...]
    parts: frozenset[Hashable]
    """What nothing that stays needs."""
    freed: int
    """Bytes."""


def choose(
    holdings: Iterable[Holding], sizes: Mapping[Hashable, int], *, excess: int, busy: Collection[Hashable]
) -> Choice | None:
    """Return the least recently used holdings that free `excess` bytes together; None if all that may go is not enough.

    Leftovers go before all others. `sizes` are the bytes of the parts that are here; `busy` parts are in
    flight.
    """
    every = list(holdings)
    needed = Counter(part for holding in every for part in holding.parts)
    gone: list[Holding] = []
    freed = 0
    for holding in sorted(every, key=lambda item: (not item.is_leftover, item.used)):
        if freed >= excess:
            break
        if holding.kept or not holding.parts.isdisjoint(busy):
            continue
        gone.append(holding)
        for part in holding.parts:
            needed[part] -= 1
            if not needed[part]:
                freed += sizes.get(part, 0)
    if freed < excess:
        return None
    # Blobs are shared: what went early may not have been worth it.
    for holding in reversed(gone.copy()):
        worth = sum(sizes.get(part, 0) for part in holding.parts if not needed[part])
        if freed - worth >= excess:
            freed -= worth
            gone.remove(holding)
            needed.update(holding.parts)
    parts = frozenset(part for holding in gone for part in holding.parts if not needed[part])
    return Choice(tuple(gone), parts, freed)
