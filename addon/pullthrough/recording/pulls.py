"""Pulls under way, as far as they can be seen: who was told where a blob is, who came for it, and who really pulls.

A client shows that it pulls a blob, and does not only look at its head, when it asks for the blob's last byte, for
bytes past FAR, or for two ranges at once. Until then it costs upstream and the disk what it asks for, and no more.

A client that was sent to the registry's own address, and never came here for a byte of it, has fetched past this
cache, or has given up.

Invariant: memory is bounded by `limit` whatever clients do. Pure state: `now` is a parameter, in seconds of any steady
clock.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pullthrough.core.digest import Digest

FAR: Final = 64 << 20
"""Bytes. A smaller blob is one part of an Ollama, with its last byte; of a larger one the first part goes as far
(server/download.go: parts of 100 MB and more)."""

LOST_S: Final = 15 * 60.0
"""How long a client may take from the address to its first byte: it may be fetching other layers first."""

SAME_S: Final = 24 * 3600.0
"""How long a pull that was counted goes on unseen, while the client fetches one large layer and asks for the next."""

Place = tuple[str, str]
"""(host, repository)."""


@dataclass(slots=True)
class _Redirected:
    """A pull of one model by one client, that was sent to the registry's own addresses."""

    last: float
    bypasses: bool
    """Its version is known to fetch past every proxy."""
    digests: set[Digest] = field(default_factory=set)
    """The blobs whose addresses it was given."""
    is_counted: bool = False


@dataclass
class Counts:
    """Pulls since the start that were sent to the registry's own addresses and never came here for a byte."""

    bypassed: int = 0
    """By versions that are known to fetch past every proxy."""
    unseen: int = 0
    """By others: they may have been cancelled, too."""


class Pulls:
    """The pulls of all clients."""

    def __init__(self, on_lost: Callable[[str, Place, bool], None] = lambda *_: None, *, limit: int = 10_000) -> None:
        """`on_lost` is told (client, place, whether it is known to bypass) of each pull that never came here."""
        self.counts = Counts()
        self._on_lost = on_lost
        self._limit = limit
        self._places: OrderedDict[tuple[str, Digest], Place] = OrderedDict()
        """Where each client has last asked for a blob."""
        self._redirected: OrderedDict[tuple[str, Place], _Redirected] = OrderedDict()
        self._lost: OrderedDict[tuple[str, Place], float] = OrderedDict()
        """When the pulls that were counted last asked for an address."""
        self._ranges: dict[tuple[str, Digest], list[tuple[int, int]]] = {}
        """The ranges that each client reads now."""

    def ask(self, client: str, place: Place, digest: Digest) -> None:
        """Note that the client has asked the registry for the blob."""
        key = (client, digest)
        self._places[key] = place
        self._places.move_to_end(key)
        if len(self._places) > self._limit:
            self._places.popitem(last=False)

    def place(self, client: str, digest: Digest) -> Place | None:
        """Return where the client has last asked for the blob; None if that is not known."""
        return self._places.get((client, digest))

    def is_waiting(self, client: str, place: Place, digest: Digest) -> bool:
        """Return whether the client was sent to the registry's own address of the blob, and nothing came of it here."""
        pull = self._redirected.get((client, place))
        return pull is not None and digest in pull.digests

    def redirect(self, client: str, place: Place, digest: Digest, *, bypasses: bool, now: float) -> None:
        """Note that the client was sent to the registry's own address of the blob."""
        key = (client, place)
        if key not in self._redirected:
            counted = now < self._lost.pop(key, float("-inf")) + SAME_S
            self._redirected[key] = _Redirected(now, bypasses, is_counted=counted)
        pull = self._redirected[key]
        pull.last, pull.bypasses = now, bypasses
        if len(pull.digests) < self._limit:
            pull.digests.add(digest)
        self._redirected.move_to_end(key)
        if len(self._redirected) > self._limit:
            self._redirected.popitem(last=False)

    def begin(self, client: str, digest: Digest, start: int, stop: int, size: int) -> bool:
        """Note that the client reads `[start, stop)` of `size` bytes, until `end`; return whether it shows a pull."""
        place = self.place(client, digest)
        if place is not None:
            self._redirected.pop((client, place), None)
        ranges = self._ranges.setdefault((client, digest), [])
        ranges.append((start, stop))
        return stop == size or stop > FAR or len(set(ranges)) > 1

    def end(self, client: str, digest: Digest, start: int, stop: int) -> None:
        """Note that a reading which began has ended."""
        ranges = self._ranges[client, digest]
        ranges.remove((start, stop))
        if not ranges:
            del self._ranges[client, digest]

    def readers(self, digest: Digest) -> int:
        """Return how many clients read the blob now, however many requests each has for it."""
        return sum(read is digest or read == digest for _, read in self._ranges)

    def expire(self, *, now: float) -> None:
        """Count the pulls of which no byte was asked for in LOST_S."""
        while self._redirected:
            key, pull = next(iter(self._redirected.items()))
            if now < pull.last + LOST_S:
                return
            del self._redirected[key]
            self._lost[key] = pull.last
            self._lost.move_to_end(key)
            if len(self._lost) > self._limit:
                self._lost.popitem(last=False)
            if pull.is_counted:
                continue
            if pull.bypasses:
                self.counts.bypassed += 1
            else:
                self.counts.unseen += 1
            self._on_lost(*key, pull.bypasses)
