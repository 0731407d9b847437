"""What the daemon does for the command line about the fleet's object store.

Invariant: an object is deleted only if it is wrong, or old and in no manifest; blobs that this cache holds are uploaded
again. Every call has a time limit, so that a failing object store ends a command and never the daemon.
"""

import asyncio
import hashlib
import math
import time
from typing import Any, Final

from pullthrough.admin.command import Arguments, Change, Command, Job, Tell
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, ForgedDocument, InvalidRequest, TierError
from pullthrough.core.records import Name
from pullthrough.fleet import documents
from pullthrough.fleet.object_store import Listed
from pullthrough.fleet.tier import Tier
from pullthrough.fleet.uploader import Uploader
from pullthrough.library.listing import JSON
from pullthrough.library.maintenance import Maintenance
from pullthrough.recording.plan import Counters
from pullthrough.registry.warm import Warmer, in_words
from pullthrough.store.store import Store

LOOK_S: Final = 0.5


class FleetCommands:
    """The commands of one daemon of a fleet."""

    def __init__(
        self,
        tier: Tier,
        uploader: Uploader,
        store: Store,
        maintenance: Maintenance,
        warmer: Warmer,
        counters: Counters,
    ) -> None:
        self._tier = tier
        self._uploader = uploader
        self._store = store
        self._maintenance = maintenance
        self._warmer = warmer
        self._counters = counters

    def table(self) -> dict[str, Command]:
        return {"tier-verify": Job(self._verify), "tier-prune": Change(self._prune), "tier-warm": Job(self._warm)}

    def state(self) -> JSON:
        """Return what `stats` shows: counts since the start of the daemon."""
        counts = self._tier.counts
        return {
            "state": "left alone" if self._tier.is_open else "in use",
            "recorded_bytes": self._counters.near_bytes,
            "uploaded": counts.uploaded,
            "uploaded_bytes": counts.uploaded_bytes,
            "waiting": self._uploader.waiting,
            "manifests": counts.manifests,
            "forged": counts.forged,
            "corrupt": counts.corrupt,
            "failures": counts.failures,
        }

    async def _verify(self, _: Arguments, tell: Tell) -> Any:
        """Hash every blob there and check every signature; delete what is wrong. Return {checked, bytes, findings}."""
        findings, size = [], 0
        listed = [*await self._list(documents.BLOBS), *await self._list(documents.MANIFESTS)]
        for done, item in enumerate(listed):
            await tell({"done": done, "size": len(listed)})
            problem = await (
                self._check_blob(item) if item.key.startswith(documents.BLOBS) else self._check_manifest(item)
            )
            size += item.size
            if problem is not None:
                await self._tier.ask(self._tier.objects.delete, item.key)
                findings.append({"object": item.key, "problem": problem})
        return {"checked": len(listed), "bytes": size, "findings": findings}

    async def _check_blob(self, item: Listed) -> str | None:
        digest, hasher, offset = documents.digest_of(item.key), hashlib.sha256(), 0
        while offset < item.size:
            data = await self._tier.ask(self._tier.objects.read_part, item.key, offset, item.size)
            await asyncio.to_thread(hasher.update, data)
            offset += len(data)
        if digest is not None and hasher.hexdigest() == digest.hex:
            return None
        if digest is not None:
            self._tier.mistrust(digest)
        return f"expected its name's digest, got sha256:{hasher.hexdigest()}"

    async def _check_manifest(self, item: Listed) -> str | None:
        name = documents.name_of(item.key)
        data = await self._tier.ask(self._tier.objects.read, item.key)
        try:
            if data is not None:
                documents.unseal_manifest(data, name, self._tier.secret)
        except ForgedDocument as error:
            self._uploader.forget(name)
            return str(error)
        return None

    async def _prune(self, arguments: Arguments) -> Any:
        """Delete what is older than `age` seconds; return {models, blobs, leftovers, freed} as for the store itself.

        That is leases, and blobs in no manifest; with `all`, manifests that were uploaded that long ago too.
        """
        # The object store's clock may be ahead of ours, and its times are rounded: an age of 0 means everything.
        oldest = time.time() - age_s if (age_s := arguments.seconds("age")) else math.inf
        models, unlisted, wanted = [], [], set[Digest]()
        for item in await self._list(documents.MANIFESTS):
            name = documents.name_of(item.key)
            data = await self._tier.ask(self._tier.objects.read, item.key)
            try:
                record = documents.unseal_manifest(data, name, self._tier.secret) if data is not None else None
            except ForgedDocument:
                record = None  # for `verify --tier`
            if record is not None and arguments.flag("all") and item.changed < oldest:
                models.append((name, item))
            elif record is not None:
                wanted.update(record.digests)
        for item in await self._list(documents.BLOBS):
            digest = documents.digest_of(item.key)
            if item.changed < oldest and digest is not None and digest not in wanted:
                unlisted.append(item)
        leases = [item for item in await self._list(documents.LEASES) if item.changed < oldest]
        if not arguments.flag("dry_run"):
            for item in [*(item for _, item in models), *unlisted, *leases]:
                await self._tier.ask(self._tier.objects.delete, item.key)
        return {
            "models": [name.typed for name, _ in models],
            "blobs": len(unlisted),
            "leftovers": len(leases),
            "freed": sum(item.size for item in unlisted),
        }

    async def _warm(self, arguments: Arguments, tell: Tell) -> Any:
        """Do as `warm` does; then remove the model here, unless it was here before, once the fleet has it."""
        done = []
        for text in arguments.texts("models"):
            try:
                done.append(await self._bring(text, tell))
            except CacheError as error:
                done.append({"model": text, "error": in_words(error)})
        return done

    async def _bring(self, text: str, tell: Tell) -> JSON:
        name = Name.parse(text)
        known = self._store.manifest(name) is not None
        warmed = await self._warmer.warm(text, tell, dry_run=False)
        record = self._store.manifest(name)
        if record is None or record.denied:
            raise InvalidRequest(f"expected a public model, got {text!r}")
        while not all(digest in self._tier.there for digest in record.digests) or not self._uploader.has_told(name):
            if self._tier.is_open:
                raise TierError("the object store fails, so the model was not uploaded; it stays here")
            await asyncio.sleep(LOOK_S)
        if not known and not self._maintenance.pins_of(name):
            await self._maintenance.remove([str(name)])
        return warmed

    async def _list(self, prefix: str) -> list[Listed]:
        return await self._tier.ask(self._tier.objects.list, prefix)
