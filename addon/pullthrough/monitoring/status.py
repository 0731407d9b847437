"""The data of the status page, collected together.

Invariant: work that grows with the number of models is done in a thread, and less often the longer it takes; of private
models only the number and the size are shown.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.listing import JSON, View, beyond_text, models_of, size_of, statistics
from pullthrough.library.snapshot import with_leftovers
from pullthrough.monitoring.event_log import Event, EventLog
from pullthrough.monitoring.health import Disk, Health
from pullthrough.monitoring.model_detail import ModelDetail, find_detail
from pullthrough.monitoring.model_index import ModelIndex
from pullthrough.net.client_table import Client, ClientTable
from pullthrough.net.pull_history import Pull, PullHistory
from pullthrough.recording.pulls import Pulls
from pullthrough.recording.recorder import Recorder
from pullthrough.runtime.singleflight import SingleFlight
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.reachability import Fetching, Service, fetching

FRESH_S: Final = 5.0
"""How old the list of models and the sums may be."""
SHARE_OF_TIME: Final = 0.05
"""The largest share of time for collecting them, which takes a second for ten thousand models."""
SHOWN: Final = 50
"""How many recordings are shown one by one."""
SMOOTHING: Final = 0.3
CLIENTS: Final = 6
"""How many clients the overview shows."""
PULLS: Final = 8
"""How many pulls it shows."""
EVENTS: Final = 8
"""How many events it shows."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A blob that is being recorded."""

    model: str
    """A public model that lists it; "" if none does."""
    present: int
    size: int | None
    rate: float
    """Recent bytes per second."""
    readers: int
    """How many clients read it, however many requests each has made."""

    @property
    def left_s(self) -> float | None:
        """How long the rest takes at this rate."""
        return (self.size - self.present) / self.rate if self.size is not None and self.rate >= 1 else None


@dataclass(frozen=True, slots=True)
class ClientRow:
    """A client as a list shows it."""

    address: str
    facts: Client
    model: Name | None
    """The stored public model that it pulled last."""
    pulled: float
    """When that was, Unix seconds; 0 without such a model."""

    @property
    def version(self) -> str:
        """The version of its Ollama; "" if unknown."""
        return ".".join(map(str, self.facts.version or ()))


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is stored, and what it has saved."""

    models: ModelIndex
    """The public models."""
    private: int
    private_bytes: int
    sums: JSON
    """What `statistics` of listing returns."""

    @property
    def beyond(self) -> str:
        """What is on the disk but in no list of models."""
        return beyond_text(self.sums)


@dataclass(frozen=True, slots=True)
class Sight:
    """The data of the status page at one moment."""

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
    services: tuple[Service, ...]
    """The servers that the cache uses, as last found."""
    upstream_errors: int
    retries: int
    mismatches: int
    problems: tuple[str, ...]
    bypassed: int
    """Pulls since the start that went past the cache."""
    uptime_s: float
    clients: tuple["ClientRow", ...]
    """At most CLIENTS, the most recently seen first."""
    events: tuple[Event, ...]
    """What has happened to the cache, the newest first, at most EVENTS."""
    pulls: tuple[Pull, ...]
    """At most PULLS, of public models: those under way, then those that have ended, the latest first."""
    tier: JSON | None = None
    """The fleet's object store, as `stats` reports it."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored and nothing is being recorded."""
        return not (self.running or self.holdings.models or self.holdings.private)

    @property
    def fetching(self) -> Fetching:
        """Whether what is not stored can be fetched."""
        return fetching(self.services)


class StatusView:
    """The status of one daemon."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        upstream: Upstream,
        health: Health,
        view: Callable[[], View],
        pulls: Pulls,
        clients: ClientTable,
        history: PullHistory,
        events: EventLog,
        tier: Callable[[], JSON] | None = None,
    ) -> None:
        """`view` returns what is stored now, `tier` the state of the fleet's object store, if there is one; `pulls`
        counts the pulls past the cache."""
        self._events = events
        self._clients = clients
        self._pulls = pulls
        self._history = history
        self._tier = tier
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._upstream = upstream
        self._view = view
        self._health = health
        self._began = time.monotonic()
        self._holdings: Holdings | None = None
        self._stale_at = 0.0
        self._summing: SingleFlight[None, Holdings] = SingleFlight()
        self._names: dict[Digest, str] = {}
        """The names of the blobs that are being recorded, for as long as the holdings are fresh."""
        self._rates: dict[Digest, tuple[float, int, float]] = {}
        """(time, bytes present then, bytes per second) of each recording."""

    async def holdings(self) -> Holdings:
        """Return what is stored, at most a few seconds old; all callers share it."""
        if self._holdings is None or time.monotonic() > self._stale_at:
            return (await self._summing.join(None, self._sum_up))[0]
        return self._holdings

    async def _sum_up(self) -> Holdings:
        began = time.monotonic()
        view = await asyncio.to_thread(with_leftovers, self._view(), self._store.folder)
        self._holdings = await asyncio.to_thread(_sum_up, view)
        self._names = {}
        now = time.monotonic()
        self._stale_at = now + max(FRESH_S, (now - began) / SHARE_OF_TIME)
        return self._holdings

    def clients(self, count: int) -> Iterator[ClientRow]:
        """Yield the most recently seen clients."""
        for address, client in itertools.islice(self._clients.latest(), count):
            pulls = ((name, time) for name, time in reversed(client.pulls.items()) if self._is_public(name))
            yield ClientRow(address, client, *next(pulls, (None, 0.0)))

    def pulls(self, count: int) -> Iterator[Pull]:
        """Yield the last pulls of public models: those under way, then those that have ended, the latest first."""
        every = itertools.chain(self._history.running, self._history.recent)
        return itertools.islice((pull for pull in every if self._is_public(pull.name)), count)

    @property
    def client_count(self) -> int:
        """How many clients are remembered."""
        return len(self._clients)

    def pullers(self, name: Name) -> list[tuple[str, float]]:
        """Return the clients that pulled the model since the start, and when last (Unix seconds), the latest first."""
        found = [(address, client.pulls[name]) for address, client in self._clients.latest() if name in client.pulls]
        return sorted(found, key=lambda pull: -pull[1])

    def _is_public(self, name: Name) -> bool:
        """Return whether the model is stored and public."""
        records = [record for each in (name, name.twin) if (record := self._store.manifests().get(each)) is not None]
        return any(not record.denied for record in records)

    def model(self, text: str) -> ModelDetail | None:
        """Return the stored public model of this name; None if there is none."""
        return find_detail(self._store, (*self._settings.pins, *sorted(self._store.ledger.pins)), text)

    async def look(self) -> Sight:
        """Collect the present data."""
        holdings = await self.holdings()
        disk, problems = await self._health.disk(), await self._health.problems()
        counters = self._recorder.counters
        return Sight(
            time.time(),
            await self._progress(),
            len(self._recorder.recordings()),
            holdings,
            disk,
            self._store.held_bytes,
            self._settings.max_size,
            self._settings.min_free,
            await self._health.services(),
            self._upstream.errors.total(),
            counters.retries,
            counters.mismatches,
            tuple(problems),
            self._pulls.counts.bypassed,
            time.monotonic() - self._began,
            tuple(self.clients(CLIENTS)),
            self._events.latest(EVENTS),
            tuple(self.pulls(PULLS)),
            self._tier() if self._tier is not None else None,
        )

    async def _progress(self) -> tuple[Progress, ...]:
        running = self._recorder.recordings()[:SHOWN]
        names = self._names
        if unknown := {recording.digest for recording in running} - names.keys():
            names |= await asyncio.to_thread(_find_names, dict(self._store.manifests()), unknown)
        now, before, self._rates = time.monotonic(), self._rates, {}
        found = []
        for recording in running:
            then, had, rate = before.get(recording.digest, (now, recording.present, 0.0))
            if now > then:
                lately = max(0, recording.present - had) / (now - then)
                rate = rate + SMOOTHING * (lately - rate) if rate else lately
            self._rates[recording.digest] = (now, recording.present, rate)
            found.append(
                Progress(
                    names[recording.digest],
                    recording.present,
                    recording.size,
                    rate,
                    self._pulls.readers(recording.digest),
                )
            )
        return tuple(found)


def _sum_up(view: View) -> Holdings:
    private = [size_of(view, records) for records in view.models.values() if records[0].denied]
    return Holdings(ModelIndex(view), len(private), sum(private), statistics(view))


def _find_names(manifests: Mapping[Name, ManifestRecord], digests: AbstractSet[Digest]) -> dict[Digest, str]:
    """Return for each blob a public model that lists it, or ""."""
    public = {name: record for name, record in manifests.items() if not record.denied}
    names = {digest: name.typed for digest, name in models_of(public, digests).items()}
    return dict.fromkeys(digests, "") | names
