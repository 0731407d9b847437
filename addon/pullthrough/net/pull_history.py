"""The history of pulls: client, model, bytes by source, and duration, however many requests a pull took.

A pull begins with the model's manifest and ends when all of its blobs have gone to the client. A client that already
has some of them does not ask for those: its pull ends when nothing has been asked for in QUIET_S. After LONGEST_S the
rest of a pull counts as another one.

Invariant: all requests of one address for one model at a time are one pull; memory is bounded by OPEN and KEPT,
whatever clients do: if there is no room, the pull that began first ends. The notes may name private models: code that
shows them leaves those out. Pure state: `now` is a parameter, Unix seconds.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.humanize import size_text
from pullthrough.core.intervals import Intervals
from pullthrough.core.records import Name

QUIET_S: Final = 30.0
LONGEST_S: Final = 24 * 3600.0
OPEN: Final = 1000
"""The most pulls that are followed at a time."""
KEPT: Final = 200_000
"""The most digests and disjoint intervals of blobs kept for all of these together, at some 100 bytes each."""
RECENT: Final = 50
"""The most finished pulls that are remembered."""

Wanted = Sequence[Collection[Digest]]
"""The blobs of a model, or of each child of a list."""


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull of one model by one client."""

    client: str
    """The client's address."""
    name: Name
    size: int
    """The total size of the blobs that it has asked for."""
    from_cache: int
    """Bytes sent to the client of blobs that were stored before the pull."""
    from_upstream: int
    """Bytes sent to the client of blobs that were fetched during the pull."""
    began: float
    """Unix seconds."""
    seconds: float
    """Until the last byte."""
    is_whole: bool
    """Whether all blobs that the client has asked for have gone to it."""
    is_running: bool = False

    @property
    def sent(self) -> int:
        """Bytes sent to the client."""
        return self.from_cache + self.from_upstream

    @property
    def source(self) -> str:
        """Where the bytes came from: "cache", "upstream" or "both"."""
        return "both" if self.from_cache and self.from_upstream else "cache" if self.from_cache else "upstream"

    def __str__(self) -> str:
        places = ((self.from_cache, "the cache"), (self.from_upstream, "upstream"))
        sources = " and ".join(f"{size_text(count)} from {place}" for count, place in places if count)
        short = "" if self.is_whole else f", short of {size_text(self.size)}"
        return f"{self.client} pulled {self.name.typed}: {sources} in {self.seconds:.1f} s{short}"


@dataclass(slots=True)
class _Blob:
    size: int
    sent: Intervals = field(default_factory=Intervals)

    @property
    def is_whole(self) -> bool:
        return self.sent.size >= self.size


@dataclass(slots=True)
class Following:
    """A pull under way."""

    client: str
    name: Name
    began: float
    last: float
    wanted: list[frozenset[Digest]] = field(default_factory=list)
    blobs: dict[Digest, _Blob] = field(default_factory=dict)
    whole: set[Digest] = field(default_factory=set)
    """The blobs that have gone to the client in full."""
    reading: int = 0
    """Requests that are being answered."""
    kept: int = 0
    """What counts towards KEPT."""
    from_cache: int = 0
    from_upstream: int = 0

    @property
    def is_whole(self) -> bool:
        return len(self.whole) == len(self.blobs)

    @property
    def is_complete(self) -> bool:
        """Whether all blobs of the model have gone to the client."""
        # Checked after each of thousands of blobs; `<=` is fast, as it compares the sets' lengths first.
        return not self.reading and any(digests <= self.whole for digests in self.wanted)

    def tell(self, *, is_running: bool) -> Pull:
        size = sum(blob.size for blob in self.blobs.values())
        spent = max(0.0, self.last - self.began)
        numbers = (size, self.from_cache, self.from_upstream, self.began, spent)
        return Pull(self.client, self.name, *numbers, self.is_whole, is_running)


class PullHistory:
    """The pulls of all clients."""

    def __init__(self, on_end: Callable[[Pull], None] = lambda _: None, *, limit: int = OPEN, kept: int = KEPT) -> None:
        """`on_end` is called with each pull that has ended."""
        self._on_end = on_end
        self._limit = limit
        self._most_kept = kept
        self._kept = 0
        self._open: dict[tuple[str, Name], Following] = {}
        """The pulls under way, by (client, name), in the order in which they began."""
        self.recent: deque[Pull] = deque(maxlen=RECENT)
        """The pulls that have ended, the latest first."""

    @property
    def running(self) -> list[Pull]:
        """The pulls under way that have asked for a blob, the latest first."""
        return [pull.tell(is_running=True) for pull in reversed(self._open.values()) if pull.blobs]

    def ask(self, client: str, name: Name, wanted: Wanted, *, now: float) -> None:
        """Note that the client received a manifest.

        A manifest that is named by its digest belongs to the pull under way of the same repository.
        """
        pull = self._open.get((client, name.model))
        if pull is None and ":" in name.reference:
            pull = next((each for each in self._of(client) if each.name.place == name.place), None)
        if pull is None:
            pull = self._begin(client, name.model, now)
        pull.last = now
        more = [digests for digests in map(frozenset, wanted) if digests not in pull.wanted]
        pull.wanted += more
        self._keep(pull, sum(map(len, more)))

    def begin(
        self,
        client: str,
        digest: Digest,
        size: int,
        find: Callable[[], Name | None],
        *,
        now: float,
    ) -> Following | None:
        """Note that bytes of a blob are about to be sent; return the pull that they belong to, for `end`.

        `find` says which model has the blob, for a client that received no manifest of it here: the cache may have been
        restarted since.
        """
        pull = next((each for each in self._of(client) if any(digest in digests for digests in each.wanted)), None)
        pull = pull or next((each for each in self._of(client) if digest in each.blobs), None)
        if pull is None and (name := find()) is not None:
            pull = self._open.get((client, name.model)) or self._begin(client, name.model, now)
        pull = pull or next(self._of(client), None)
        if pull is not None:
            is_new = digest not in pull.blobs
            pull.blobs.setdefault(digest, _Blob(size))
            pull.reading += 1
            pull.last = now
            self._keep(pull, is_new)
        return pull

    def end(self, pull: Following, digest: Digest, start: int, sent: int, *, cached: bool, now: float) -> None:
        """Note that `sent` bytes from `start` went out; `cached` says that the blob was stored before the pull."""
        pull.reading -= 1
        pull.last = now
        blob = pull.blobs[digest]
        before = blob.sent.count
        blob.sent.add(start, start + sent)
        if blob.is_whole:
            pull.whole.add(digest)
        if cached:
            pull.from_cache += sent
        else:
            pull.from_upstream += sent
        if pull.is_complete:
            self._finish(pull)
        else:
            self._keep(pull, blob.sent.count - before)

    def expire(self, *, now: float) -> None:
        """End the pulls that have asked for nothing in QUIET_S, and those that have lasted LONGEST_S."""
        for pull in list(self._open.values()):
            if (not pull.reading and now > pull.last + QUIET_S) or now > pull.began + LONGEST_S:
                self._finish(pull)

    def close(self) -> None:
        """End all pulls."""
        for pull in list(self._open.values()):
            self._finish(pull)

    def _of(self, client: str) -> Iterator[Following]:
        """Yield the client's pulls under way, the latest first."""
        return (pull for pull in reversed(self._open.values()) if pull.client == client)

    def _begin(self, client: str, name: Name, now: float) -> Following:
        if len(self._open) >= self._limit:
            self._finish(next(iter(self._open.values())))
        pull = self._open[client, name] = Following(client, name, now, now)
        return pull

    def _keep(self, pull: Following, more: int) -> None:
        """Count `more` entries for a pull; if there are too many in all, end the pulls that began first."""
        if self._is_open(pull):
            pull.kept += more
            self._kept += more
            while self._kept > self._most_kept:
                self._finish(next(iter(self._open.values())))

    def _is_open(self, pull: Following) -> bool:
        return self._open.get((pull.client, pull.name)) is pull

    def _finish(self, pull: Following) -> None:
        if not self._is_open(pull):
            return
        del self._open[pull.client, pull.name]
        self._kept -= pull.kept
        # A client that asks for a manifest alone only checks for updates.
        if pull.from_cache or pull.from_upstream:
            told = pull.tell(is_running=False)
            self.recent.appendleft(told)
            self._on_end(told)
