"""Let one cache of a fleet fetch a blob from upstream, while the others record it from that one.

Invariant: if the object store does not answer, every cache fetches for itself; a lease is held while the recording runs
and until the blob is uploaded, and no longer.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Final

from pullthrough.core import capability
from pullthrough.core.digest import Digest
from pullthrough.core.errors import ForgedDocument, TierError
from pullthrough.core.routes import canonical_path
from pullthrough.fleet import documents
from pullthrough.fleet.lease import GENERATIONS, LIFETIME_S, RENEW_S, Lease, Step, decide
from pullthrough.fleet.object_store import endpoint
from pullthrough.fleet.tier import Tier
from pullthrough.runtime.clock import lasting
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.data_stream import Source

_log = logging.getLogger(__name__)

WORTHWHILE: Final = 8 << 20
"""The smallest blob that takes a lease: for a smaller one, asking takes longer than fetching."""


class LeaseHolder:
    """The leases of one daemon. `open` it inside the running loop, `close` it at the end."""

    def __init__(self, tier: Tier, store: Store, upstream: Upstream) -> None:
        self.node = secrets.token_hex(8)
        self._tier = tier
        self._store = store
        self._upstream = upstream
        self._held: dict[Digest, int] = {}
        """The numbers of our leases."""
        self._origin: str | None = None
        self._recording: Callable[[Digest], bool] = lambda _: False
        self._task: asyncio.Task[None] | None = None

    def open(self, origin: str | None, recording: Callable[[Digest], bool]) -> None:
        """`origin` is the address of our blob server for the fleet, None if it has none; `recording` returns what is
        being recorded."""
        self._origin = origin
        self._recording = recording
        self._task = asyncio.get_running_loop().create_task(self._run(), name="renew leases")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for digest in list(self._held):
            await self._give_up(digest)

    async def source(self, digest: Digest, deposed: Collection[str]) -> tuple[str, Source] | None:
        """Return (the holder's name, where it has the blob); None if this cache is to ask upstream itself."""
        if digest in self._held or self._origin is None:
            return None
        claims = (each.claim(digest) for each in self._store.manifests().values() if each.lists(digest))
        size = next(filter(None, claims), 0)
        if 0 < size < WORTHWHILE:
            return None
        try:
            return await self._find(digest, size, deposed)
        except TierError as error:
            _log.debug("lease of %s: %s", digest.short, error)
            return None

    async def _find(self, digest: Digest, size: int, deposed: Collection[str]) -> tuple[str, Source] | None:
        for number in range(1, GENERATIONS + 1):
            key = documents.lease_key(digest, number)
            if await self._tier.ask(self._tier.objects.create, key, self._document(key)):
                self._held[digest] = number
                return None
            lease = await self._read(key)
            match decide(lease, node=self.node, deposed=deposed, now=time.time()):
                case Step.HOLD:
                    return None
                case Step.FOLLOW if lease is not None:
                    _log.info("%s is recorded from %s", digest.short, lease.origin)
                    self._upstream.admit(*endpoint(lease.origin))
                    granted = capability.Capability(digest, size, int(lasting()) + capability.LIFETIME_S)
                    query = granted.to_query(documents.capability_secret(self._tier.secret))
                    return lease.node, Source(f"{lease.origin}{canonical_path(digest)}?{query}", near=True)
        return None

    async def _read(self, key: str) -> Lease | None:
        data = await self._tier.ask(self._tier.objects.read, key)
        try:
            return Lease(**documents.unseal(data, key, self._tier.secret)) if data is not None else None
        except ForgedDocument as error:
            self._tier.refuse(error)
            return None

    def _document(self, key: str) -> bytes:
        lease = Lease(self.node, self._origin or "", time.time() + LIFETIME_S)
        return documents.seal(asdict(lease), key, self._tier.secret)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            for digest, number in list(self._held.items()):
                waits = self._store.held(digest) is not None and digest not in self._tier.there
                if not waits and not self._recording(digest):
                    await self._give_up(digest)
                    continue
                key = documents.lease_key(digest, number)
                try:
                    await self._tier.ask(self._tier.objects.replace, key, self._document(key))
                except TierError as error:
                    _log.debug("lease of %s: %s", digest.short, error)

    async def _give_up(self, digest: Digest) -> None:
        """Delete the lease, and those before it whose holders have failed."""
        try:
            for number in range(self._held.pop(digest), 0, -1):
                await self._tier.ask(self._tier.objects.delete, documents.lease_key(digest, number))
        except TierError as error:
            _log.debug("lease of %s: %s; it expires", digest.short, error)
