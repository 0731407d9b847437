"""Probes of servers that have not been used for a while, so that their reported state is never old.

Invariant: a server that a pull has asked within EVERY_S is left alone, and none is asked while `offline` forbids it. A
probe costs the server next to nothing: a `GET /v2/`, a TLS connection without a request, a HEAD of one object. The
probes of many caches do not coincide.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from pullthrough.core.errors import CacheError
from pullthrough.fleet.tier import Tier
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.reachability import OBJECT_STORE, OFFLINE, Reachability, Role, Service

_log = logging.getLogger(__name__)

EVERY_S: Final = 60.0
SPREAD: Final = 0.2
"""The fraction by which a pause is randomly shorter or longer."""
PATIENCE_S: Final = 1.0
"""How long a caller waits for the first probe of a server."""
LOOK_S: Final = 20.0
"""How long a probe may take."""

Look = Callable[[], Awaitable[object]]


class Probes:
    """The probes, which run from `open` until `close`."""

    def __init__(self, reachability: Reachability, looks: Mapping[str, Look], *, every_s: float = EVERY_S) -> None:
        """`looks` are by the server's name; each asks the server once and reports the result to `reachability`."""
        self._reachability = reachability
        self._looks = looks
        self._every_s = every_s
        self._wanted = {name: asyncio.Event() for name in looks}
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Start probing."""
        loop = asyncio.get_running_loop()
        self._tasks += [loop.create_task(self._run(name), name=f"look at {name}") for name in self._looks]

    async def close(self) -> None:
        """Stop probing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def services(self) -> tuple[Service, ...]:
        """Return what is known of each server. One that was never asked is probed first, within PATIENCE_S."""
        unknown = [name for name in self._looks if self._is_unknown(name)]
        for name in unknown:
            self._wanted[name].set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while any(map(self._is_unknown, unknown)):
                    await self._reachability.news()
        return self._reachability.services

    def _is_unknown(self, name: str) -> bool:
        service = self._reachability.find(name)
        return service is not None and service.asked is None

    async def _run(self, name: str) -> None:
        pause_s = self._every_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s * random.uniform(1 - SPREAD, 1 + SPREAD)):  # noqa: S311
                    await self._wanted[name].wait()
            if not self._wanted[name].is_set() and (quiet_s := self._reachability.quiet_s(name)) < self._every_s:
                pause_s = self._every_s - quiet_s
                continue
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._looks[name]()
            except (CacheError, TimeoutError) as error:
                _log.debug("a look at %s: %s", name, error)  # already noted
            except Exception:
                # If the probes ended, the reported state of this server would never change again.
                _log.exception("a look at %s failed; it is tried again", name)
            self._wanted[name].clear()
            pause_s = self._every_s


def looks_at(upstream: Upstream, tier: Tier | None) -> dict[str, Look]:
    """Return a probe for each server that may be asked."""
    looks: dict[str, Look] = {}
    for service in upstream.reachability.services:
        if service.role is Role.OBJECT_STORE and tier is not None:
            looks[OBJECT_STORE] = tier.knock
        elif service.why != OFFLINE and service.role is Role.REGISTRY:
            looks[service.host] = partial(upstream.ask, "GET", service.host, "/v2/", {}, timeout_s=LOOK_S)
        elif service.why != OFFLINE and service.role is Role.BLOB_HOST:
            looks[service.host] = partial(upstream.knock, service.host)
    return looks
