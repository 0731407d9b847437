"""The choice of models to remove when room is needed.

Invariant: nothing pinned or in flight is ever chosen, models are removed whole (a blob only if nothing that stays needs
it), and nothing is removed unless that frees enough. Pure: sizes and times are arguments.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

from pullthrough.core.records import Name


@dataclass(frozen=True, slots=True)
class Holding:
    """A unit that is kept or removed whole: a model, or something that no model lists."""

    name: Name | None
    parts: frozenset[Hashable]
    """Its blobs, by any key."""
    used: float
    """When it was last pulled or brought, Unix seconds."""
    kept: bool = False
    """Pinned."""
    is_leftover: bool = False
    """Whether a recording has left it; removed before models."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The holdings and parts to remove."""

    holdings: tuple[Holding, ...]
    parts: frozenset[Hashable]
    """The parts that nothing that stays needs."""
    freed: int
    """Bytes."""


def choose(
    holdings: Iterable[Holding], sizes: Mapping[Hashable, int], *, excess: int, busy: Collection[Hashable]
) -> Choice | None:
    """Return the least recently used holdings that together free `excess` bytes; None if all that may go is too little.

    Leftovers go before all others. `sizes` are the bytes of the stored parts; `busy` parts are in flight.
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
    # Blobs are shared: some of the first choices may have turned out unnecessary.
    for holding in reversed(gone.copy()):
        worth = sum(sizes.get(part, 0) for part in holding.parts if not needed[part])
        if freed - worth >= excess:
            freed -= worth
            gone.remove(holding)
            needed.update(holding.parts)
    parts = frozenset(part for holding in gone for part in holding.parts if not needed[part])
    return Choice(tuple(gone), parts, freed)
