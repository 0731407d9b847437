"""Offload: send large parts of public blobs to presigned addresses of the fleet's object store.

A second redirect, behind the one that the registry makes: a client that does not reach the object store retries at the
canonical address, comes back, and is served here for an hour.

Only for addresses that were handed out to an Ollama which follows any redirect (`Request.follows_any_redirect`): parts
carry no version, so the address itself says so (`Capability.offload`).

Invariant: only public bytes leave, and never to an address that is not public. Does no I/O of its own.
"""

import logging
import time
from typing import Final

from pullthrough.core.cdn_loop import CDN_LOOP
from pullthrough.core.digest import Digest
from pullthrough.fleet.tier import Tier
from pullthrough.registry.messages import Request
from pullthrough.registry.redirect_failures import RedirectFailures
from pullthrough.store.store import Store

_log = logging.getLogger(__name__)

WORTHWHILE: Final = 8 << 20
"""The smallest response that is sent there: below, another connection costs more than it saves."""


class Offload:
    """The decision which parts the object store serves."""

    def __init__(self, store: Store, tier: Tier | None) -> None:
        """`tier` is the fleet's object store; None where parts are served here."""
        self._store = store
        self._tier = tier
        self._returns = RedirectFailures(_log_return)

    async def offers(self, request: Request, digest: Digest) -> bool:
        """Return whether the address given to this client may lead on to the object store."""
        if self._tier is None or not request.follows_any_redirect or not self._is_public(digest):
            return False
        return await self._tier.prepare(digest)

    def location(self, request: Request, digest: Digest, start: int, stop: int) -> str | None:
        """Return where to redirect a GET of `[start, stop)` at an offered address; None to answer it here."""
        if self._tier is None or stop - start < WORTHWHILE or not self._is_public(digest):
            return None
        # A cache that uses us as its parent asks for slices of its own.
        if request.is_transfer or CDN_LOOP.lower() in request.headers:
            return None
        address = self._tier.address(digest)
        permitted = address and self._returns.permits(request.client, (digest, start), now=time.monotonic())
        return address if permitted else None

    def _is_public(self, digest: Digest) -> bool:
        record = self._store.blob(digest)
        return record is not None and record.public


def _log_return(client: str) -> None:
    _log.info("client %s came back from the object store: it is served here for an hour", client)
