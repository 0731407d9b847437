"""Where a client that may fetch a blob's bytes past this proxy is sent: to the registry's own address.

Such an address works both ways. A client that fetches parts past every proxy reaches the real object store with it; one
that uses us as its proxy there too comes back here, where the address is recognised. So there is no need to know which
kind a client is.

Invariant: an address is handed out exactly as the registry gave it, and only to callers who may have it; one obtained
with a caller's credentials is given to that caller alone. The registry is asked once for all who wait, and not at all
while an address has half a day left. Sends no bytes, and starts a recording only where a registry answers with the
bytes themselves.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Final

from yarl import URL

from pullthrough.config.settings import Settings
from pullthrough.core import presigned
from pullthrough.core.digest import Digest
from pullthrough.core.errors import UpstreamError, UpstreamRefused, UpstreamTimeout, UpstreamUnreachable
from pullthrough.core.routes import BlobRoute
from pullthrough.net.client_acl import credential_key
from pullthrough.registry.freshness import DOWN_S, REVALIDATE_TIMEOUT_S
from pullthrough.registry.grants import Grant, Grants, Pair
from pullthrough.registry.messages import Request
from pullthrough.registry.signed_urls import SignedUrls
from pullthrough.runtime.clock import lasting
from pullthrough.runtime.singleflight import SingleFlight
from pullthrough.upstream.client import DENIED, PRIVATE, Upstream
from pullthrough.upstream.impostors import TOO_MANY_REQUESTS

_log = logging.getLogger(__name__)

SHARED_S: Final = 12 * 3600.0
"""The lifetime an address must have left to be handed out without asking: a client cannot refresh it during a pull."""

LAST_S: Final = 600.0
"""The lifetime it must have left when the registry does not answer."""

PATIENCE_S: Final = 15.0
"""How long to wait for the registry where only its own address will do: less than the whole answer may take, so that a
remembered address, or the reason why there is none, still reaches the client."""

UNDATED_S: Final = 600.0
"""The assumed lifetime of an address that states none: hf.co's tokens live exactly this long."""

AHEAD: Final = 16
"""How many addresses are obtained ahead for one manifest."""
AHEAD_AT_ONCE: Final = 4
QUIET_S: Final = 600.0
"""How long no addresses are obtained ahead from a registry that answered 429, or with short-lived addresses."""

Key = tuple[str, str, Digest, bytes]


class Redirects:
    """The registry's own addresses, for all clients that may bypass this proxy."""

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        grants: Grants,
        addresses: SignedUrls,
        record: Callable[[Digest, Grant], Awaitable[object]],
    ) -> None:
        """`record` starts a recording where a registry answers with the bytes themselves."""
        self._settings = settings
        self._upstream = upstream
        self._grants = grants
        self._addresses = addresses
        self._record = record
        self._asking: SingleFlight[Key, str | None] = SingleFlight()
        self._ahead: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._quiet_until: dict[str, float] = {}
        """By registry."""
        self._warned: set[str] = set()

    async def location(self, request: Request, pair: Pair, *, held: bool, fresh: bool = False) -> str | None:
        """Return the registry's own address of the blob; None if there is none, and ours must do.

        With `fresh`, a remembered one will not do while the registry answers. `held` says that this caller may have the
        blob and that its size is known. Raises UpstreamError if the registry gives no address and ours cannot be used.
        """
        if not fresh and (address := self._shared(request, pair, left_s=SHARED_S)):
            return address
        # Ours is useless to a client that is known to bypass us: it waits for the registry as long as it can.
        has_other = held and not request.is_known_to_bypass
        try:
            if not self._upstream.is_up(request.host) and (has_other or self._shared(request, pair, left_s=LAST_S)):
                raise UpstreamUnreachable(f"{request.host} has not answered lately")
            async with asyncio.timeout(REVALIDATE_TIMEOUT_S if has_other else PATIENCE_S):
                return await self._obtain(request, pair)
        except TimeoutError:
            problem: UpstreamError = UpstreamTimeout("no answer in time")
        except UpstreamError as error:
            problem = error
        if isinstance(problem, UpstreamRefused) and problem.status_hint in DENIED:
            # Withdrawn (404) does not mean refused: the stored blob is still served.
            if problem.status_hint in PRIVATE or not held:
                raise problem
        elif isinstance(problem, UpstreamTimeout | UpstreamUnreachable) and held and not self._settings.offline:
            self._upstream.mark_down(request.host, DOWN_S)
        if address := self._shared(request, pair, left_s=LAST_S):
            return address
        if held:
            return None
        raise problem

    def prepare(self, request: Request, repository: str, digests: Iterable[Digest]) -> None:
        """Obtain the addresses of a public manifest's layers in the background: the client asks for these next."""
        place = (request.host, repository)
        now = lasting()
        missing = [each for each in digests if self._addresses.shared(each, left_s=SHARED_S, now=now) is None]
        idle = place not in self._ahead and time.monotonic() >= self._quiet_until.get(request.host, 0.0)
        if missing and idle and not self._settings.offline and self._upstream.is_up(request.host):
            anonymous = replace(
                request, headers={name: value for name, value in request.headers.items() if name != "authorization"}
            )
            work = self._prepare(anonymous, repository, missing[:AHEAD])
            task = asyncio.get_running_loop().create_task(work, name=f"addresses of {repository}")
            self._ahead[place] = task
            task.add_done_callback(lambda _: self._ahead.pop(place, None))

    async def close(self) -> None:
        """Stop obtaining addresses ahead."""
        tasks = list(self._ahead.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prepare(self, request: Request, repository: str, digests: list[Digest]) -> None:
        # On loops that run tasks eagerly the caller must have registered this one.
        await asyncio.sleep(0)
        places = asyncio.Semaphore(AHEAD_AT_ONCE)
        over = asyncio.Event()

        async def obtain(digest: Digest) -> None:
            async with places:
                if over.is_set():
                    return
                try:
                    await self._obtain(request, BlobRoute(repository, digest), ahead=True)
                    if self._addresses.shared(digest, left_s=SHARED_S, now=lasting()) is None:
                        # This registry gives only short-lived addresses.
                        over.set()
                        self._quiet_until[request.host] = time.monotonic() + QUIET_S
                except UpstreamError as error:
                    over.set()
                    if isinstance(error, UpstreamRefused) and error.status_hint == TOO_MANY_REQUESTS:
                        self._quiet_until[request.host] = time.monotonic() + max(QUIET_S, error.retry_after_s)
                    _log.info("addresses of %s: %s; the rest is left to the client's own requests", repository, error)

        await asyncio.gather(*map(obtain, digests))

    def _shared(self, request: Request, pair: Pair, *, left_s: float) -> str | None:
        """Return a remembered address of a public blob."""
        if not self._grants.is_public(request.host, pair):
            return None
        return self._addresses.shared(pair.digest, left_s=left_s, now=lasting())

    async def _obtain(self, request: Request, pair: Pair, *, ahead: bool = False) -> str | None:
        key = (request.host, pair.repository, pair.digest, credential_key(request.authorization))
        address, _ = await self._asking.join(key, lambda: self._ask(request, pair, ahead=ahead))
        return address

    async def _ask(self, request: Request, pair: Pair, *, ahead: bool) -> str | None:
        """Ask the registry once, and share its answer. A request `ahead` of the client records nothing."""
        stop = 1 if ahead else None
        grant = await self._grants.obtain(request, pair, look=1, stop=stop, hands_on=self._is_foreign)
        location = grant.location
        if location is not None and self._is_foreign(location):
            if grant.stream is not None:
                grant.stream.close()
            self._warn(request.host, location)
            return location
        now = lasting()
        expires = presigned.expiry(location, now=now) if location is not None else None
        is_recognisable = location is not None and self._is_recognisable(request.host, location, expires)
        if not is_recognisable and not ahead:
            await self._record(pair.digest, grant)
            return None
        if grant.stream is not None:
            grant.stream.close()
        if location is None or not is_recognisable:
            return None
        until = expires if expires is not None else now + UNDATED_S
        self._addresses.add(pair.digest, location, expires=until, public=grant.public, obtain=grant.again, now=now)
        return location

    def _is_foreign(self, location: str) -> bool:
        """Return whether it leads to a host that is not intercepted, by a name that clients accept in a redirect.

        A plain http or numeric address belongs to a parent cache or a mirror on the LAN, and clients refuse it.
        """
        there = URL(location, encoded=True)
        host = (there.host or "").lower()
        is_name = "." in host and ":" not in host and not host.replace(".", "").isdecimal()
        is_ours = host in self._settings.intercepted and there.port == 443
        return there.scheme == "https" and is_name and not is_ours

    def _is_recognisable(self, registry: str, location: str, expires: float | None) -> bool:
        """Return whether a request for it would come back here through this proxy, and would be answered if sent
        directly.
        """
        there = URL(location, encoded=True)
        host = (there.host or "").lower()
        if there.scheme != "https" or there.port != 443 or host == registry:
            return False
        # Without the object store's signature it is another cache's address, which the real blob host would refuse.
        if host == self._settings.blob_host:
            return expires is not None
        # An address without a query is requested like any other of that registry.
        return host in self._settings.intercepted and bool(there.raw_query_string)

    def _warn(self, registry: str, location: str) -> None:
        host = URL(location, encoded=True).host or ""
        if host not in self._warned:
            self._warned.add(host)
            _log.warning(
                "%s redirects blobs to %s, which is not intercepted: such pulls cannot be cached; "
                "set ollama_cache_blob_host, or add the host to ollama_cache_registries",
                registry,
                host,
            )
