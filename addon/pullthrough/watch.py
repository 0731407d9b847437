"""What a person who watches the cache wants to see, looked up together.

Invariant: what grows with the number of models is looked at in a thread, and no more than once in FRESH_S; of private
models nothing is told but how many there are and how big. Knows the daemon's parts and no page.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pullthrough.catalogue import JSON
from pullthrough.digest import Digest
from pullthrough.recorder import Recorder
from pullthrough.records import ManifestRecord, Name
from pullthrough.settings import Settings
from pullthrough.store import Store
from pullthrough.upstream import Upstream
from pullthrough.verbs import Verbs
from pullthrough.vitals import Disk, Vitals

FRESH_S: Final = 5.0
"""How old the list of models and the sums may be."""
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


class Watch:
    """Over one daemon."""

    def __init__(
        self, settings: Settings, store: Store, recorder: Recorder, upstream: Upstream, verbs: Verbs, vitals: Vitals
    ) -> None:
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._upstream = upstream
        self._verbs = verbs
        self._vitals = vitals
        self._holdings: Holdings | None = None
        self._held_at = 0.0
        self._rates: dict[Digest, tuple[float, int, float]] = {}
        """(when, bytes present then, bytes per second) of each recording."""

    async def look(self) -> Sight:
        """All of it now."""
        if self._holdings is None or time.monotonic() - self._held_at > FRESH_S:
            self._held_at = time.monotonic()
            self._holdings = _holdings(await self._verbs.models(), await self._verbs.sums())
        disk, problems = await self._vitals.disk(), await self._vitals.problems()
        counters = self._recorder.counters
        return Sight(
            time.time(),
            await self._progress(),
            len(self._recorder.running()),
            self._holdings,
            disk,
            self._store.held_bytes,
            self._settings.max_size,
            self._settings.min_free,
            {host: self._upstream.is_up(host) for host in self._settings.registries},
            self._upstream.errors.total(),
            counters.retries,
            counters.mismatches,
            tuple(problems),
        )

    async def _progress(self) -> tuple[Progress, ...]:
        running = self._recorder.running()[:SHOWN]
        manifests = dict(self._store.manifests()) if running else {}
        names = await asyncio.to_thread(_names, manifests, [recording.digest for recording in running])
        now, before, self._rates = time.monotonic(), self._rates, {}
        found = []
        for recording in running:
            then, had, rate = before.get(recording.digest, (now, recording.present, 0.0))
            if now > then:
                lately = max(0, recording.present - had) / (now - then)
                rate = rate + SMOOTHING * (lately - rate) if rate else lately
            self._rates[recording.digest] = (now, recording.present, rate)
            name = names.get(recording.digest, "")
            found.append(Progress(name, recording.present, recording.size, rate, recording.readers))
        return tuple(found)


def _holdings(rows: list[JSON], sums: JSON) -> Holdings:
    public = [row for row in rows if row["visibility"] == "public"]
    private = [row["size"] for row in rows if row["visibility"] != "public"]
    return Holdings(tuple(public[:SHOWN]), len(public), len(private), sum(private), sums)


def _names(manifests: Mapping[Name, ManifestRecord], digests: Iterable[Digest]) -> dict[Digest, str]:
    """A public model that lists the blob, for those that have one."""
    names: dict[Digest, str] = {}
    wanted = set(digests)
    for name, record in manifests.items():
        if not record.denied:
            names |= dict.fromkeys(wanted & record.sizes.keys(), name.typed)
    return names
