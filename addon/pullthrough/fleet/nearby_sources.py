"""The sources of one blob that are nearer than upstream: the object store, or the cache that just fetches it.

Invariant: only public blobs are looked up; a source that has failed a recording TRIES times is not asked again for it.
"""

from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.fleet.lease_holder import LeaseHolder
from pullthrough.fleet.tier import Tier
from pullthrough.store.store import Store
from pullthrough.upstream.data_stream import Source

TRIES: Final = 2
"""How many failures of the object store a recording tolerates; holders are tried one after the other."""


class NearbySources:
    """For one recording."""

    def __init__(self, tier: Tier, leases: LeaseHolder, store: Store, digest: Digest) -> None:
        self._tier = tier
        self._leases = leases
        self._store = store
        self._digest = digest
        self._failures = 0
        self._holder = ""
        """The holder of the last source, "" if that was the object store."""
        self._deposed: set[str] = set()

    @property
    def is_public(self) -> bool:
        """Whether upstream has granted the blob to everybody: the fleet shares no other blobs."""
        record = self._store.blob(self._digest)
        return record is not None and record.public

    async def source(self) -> Source | None:
        """Return the nearest source of a public blob, None if only upstream is left."""
        self._holder = ""
        if self._failures < TRIES and (source := await self._tier.source(self._digest)) is not None:
            return source
        # After wrong bytes, fetch from upstream.
        if self._digest in self._tier.suspects:
            return None
        found = await self._leases.source(self._digest, self._deposed)
        if found is None:
            return None
        self._holder, source = found
        return source

    def failed(self) -> None:
        """Note that the source did not deliver."""
        if self._holder:
            self._deposed.add(self._holder)
        else:
            self._failures += 1

    def mistrust(self) -> None:
        """Note that the recorded bytes, from whatever source, do not match the digest."""
        self._tier.mistrust(self._digest)
