"""Direct mode: which requests for a blob's bytes are sent on to the blob server, past TLS.

A second redirect, behind the one that the registry makes: whichever way a client takes, it retries at the canonical
address, so a client that does not reach the blob server loses one try of one part.

With `direct=object-store` the same parts go to signed addresses of the fleet's object store, as long as the client
does not come back for one.

Invariant: only public bytes leave TLS, and nobody is sent on twice. Knows no socket, and not how bytes are sent.
"""

import logging
import time
from typing import Final

from pullthrough import capability
from pullthrough.clock import lasting
from pullthrough.digest import Digest
from pullthrough.exchange import Request
from pullthrough.loopguard import CDN_LOOP
from pullthrough.returns import Returns
from pullthrough.route import parse_canonical_target
from pullthrough.settings import Direct, Settings
from pullthrough.store import Store
from pullthrough.tier import Tier
from pullthrough.trials import Trials

_log = logging.getLogger(__name__)

WORTHWHILE: Final = 8 << 20
"""Bytes of a response; below, another connection costs more than TLS does."""


class Director:
    """Sends on those who may leave, and hears of those who have come."""

    def __init__(self, settings: Settings, store: Store, tier: Tier | None = None) -> None:
        self._mode = settings.direct
        self._store = store
        self._tier = tier if settings.direct is Direct.OBJECT_STORE else None
        self._trials = Trials(_tell)
        self._returns = Returns(_tell_return)

    async def prepare(self, digest: Digest) -> None:
        """A client has been given the canonical address of the blob, and will soon ask for parts of it."""
        if self._tier is not None:
            await self._tier.prepare(digest)

    def location(self, request: Request, digest: Digest, start: int, stop: int) -> str | None:
        """Where to send a GET of `[start, stop)` at the canonical address; None to answer it here."""
        if not request.direct or self._mode is Direct.OFF or stop - start < WORTHWHILE:
            return None
        # x/transfer takes a redirect of its data request for an error (x/transfer/download.go, v0.14.0 to today).
        # A cache that has us for its parent asks in slices, and follows a redirect to public addresses only.
        if request.is_transfer or CDN_LOOP.lower() in request.headers:
            return None
        record = self._store.blob(digest)
        if record is None or not record.public:
            return None
        if self._tier is not None:
            address = self._tier.address(digest)
            sent = address and self._returns.permits(request.client, (digest, start), now=time.monotonic())
            return address if sent else None
        if self._mode is Direct.AUTO and not self._trials.permits(request.client, now=time.monotonic()):
            return None
        return request.direct + request.target

    def arrived(self, request: Request) -> None:
        """A request with a valid capability has come; only those that came to the blob server count."""
        if request.direct == "":
            self._trials.arrived(request.client, now=time.monotonic())

    def is_ours(self, target: str) -> bool:
        """Whether a client was sent to `target` from here, under whatever host and port it asks for it."""
        route = parse_canonical_target(target)
        if route is None:
            return False
        granted = capability.verify(route.query, route.digest, secret=self._store.secret, now=lasting())
        return granted is not None


def _tell(client: str, reaches: bool) -> None:
    if reaches:
        _log.info("client %s reaches the blob server: large parts go there directly", client)
    else:
        _log.info("client %s did not reach the blob server: its parts stay in TLS for an hour", client)


def _tell_return(client: str) -> None:
    _log.info("client %s came back from the object store: its parts stay in TLS for an hour", client)
