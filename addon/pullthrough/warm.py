"""Record models before anybody asks for them.

Invariant: a blob comes in through its one recording, like a client's, and a tag is stored only as upstream gives it
to everybody. One model and one blob at a time, in the manifest's order. Knows no terminal.
"""

import asyncio
import time
from typing import Any, Final

from pullthrough.ahead import Ahead
from pullthrough.control import Tell
from pullthrough.digest import Digest
from pullthrough.errors import CacheError, InvalidRequest, UpstreamRefused
from pullthrough.freshness import Heard
from pullthrough.manifests import Manifests
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
        ahead: Ahead,
        manifests: Manifests,
    ) -> None:
        self._settings = settings
        self._store = store
        self._ahead = ahead
        self._manifests = manifests

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
        missing = {digest: size or 0 for digest, size in record.sizes.items() if self._store.held(digest) is None}
        for digest, size in record.sizes.items():
            if not dry_run:
                await self._record(name, digest, size or 0, tell)
        if not dry_run:
            self._store.touch(name, time.time())
        return {"model": name.typed, "size": record.size, "missing": sum(missing.values())}

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
        if (recording := await self._ahead.begin(name.host, name.repository, digest)) is not None:
            while not recording.over.is_set():
                await tell({**progress, "done": recording.assembly.present.size if recording.size is not None else 0})
                try:
                    async with asyncio.timeout(TOLD_EVERY_S):
                        await recording.over.wait()
                except TimeoutError:
                    continue
            if self._store.held(digest) is None:
                raise CacheError(f"expected {digest} to be recorded, got a failure; the cache's log has more")
        await tell({**progress, "done": size})
