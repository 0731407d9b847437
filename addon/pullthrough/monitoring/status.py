"""What a person who watches the cache wants to see, looked up together.

Invariant: what grows with the number of models is looked at in a thread, and as seldom as that is long; of private
models nothing is told but how many there are and how big.
"""

import asyncio
import heapq
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.listing import JSON, View, listing, size_of, statistics
from pullthrough.monitoring.health import Disk, Health
from pullthrough.recording.pulls import Counts
from pullthrough.recording.recorder import Recorder
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream

FRESH_S: Final = 5.0
"""How old the list of models and the sums may be."""
SHARE_OF_TIME: Final = 0.05
"""What looking at them may take: where there are ten thousand models, it takes a second, and is done more seldom."""
SHOWN: Final = 50
"""Models and recordings that are told one by one."""
SMOOTHING: Final = 0.3


@dataclass(frozen=True, slots=True)
class Progress:
    """A blob that is being recorded."""

    model: str
    """One that lists it, "" if no public model does."""
    present: int
    size: int | None
    rate: float
    """Bytes per second lately."""
    readers: int

    @property
    def left_s(self) -> float | None:
        """How long it still takes at this rate."""
        return (self.size - self.present) / self.rate if self.size is not None and self.rate >= 1 else None


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is stored, and what it has saved."""

    models: tuple[JSON, ...]
    """Rows of the public ones (catalogue), the one pulled last first, SHOWN at most."""
    public: int
    private: int
    private_bytes: int
    sums: JSON
    """As `statistics` of catalogue."""


@dataclass(frozen=True, slots=True)
class Sight:
    """All of it at one moment."""

    now: float
    """Unix seconds."""
    recordings: tuple[Progress, ...]
    """SHOWN at most."""
    running: int
    holdings: Holdings
    disk: Disk
    held_bytes: int
    max_size: int | None
    min_free: int
    upstream: Mapping[str, bool]
    """Which registry answers."""
    upstream_errors: int
    retries: int
    mismatches: int
    problems: tuple[str, ...]
    bypassed: int
    """Pulls since the start that went past the cache."""
    tier: JSON | None = None
    """The fleet's object store, as `stats` tells it."""


class StatusView:
    """Over one daemon."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        upstream: Upstream,
        health: Health,
        view: Callable[[], View],
        pulls: Counts,
        tier: Callable[[], JSON] | None = None,
    ) -> None:
        """`view` says what is stored now, `pulls` how many went past the cache, `tier` the state of the fleet's object
        store, where there is one."""
        self._pulls = pulls
        self._tier = tier
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._upstream = upstream
        self._view = view
        self._health = health
        self._holdings: Holdings | None = None
        self._stale_at = 0.0
        self._names: dict[Digest, str] = {}
        """Of the blobs that are being recorded, as long as the holdings are fresh."""
        self._rates: dict[Digest, tuple[float, int, float]] = {}
        """(when, bytes present then, bytes per second) of each recording."""

    async def look(self) -> Sight:
        """All of it now."""
        began = time.monotonic()
        if self._holdings is None or began > self._stale_at:
            self._holdings = await asyncio.to_thread(_sum_up, self._view())
            self._names.clear()
            now = time.monotonic()
            self._stale_at = now + max(FRESH_S, (now - began) / SHARE_OF_TIME)
        disk, problems = await self._health.disk(), await self._health.problems()
        counters = self._recorder.counters
        return Sight(
            time.time(),
            await self._progress(),
            len(self._recorder.recordings()),
            self._holdings,
            disk,
            self._store.held_bytes,
            self._settings.max_size,
            self._settings.min_free,
            {host: self._upstream.is_up(host) for host in self._settings.registries},
            self._upstream.errors.total(),
            counters.retries,
            counters.mismatches,
            (*problems, *self._upstream.impostors.told),
            self._pulls.bypassed,
            self._tier() if self._tier is not None else None,
        )

    async def _progress(self) -> tuple[Progress, ...]:
        running = self._recorder.recordings()[:SHOWN]
        if unknown := {recording.digest for recording in running} - self._names.keys():
            self._names |= await asyncio.to_thread(_find_names, dict(self._store.manifests()), unknown)
        now, before, self._rates = time.monotonic(), self._rates, {}
        found = []
        for recording in running:
            then, had, rate = before.get(recording.digest, (now, recording.present, 0.0))
            if now > then:
                lately = max(0, recording.present - had) / (now - then)
                rate = rate + SMOOTHING * (lately - rate) if rate else lately
            self._rates[recording.digest] = (now, recording.present, rate)
            name = self._names[recording.digest]
            found.append(Progress(name, recording.present, recording.size, rate, recording.readers))
        return tuple(found)


def _sum_up(view: View) -> Holdings:
    public = {
        name: max(each.pulled for each in records) for name, records in view.models.items() if not records[0].denied
    }
    private = [size_of(view, records) for records in view.models.values() if records[0].denied]
    # Rows for all would be so many objects that collecting them holds up the event loop.
    rows = listing(view, heapq.nlargest(SHOWN, public, key=public.__getitem__))
    return Holdings(tuple(rows), len(public), len(private), sum(private), statistics(view))


def _find_names(manifests: Mapping[Name, ManifestRecord], digests: AbstractSet[Digest]) -> dict[Digest, str]:
    """For each blob a public model that lists it, or ""."""
    names = dict.fromkeys(digests, "")
    for name, record in manifests.items():
        if not record.denied:
            names |= dict.fromkeys(filter(record.lists, digests), name.typed)
    return names
