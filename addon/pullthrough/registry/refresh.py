"""Look at stored tags in the background, and record what has changed before the tag moves.

Invariant: a tag is adopted only once every blob of its new manifest is here (of a list: of the children that were here
before, by runner), so a client that pulls it meanwhile gets the old model, complete and from the LAN. Only public
models that are complete here, or pinned, are checked, one at a time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError
from pullthrough.core.manifest_json import children_of, parse, preferred
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.recording.pulls import Place
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.freshness import DOWN_S, Heard
from pullthrough.registry.manifests import Manifests
from pullthrough.store.store import Store
from pullthrough.upstream.client import DEADLINE_S, Upstream
from pullthrough.upstream.data_stream import Source

_log = logging.getLogger(__name__)

IN_USE_S: Final = 30 * 86400.0
"""A model that nobody has pulled for this long is not refreshed, unless it is pinned."""

LOOKS_PER_INTERVAL: Final = 20
"""How many times per interval due tags are looked for: a tag is late by at most this fraction of the interval."""


class Refresher:
    """The stored tags of all registries."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        upstream: Upstream,
        recorder: Recorder,
        source: Callable[[Digest, Place], Awaitable[Source]],
        manifests: Manifests,
    ) -> None:
        """`source` obtains a blob's source from a place, as everybody gets it."""
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._recorder = recorder
        self._source = source
        self._manifests = manifests
        self._tried: dict[Name, float] = {}
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start refreshing, if the settings ask for it."""
        if self._settings.refresh is not None and not self._settings.offline:
            self._task = asyncio.get_running_loop().create_task(self._run(self._settings.refresh), name="refresh")

    async def close(self) -> None:
        """Stop refreshing; recordings that run belong to the recorder."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self, interval_s: float) -> None:
        while True:
            for name in list(self._due(interval_s, time.time())):
                self._tried[name] = time.time()
                try:
                    await self.refresh(name)
                except CacheError as error:
                    _log.warning("refresh of %s: %s", name, error)
            await asyncio.sleep(interval_s / LOOKS_PER_INTERVAL)

    def _due(self, interval_s: float, now: float) -> Iterator[Name]:
        for name, record in self._store.manifests().items():
            looked = max(record.confirmed, self._tried.get(name, 0.0))
            if record.denied or ":" in name.reference or now - looked < interval_s:
                continue
            # Last, because it checks the disk for each blob.
            if self._store.ledger.keeps(name, self._settings.pins) or (
                now - record.used < IN_USE_S and self._is_whole(record)
            ):
                yield name

    def _is_whole(self, record: ManifestRecord) -> bool:
        known = self._store.children()
        # The bytes of a child that is known are here, whether or not as a blob.
        needed = record.needed(known) if record.is_list else record.digests
        return bool(needed) and all(digest in known or self._store.held(digest) is not None for digest in needed)

    async def refresh(self, name: Name) -> None:
        """Check one tag, and move it once everything new is stored."""
        stored, host = self._store.manifest(name), self._settings.asked(name.host)
        if stored is None or self._upstream.down_until(host) > time.monotonic():
            return
        reply = await self._manifests.revalidate(
            name,
            self._manifests.newest_agent,
            confirm=stored,
            is_ready=partial(self._bring, name, stored),
            timeout_s=DEADLINE_S,
        )
        if reply.heard is Heard.NOTHING:
            self._upstream.mark_down(host, DOWN_S)
            _log.info("refresh of %s: %s", name, reply.cause)

    async def _bring(self, name: Name, stored: ManifestRecord, found: ManifestRecord) -> bool:
        """Record what clients of the stored manifest need of the new one; return whether all of it is here."""
        if found.body == stored.body:
            return True
        _log.info("refresh of %s: it has moved; recording what is new", name)
        for digest in await self._wanted(name, stored, found):
            if not await self._record(name, digest):
                _log.warning("refresh of %s: not all of it could be recorded; the tag stays as it is", name)
                return False
        return True

    async def _wanted(self, name: Name, stored: ManifestRecord, moved: ManifestRecord) -> list[Digest]:
        """Return what clients of the stored manifest would need of the one to which the tag has moved.

        Of a list, the children whose runners have been pulled before; else the one that most clients choose. They are
        recorded on the way. Raises CacheError if one does not come.
        """
        if not moved.is_list:
            return moved.digests
        known = self._store.children()
        runners = {
            child.runner for child in children_of(stored.body) if child.digest is None or child.digest in known
        } or {parse(stored.body).runner}
        children = children_of(moved.body)
        chosen = [child for child in children if child.runner in runners] or [*filter(None, [preferred(children)])]
        wanted: list[Digest] = []
        for child in chosen:
            wanted += [layer.digest for layer in child.layers]
            if child.digest is not None:
                obtain = partial(self._source, child.digest, name.place)
                wanted += (await self._recorder.read_manifest(child.digest, obtain)).digests
        return wanted

    async def _record(self, name: Name, digest: Digest) -> bool:
        """Return whether the blob is here and public in the end."""
        recording = await self._recorder.open_unasked(digest, partial(self._source, digest, name.place))
        if recording is not None:
            await recording.over.wait()
        return self._store.held(digest) is not None
