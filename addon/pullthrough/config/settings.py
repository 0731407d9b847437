"""The effective options, as values that the other modules get."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from pullthrough.core.records import Name, canonical

PREFIX: Final = "ollama_cache_"
ENVIRONMENT: Final = "OLLAMA_CACHE_"

PROXY_PORT: Final = 8080
"""Where mitmproxy listens unless it is told otherwise."""

R2_HOST: Final = "dd20bb891979d25aebc8bec07b2b3bbc.r2.cloudflarestorage.com"
"""The object-store account that registry.ollama.ai has redirected blobs to since 2023-11."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Tunnel(StrEnum):
    """What happens to a CONNECT for a host that is not intercepted."""

    ANY = "any"
    NONE = "none"


class Withdrawn(StrEnum):
    """What becomes of a stored manifest that upstream has no more (404)."""

    SERVE = "serve"
    DROP = "drop"


class Finish(StrEnum):
    """Whether a recording that nobody reads any more is completed."""

    AUTO = "auto"
    """When half of it is present."""
    ALWAYS = "always"
    NEVER = "never"


class Log(StrEnum):
    """How lines of the log are written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a host is really reached."""

    scheme: str
    host: str
    port: int

    @property
    def origin(self) -> str:
        """`scheme://host:port`."""
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """`host:port`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long manifests are served unasked, in seconds."""

    default_s: float
    rules: tuple[tuple[str, float], ...] = ()
    """(pattern, seconds); the first that matches counts."""

    def of(self, name: Name) -> float:
        return next((seconds for pattern, seconds in self.rules if name.matches(pattern)), self.default_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective options."""

    dir: Path
    index_dir: Path | None
    """Where the index is, None for where the disk under the store wants it."""
    certs: Path
    config: Path | None
    """The configuration file that was read."""
    runtime_dir: Path | None
    """Where the note of a running cache lies; None for the usual place."""
    registries: tuple[str, ...]
    blob_host: str
    upstream: Mapping[str, Endpoint]
    clients: tuple[Network | str, ...]
    """Networks, and the words `private`, `local`, `any`."""
    tunnel: Tunnel
    listen: tuple[tuple[str, int], ...]
    """(host, port) of the blob server; host "" for all addresses of this machine."""
    front: Mapping[int, str] | None
    """The registry that a port of the blob server speaks for, as configured; None: none does."""
    advertise: Endpoint | None
    """Under which clients reach the blob server, port 0 for the one it listens on; None: where they reached us."""
    offload: bool
    """Redirect large parts of public blobs to the object store."""
    manifest_lifetime: Lifetimes
    refresh: float | None
    """Seconds between two looks at a tag."""
    withdrawn: Withdrawn
    pins: tuple[str, ...]
    offline: bool
    max_size: int | None
    """Bytes."""
    min_free: int
    """Bytes."""
    finish: Finish
    prefetch: bool
    upstream_connections: int
    upstream_rate: float | None
    object_store: str | None
    """The URL of a folder that the caches of a fleet share."""
    fleet_secret_file: Path | None
    """What they sign with."""
    log: Log
    log_level: str

    @property
    def intercepted(self) -> tuple[str, ...]:
        """The host names that the CA must permit, in a stable order."""
        return (*self.registries, self.blob_host)

    @property
    def fronts(self) -> Mapping[int, str]:
        """The registry that each port speaks for: as `front` says, else the first of them all."""
        if self.front is None:
            return {}
        return {**dict.fromkeys((port for _, port in self.listen), self.registries[0]), **self.front}

    @property
    def named_hosts(self) -> frozenset[tuple[str, int]]:
        """The (host, port) pairs that may have any address: what the configuration names."""
        named = {(host, port) for host in self.intercepted for port in (80, 443)}
        return frozenset(named | {(endpoint.host, endpoint.port) for endpoint in self.upstream.values()})

    @property
    def listeners(self) -> tuple[tuple[str, int], ...]:
        """Where the blob server listens: at `listen`, and on the ports of `front` at the same hosts."""
        hosts = dict.fromkeys(host for host, _ in self.listen)
        return tuple(dict.fromkeys([*self.listen, *((host, port) for port in self.front or () for host in hosts)]))

    def asked(self, host: str) -> str:
        """Return the configured registry that what is stored under `host` comes from: that one, or another name of
        it.
        """
        names = (name for name in self.registries if canonical(name) == host)
        return host if host in self.registries else next(names, host)

    def endpoint(self, host: str) -> Endpoint:
        """Return where `host` is reached: as `upstream` says, else by HTTPS under its own name."""
        return self.upstream.get(host) or Endpoint("https", host, 443)
