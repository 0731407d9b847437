"""Pulls under way, as far as the cache sees them: which clients were redirected, came back, and really pull.

A client shows that it pulls a blob, rather than only reading its head, when it requests the blob's last byte, bytes
past FAR, or two ranges at once. Until then only the bytes that it requests are fetched and stored.

A client that was redirected to the registry's own address and never requested a byte here has fetched past this cache,
or has given up.

Invariant: memory is bounded by `limit` whatever clients do. Pure state: `now` is a parameter, in seconds of any steady
clock.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pullthrough.core.digest import Digest

FAR: Final = 64 << 20
"""Bytes. Ollama fetches a smaller blob in one part, which includes its last byte; the first part of a larger one goes
past this (server/download.go: parts of 100 MB and more)."""

LOST_S: Final = 15 * 60.0
"""How long a client may take from the redirect to its first byte: it may be fetching other layers first."""

SAME_S: Final = 24 * 3600.0
"""How long a counted pull lasts: the client may fetch one large layer unseen before it asks for the next."""

Place = tuple[str, str]
"""(host, repository)."""


@dataclass(slots=True)
class _Redirected:
    """A pull of one model by one client that was redirected to the registry's own addresses."""

    last: float
    bypasses: bool
    """Whether the client's version is known to fetch past every proxy."""
    digests: set[Digest] = field(default_factory=set)
    """The blobs whose addresses the client was given."""
    is_counted: bool = False


@dataclass
class Counts:
    """Pulls since the start whose client was redirected to the registry and never requested a byte here."""

    bypassed: int = 0
    """Pulls by versions that are known to fetch past every proxy."""
    unseen: int = 0
    """Pulls by other versions, which may also have been cancelled."""


class Pulls:
    """The pulls of all clients."""

    def __init__(self, on_lost: Callable[[str, Place, bool], None] = lambda *_: None, *, limit: int = 10_000) -> None:
        """`on_lost` is called with (client, place, whether it is known to bypass) for each pull never seen here."""
        self.counts = Counts()
        self._on_lost = on_lost
        self._limit = limit
        self._places: OrderedDict[tuple[str, Digest], Place] = OrderedDict()
        """The place in which each client last asked for a blob."""
        self._redirected: OrderedDict[tuple[str, Place], _Redirected] = OrderedDict()
        self._lost: OrderedDict[tuple[str, Place], float] = OrderedDict()
        """When each counted pull last asked for an address."""
        self._ranges: dict[tuple[str, Digest], list[tuple[int, int]]] = {}
        """The ranges that each client is reading."""

    def ask(self, client: str, place: Place, digest: Digest) -> None:
        """Note that the client has asked the registry for the blob."""
        key = (client, digest)
        self._places[key] = place
        self._places.move_to_end(key)
        if len(self._places) > self._limit:
            self._places.popitem(last=False)

    def place(self, client: str, digest: Digest) -> Place | None:
        """Return the place in which the client last asked for the blob; None if unknown."""
        return self._places.get((client, digest))

    def is_waiting(self, client: str, place: Place, digest: Digest) -> bool:
        """Return whether the client was redirected to the registry for the blob, and has read nothing here since."""
        pull = self._redirected.get((client, place))
        return pull is not None and digest in pull.digests

    def redirect(self, client: str, place: Place, digest: Digest, *, bypasses: bool, now: float) -> None:
        """Note that the client was redirected to the registry's own address of the blob."""
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
        """Note that the client reads `[start, stop)` of `size` bytes, until `end`; returns whether it is a pull."""
        place = self.place(client, digest)
        if place is not None:
            self._redirected.pop((client, place), None)
        ranges = self._ranges.setdefault((client, digest), [])
        ranges.append((start, stop))
        return stop == size or stop > FAR or len(set(ranges)) > 1

    def end(self, client: str, digest: Digest, start: int, stop: int) -> None:
        """Note that the client has stopped reading what it began with `begin`."""
        ranges = self._ranges[client, digest]
        ranges.remove((start, stop))
        if not ranges:
            del self._ranges[client, digest]

    def readers(self, digest: Digest) -> int:
        """Return how many clients are reading the blob, however many requests each makes."""
        return sum(read is digest or read == digest for _, read in self._ranges)

    def expire(self, *, now: float) -> None:
        """Count the pulls that have requested no byte within LOST_S."""
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
