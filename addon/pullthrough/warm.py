"""Record models before anybody asks for them.

Invariant: a blob comes in through its one recording, like a client's, and a tag is stored only as upstream gives it
to everybody. One model and one blob at a time, in the manifest's order. Knows no terminal.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from pullthrough.control import Tell
from pullthrough.datastream import Source
from pullthrough.digest import Digest
from pullthrough.errors import CacheError, InvalidRequest, UpstreamRefused
from pullthrough.freshness import Heard
from pullthrough.manifests import Manifests
from pullthrough.recorder import Recorder
from pullthrough.records import ManifestRecord, Name
from pullthrough.settings import Settings
from pullthrough.store import Store
from pullthrough.upstream import DEADLINE_S

TOLD_EVERY_S: Final = 0.25


class Warmer:
    """Recordings that nobody waits for but the terminal."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        manifests: Manifests,
        source: Callable[[str, str, Digest], Awaitable[Source]],
    ) -> None:
        """`source` obtains a blob's public source from (host, repository)."""
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._manifests = manifests
        self._source = source

    async def warm(self, text: str, tell: Tell, *, dry_run: bool) -> dict[str, Any]:
        """Record one model; {model, size, missing}: bytes of it, and of what was not here. CacheError if it fails.

        Progress: {model, layer, size, done} for each blob, in bytes.
        """
        name = Name.parse(text)
        if name.host not in self._settings.registries:
            raise InvalidRequest(f"expected a model of {', '.join(self._settings.registries)}, got {text!r}")
        if self._settings.offline:
            raise InvalidRequest("expected a cache that may ask upstream, got one that is offline")
        record = await self._manifest(name, keep=not dry_run)
        missing = {digest: size for digest, size in record.sizes.items() if self._store.held(digest) is None}
        for digest, size in record.sizes.items():
            if not dry_run:
                await self._record(name, digest, size, tell)
        if not dry_run:
            self._store.touch(name, time.time())
        return {"model": name.typed, "size": sum(record.sizes.values()), "missing": sum(missing.values())}

    async def _manifest(self, name: Name, *, keep: bool) -> ManifestRecord:
        agent = self._manifests.newest_agent
        denials = self._store.denials(name.host, name.repository)
        reply = await self._manifests.hear(name, agent, timeout_s=DEADLINE_S)
        if keep and reply.heard is not Heard.NOTHING:
            self._manifests.settle(name, reply, agent, denials=denials)
        if reply.record is None:
            raise reply.cause or UpstreamRefused(reply.response.status, ())
        return reply.record

    async def _record(self, name: Name, digest: Digest, size: int, tell: Tell) -> None:
        progress = {"model": name.typed, "layer": digest.short, "size": size}
        if self._store.held(digest) is None:
            obtain = partial(self._source, name.host, name.repository, digest)
            recording = self._recorder.find(digest) or self._recorder.open(digest, obtain=obtain, wanted=True)
            while not recording.over.is_set():
                await tell({**progress, "done": recording.assembly.present.size if recording.size is not None else 0})
                try:
                    async with asyncio.timeout(TOLD_EVERY_S):
                        await recording.over.wait()
                except TimeoutError:
                    continue
            if self._store.held(digest) is None:
                raise CacheError(f"expected {digest} to be recorded, got a failure; the cache's log has more")
        elif (known := self._store.blob(digest)) is None or not known.public:
            await self._source(name.host, name.repository, digest)
        await tell({**progress, "done": size})
