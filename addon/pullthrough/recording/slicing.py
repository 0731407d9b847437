"""Choose the slice of a recording to request next.

Invariant: a slice is a free, non-empty interval, so no byte is fetched twice. Pure: reads an `Assembly`, changes
nothing; `now` is a parameter.

The order: first the slice of a starving reader; else the lowest free byte that some reader will need (so the hash keeps
up with the download); else, if the blob is to be completed, the lowest free byte of all.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pullthrough.recording.assembly import Assembly

KIB = 1024
MIB = 1024 * KIB

MIN_SLICE = 64 * KIB
MAX_SLICE = 8 * MIB
"""Ollama's own parts are 100 MB and more (server/download.go). Ours stay small because a starving reader may have to
wait for one to end, and a `kill -9` loses one per connection."""

FIRST_SLICE = 512 * KIB
"""The first request, made before the size is known: most blobs of a model are smaller."""

PROBE_SLICE = 128 * KIB
"""The slice while no rate has been measured: if the line turns out slow, these keep all connections busy while other
readers wait."""

STARVING_S = 1.0
"""Clients give up on a part after 5 s without a byte (v0.1.23-v0.5.7), 30 s (later): a starving reader gets the next
free connection, after one slice at most."""

ALONE_SLICE_S = 2.0
SHARED_SLICE_S = 0.75
LEAST_SLICE_S = 0.1
"""A shorter slice costs more in requests than another connection gains: small blobs are one slice or two."""


@dataclass(eq=False, slots=True)
class Demand:
    """A reader that will need `[position, stop)` and got its last byte at `fed` (seconds, same clock as `now`)."""

    position: int
    stop: int
    fed: float


@dataclass(frozen=True, slots=True)
class Slice:
    """`[start, stop)`, to be fetched by one ranged GET."""

    start: int
    stop: int


def first_slice(rate: float | None, wanted: int) -> int:
    """Return the size of the first request for a blob of unknown size, of which `wanted` bytes are surely needed."""
    return max(FIRST_SLICE, min(wanted + -wanted % MIN_SLICE, _least(rate)))


def next_slice(
    assembly: Assembly,
    demands: Iterable[Demand],
    *,
    rate: float | None,
    connections: int,
    complete: bool,
    now: float,
) -> Slice | None:
    """Return the slice to fetch next, or None if no free byte is wanted.

    `rate` is what one connection delivers (bytes/s), None if unknown; `complete` says that the whole blob is wanted,
    not only what readers request.
    """
    waiting: list[tuple[float, int]] = []
    needed: int | None = None
    last = assembly.size if complete else 0
    for demand in demands:
        # Round up to the grid: each leftover crumb would cost a request later.
        last = max(last, demand.stop + -demand.stop % MIN_SLICE)
        position = assembly.first_missing(demand.position)
        if position >= demand.stop:
            continue
        gap = assembly.next_free(position, demand.stop)
        if gap is None:
            continue
        if position == demand.position and gap[0] == position:
            waiting.append((demand.fed, position))
        needed = gap[0] if needed is None else min(needed, gap[0])

    starving = min((item for item in waiting if now - item[0] >= STARVING_S), default=None)
    if starving is not None:
        return _cut(assembly, starving[1], _slice_size(rate, ALONE_SLICE_S / len(waiting)), last)
    seconds = ALONE_SLICE_S if len(waiting) <= 1 else SHARED_SLICE_S
    if needed is None and complete:
        gap = assembly.next_free(0, assembly.size)
        needed = gap[0] if gap is not None else None
    if needed is None:
        return None
    # Towards the end, share out the rest, so that no connection is left alone with a large slice.
    fair = max(_least(rate), _floor_power(assembly.unclaimed // connections))
    return _cut(assembly, needed, min(fair, _slice_size(rate, seconds)), last)


def _slice_size(rate: float | None, seconds: float) -> int:
    if rate is None:
        return PROBE_SLICE
    return min(MAX_SLICE, max(MIN_SLICE, _floor_power(int(rate * seconds))))


def _least(rate: float | None) -> int:
    return MIN_SLICE if rate is None else min(MAX_SLICE, max(MIN_SLICE, _ceiling_power(int(rate * LEAST_SLICE_S))))


def _ceiling_power(value: int) -> int:
    return 1 << (value - 1).bit_length() if value > 0 else 0


def _floor_power(value: int) -> int:
    return 1 << (value.bit_length() - 1) if value > 0 else 0


def _cut(assembly: Assembly, position: int, size: int, last: int) -> Slice:
    """Return an aligned slice of at most `size` bytes around the free byte `position`, within its gap and `last`."""
    start = max(position - position % MIN_SLICE, assembly.free_from(position))
    gap = assembly.next_free(position, assembly.size)
    assert gap is not None
    return Slice(start, min(start - start % size + size, gap[1], last))
