"""This cache as one of its fleet: what it takes from the object store, what it leases there, what it uploads."""

import logging
from collections.abc import Callable

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TierError
from pullthrough.fleet.lease_holder import LeaseHolder
from pullthrough.fleet.object_store import ObjectStore, endpoint
from pullthrough.fleet.tier import Tier
from pullthrough.fleet.uploader import Uploader
from pullthrough.runtime import platform
from pullthrough.runtime.executors import Threads
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream

_log = logging.getLogger(__name__)


class Membership:
    """The fleet's parts of one daemon."""

    def __init__(self, objects: ObjectStore, secret: bytes, store: Store, upstream: Upstream, threads: Threads) -> None:
        self.tier = Tier(objects, secret, threads, upstream)
        self.leases = LeaseHolder(self.tier, store, upstream)
        self.uploader = Uploader(self.tier, store, threads)
        self._threads = threads

    async def open(self, address_for: Callable[[str], str | None], is_recorded: Callable[[Digest], bool]) -> None:
        """Begin to upload, and to tell the fleet what is being fetched here.

        `address_for` says where our blob server is found by who reaches an address of this machine, `is_recorded`
        whether a blob is being recorded.
        """
        origin = None
        try:
            host = endpoint(await self._threads.network(self.tier.objects.sign, "leases", lifetime_s=1.0))
        except TierError as error:
            _log.warning("%s; this cache fetches for itself alone", error)
        else:
            address = await self._threads.network(platform.address_towards, *host)
            origin = address_for(address) if address is not None else None
        _log.info("the fleet's caches find this one at %s", origin or "no address")
        self.leases.open(origin, is_recorded)
        self.uploader.open()

    async def close(self) -> None:
        """Stop after the part that is being sent, and give all leases up. May be called without `open`."""
        await self.uploader.close()
        await self.leases.close()
