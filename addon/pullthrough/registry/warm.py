"""Record models before anybody asks for them, for clients that take manifest lists and for those that do not.

Invariant: a blob comes in through its one recording, as for a client, and a tag is stored only as upstream gives it to
everybody. One model and one blob at a time, in the manifest's order.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, InvalidRequest, UpstreamError, UpstreamRefused
from pullthrough.core.manifest_json import children_of, preferred
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.recording.pulls import Place
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.manifests import Manifests
from pullthrough.store.store import Store
from pullthrough.upstream.client import DEADLINE_S
from pullthrough.upstream.data_stream import Source

TOLD_EVERY_S: Final = 0.25

Tell = Callable[[Mapping[str, Any]], Awaitable[None]]
"""Send a progress object to the caller."""


def in_words(error: CacheError) -> str:
    """Say why a model was not recorded; a missing model in the words of `ollama pull` (server/images.go)."""
    if isinstance(error, UpstreamRefused) and error.status_hint == 404:
        return "pull model manifest: file does not exist (the registry answered 404)"
    return str(error)


class Warmer:
    """Recordings that only the command line waits for."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        source: Callable[[Digest, Place], Awaitable[Source]],
        manifests: Manifests,
    ) -> None:
        """`source` obtains a blob's source from a place, as everybody gets it."""
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._source = source
        self._manifests = manifests

    async def warm(self, text: str, tell: Tell, *, dry_run: bool) -> dict[str, Any]:
        """Record one model; return {model, size, missing}: its bytes, and those that were not here. CacheError if it
        fails.

        Progress: {model, layer, size, done} for each blob, in bytes.
        """
        name = Name.parse(text)
        if self._settings.asked(name.host) not in self._settings.registries:
            raise InvalidRequest(f"expected a model of {', '.join(self._settings.registries)}, got {text!r}")
        if self._settings.offline:
            raise InvalidRequest("the cache is offline (option ollama_cache_offline): it asks no registry")
        sizes: dict[Digest, int] = {}
        brought: set[Digest] = set()
        for record in await self._manifests_of(name, keep=not dry_run):
            sizes |= await self._wanted(name, record, brought, dry_run=dry_run)
        missing = sum(size for digest, size in sizes.items() if digest in brought or self._store.held(digest) is None)
        if not dry_run:
            for digest, size in sizes.items():
                await self._record(name, digest, size, tell)
            for each in (name, name.twin):
                if self._store.manifest(each) is not None:
                    self._store.touch(each, time.time(), by_client=False)
        return {"model": name.typed, "size": sum(sizes.values()), "missing": missing}

    async def _wanted(
        self, name: Name, record: ManifestRecord, brought: set[Digest], *, dry_run: bool
    ) -> dict[Digest, int]:
        """Return the blobs that clients need of a manifest, or of the child of a list that most of them choose.

        The child is recorded to see what it lists, which adds it to `brought`; for a `dry_run` only one that is here
        counts.
        """
        child = preferred(children_of(record.body)) if record.is_list else None
        if child is None:
            return {digest: size for digest, size in record.sizes.items() if size is not None}
        if child.digest is None:
            return {layer.digest: layer.size for layer in child.layers}
        manifest = self._store.read_manifest(child.digest)
        if manifest is None and dry_run:
            return {}
        if manifest is None:
            manifest = await self._recorder.read_manifest(child.digest, partial(self._source, child.digest, name.place))
            brought.add(child.digest)
        return {child.digest: len(manifest.body), **(await self._wanted(name, manifest, brought, dry_run=dry_run))}

    async def _manifests_of(self, name: Name, *, keep: bool) -> list[ManifestRecord]:
        """Return what clients that take lists and others get. Raises UpstreamError if neither gets anything."""
        found: list[ManifestRecord] = []
        problems: list[CacheError] = []
        for each in (name, name.twin):
            try:
                found.append(await self._manifest(each, keep=keep))
            except UpstreamError as error:
                problems.append(error)
        if not found:
            raise problems[0]
        return found

    async def _manifest(self, name: Name, *, keep: bool) -> ManifestRecord:
        agent = self._manifests.newest_agent
        ask = self._manifests.revalidate if keep else self._manifests.hear
        reply = await ask(name, agent, timeout_s=DEADLINE_S)
        if reply.record is None:
            raise reply.cause or UpstreamRefused(reply.response.status, ())
        return reply.record

    async def _record(self, name: Name, digest: Digest, size: int, tell: Tell) -> None:
        progress = {"model": name.typed, "layer": digest.short, "size": size}
        recording = await self._recorder.open_unasked(digest, partial(self._source, digest, name.place))
        if recording is not None:
            while not recording.over.is_set():
                await tell({**progress, "done": recording.present})
                try:
                    async with asyncio.timeout(TOLD_EVERY_S):
                        await recording.over.wait()
                except TimeoutError:
                    continue
            if self._store.held(digest) is None:
                raise CacheError(f"expected {digest} to be recorded, got a failure; the cache's log has more")
        await tell({**progress, "done": size})
