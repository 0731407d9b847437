"""Whether the servers that this cache uses answer: the registries, the blob host, the fleet's object store.

The one source for the status page, the metrics, `/readyz`, `stats` and the doctor.

Invariant: a server is up because it has answered, and down because an attempt to ask it failed for the given reason; a
failed attempt that began before the last answer proves nothing. No reason quotes an address with a query.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from pullthrough.config.settings import Settings
from pullthrough.core.access_log import SHOWN
from pullthrough.core.errors import AddressRefused, Offline, TierError, UpstreamTimeout, UpstreamUnreachable

_log = logging.getLogger(__name__)

OBJECT_STORE: Final = "object store"
"""The object store's name here, whatever its URL."""
OFFLINE: Final = "offline"
_FAILURES: Final = (UpstreamUnreachable, UpstreamTimeout, AddressRefused, TierError)
NOBODY: Final = "nobody has needed it since the start"


class Role(StrEnum):
    """What a server is to the cache."""

    REGISTRY = "registry"
    BLOB_HOST = "blob host"
    OBJECT_STORE = "object store"


class State(StrEnum):
    """What is known of a server."""

    UP = "up"
    DOWN = "down"
    NOT_ASKED = "not asked"


class Fetching(StrEnum):
    """Whether what is not stored can be fetched."""

    YES = "yes"
    PARTLY = "in part"
    NO = "no"
    UNKNOWN = "not known yet"


@dataclass(frozen=True, slots=True)
class Service:
    """A server, as it was last found."""

    role: Role
    host: str
    state: State = State.NOT_ASKED
    why: str = ""
    """Why the server is down, or has not been asked."""
    since: float | None = None
    """When it entered this state, Unix seconds; None before it was first asked."""
    asked: float | None = None
    """When it was last found so, Unix seconds."""

    def __str__(self) -> str:
        since = f" since {datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M:%S} UTC" if self.since else ""
        return f"{self.role} {self.host}: {self.state}{since}{f', {self.why}' if self.why else ''}"


class Reachability:
    """What is known of each server."""

    def __init__(self, settings: Settings) -> None:
        why = OFFLINE if settings.offline else NOBODY
        found = [Service(Role.REGISTRY, host, why=why) for host in settings.registries]
        if settings.blob_host not in settings.registries:
            found.append(Service(Role.BLOB_HOST, settings.blob_host, why=why))
        self._services = {service.host: service for service in found}
        if settings.object_store is not None:
            # The option `offline` does not apply to it.
            self._services[OBJECT_STORE] = Service(Role.OBJECT_STORE, settings.object_store, why=NOBODY)
        self._heard: dict[str, float] = {}
        """Monotonic seconds of the last answer or failure."""
        self._answered: dict[str, float] = {}
        """Monotonic seconds of the last answer."""
        self._news = asyncio.Event()

    @property
    def services(self) -> tuple[Service, ...]:
        """All servers: the registries, the blob host, the object store."""
        return tuple(self._services.values())

    def find(self, name: str) -> Service | None:
        """Return a server by its host name or OBJECT_STORE; None for any other host."""
        return self._services.get(name)

    def quiet_s(self, name: str) -> float:
        """Return how long ago a server last answered or failed, in seconds; infinity if it never has."""
        return time.monotonic() - self._heard.get(name, -math.inf)

    async def news(self) -> None:
        """Wait until a server answers or fails."""
        self._news.clear()
        await self._news.wait()

    @contextlib.contextmanager
    def asking(self, name: str) -> Iterator[None]:
        """Note a failure to ask a server that leaves the block."""
        began = time.monotonic()
        try:
            yield
        except Offline:
            raise
        except _FAILURES as error:
            self.failed(name, str(error).removeprefix(f"{name}: "), began=began)
            raise

    def answered(self, name: str, status: int = 200) -> None:
        """Note that a server has answered. A status of 500 or above says that it cannot serve."""
        if status >= 500:
            self.failed(name, f"it answers {status}")
            return
        self._answered[name] = time.monotonic()
        self._note(name, State.UP, "")

    def failed(self, name: str, why: str, *, began: float = math.inf) -> None:
        """Note that an attempt to ask a server has failed, which began at `began` (monotonic seconds)."""
        if self._answered.get(name, -math.inf) < began:
            self._note(name, State.DOWN, why)

    def _note(self, name: str, state: State, why: str) -> None:
        before = self._services.get(name)
        if before is None:
            return
        now = time.time()
        self._heard[name] = time.monotonic()
        self._news.set()
        changed = state is not before.state
        self._services[name] = replace(before, state=state, why=why, since=now if changed else before.since, asked=now)
        if changed and state is State.DOWN:
            _log.info("%s %s is down: %s", before.role, before.host, why, extra=SHOWN)
        elif changed and before.state is State.DOWN:
            down_s = now - (before.since or now)
            _log.info("%s %s is up again, after %.0f s", before.role, before.host, down_s, extra=SHOWN)


def fetching(services: Iterable[Service]) -> Fetching:
    """Return whether what is not stored can be fetched, as far as is known.

    The object store does not count: upstream has everything that it has.
    """
    registries = {service.state for service in services if service.role is Role.REGISTRY}
    blob_hosts = {service.state for service in services if service.role is Role.BLOB_HOST}
    if State.DOWN in registries | blob_hosts:
        return Fetching.PARTLY if State.UP in registries and State.DOWN not in blob_hosts else Fetching.NO
    if State.UP in registries:
        return Fetching.YES
    is_offline = any(service.why == OFFLINE for service in services)
    return Fetching.NO if is_offline else Fetching.UNKNOWN
