"""The effective options, as values for the other modules."""

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
"""The port that mitmproxy listens on by default."""

R2_HOST: Final = "dd20bb891979d25aebc8bec07b2b3bbc.r2.cloudflarestorage.com"
"""The object-store account that registry.ollama.ai has redirected blobs to since 2023-11."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Tunnel(StrEnum):
    """The treatment of a CONNECT for a host that is not intercepted."""

    ANY = "any"
    NONE = "none"


class Withdrawn(StrEnum):
    """The treatment of a stored manifest that upstream no longer has (404)."""

    SERVE = "serve"
    DROP = "drop"


class Finish(StrEnum):
    """The choice whether a recording that no client reads any more is completed."""

    AUTO = "auto"
    """If half of it is present."""
    ALWAYS = "always"
    NEVER = "never"


class Log(StrEnum):
    """The format of log lines."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The place where a host is really reached."""

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
    """The time for which manifests are served without asking upstream, in seconds."""

    default_s: float
    rules: tuple[tuple[str, float], ...] = ()
    """(pattern, seconds); the first match counts."""

    def of(self, name: Name) -> float:
        return next((seconds for pattern, seconds in self.rules if name.matches(pattern)), self.default_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective options."""

    dir: Path
    index_dir: Path | None
    """The folder of the index; None if the kind of disk under the store is to decide."""
    certs: Path
    config: Path | None
    """The configuration file that was read."""
    runtime_dir: Path | None
    """The folder of the file that tells of a running cache; None for the usual place."""
    registries: tuple[str, ...]
    blob_host: str
    upstream: Mapping[str, Endpoint]
    clients: tuple[Network | str, ...]
    """Networks, and the words `private`, `local`, `any`."""
    tunnel: Tunnel
    listen: tuple[tuple[str, int], ...]
    """(host, port) of the blob server; host "" for all addresses of this machine."""
    front: Mapping[int, str] | None
    """The registry that each port of the blob server represents, as configured; None if none does."""
    advertise: Endpoint | None
    """The address for clients of the blob server (port 0: the port it listens on); None: the one they reached us by."""
    offload: bool
    """Redirect large parts of public blobs to the object store."""
    manifest_lifetime: Lifetimes
    refresh: float | None
    """Seconds between two checks of a tag."""
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
    """What these caches sign with."""
    log: Log
    log_level: str

    @property
    def intercepted(self) -> tuple[str, ...]:
        """The host names that the CA must permit, in a stable order."""
        return (*self.registries, self.blob_host)

    @property
    def fronts(self) -> Mapping[int, str]:
        """The registry that each port represents: as `front` says, else the first of `registries` for all ports."""
        if self.front is None:
            return {}
        return {**dict.fromkeys((port for _, port in self.listen), self.registries[0]), **self.front}

    @property
    def named_hosts(self) -> frozenset[tuple[str, int]]:
        """The (host, port) pairs that may have any address, because the configuration names them."""
        named = {(host, port) for host in self.intercepted for port in (80, 443)}
        return frozenset(named | {(endpoint.host, endpoint.port) for endpoint in self.upstream.values()})

    @property
    def listeners(self) -> tuple[tuple[str, int], ...]:
        """Where the blob server listens: at `listen`, and on the ports of `front` at the same hosts."""
        hosts = dict.fromkeys(host for host, _ in self.listen)
        return tuple(dict.fromkeys([*self.listen, *((host, port) for port in self.front or () for host in hosts)]))

    def asked(self, host: str) -> str:
        """Return the configured registry whose answers are stored under `host`: that host, or another name of it."""
        names = (name for name in self.registries if canonical(name) == host)
        return host if host in self.registries else next(names, host)

    def endpoint(self, host: str) -> Endpoint:
        """Return where `host` is reached: as `upstream` says, else by HTTPS under its own name."""
        return self.upstream.get(host) or Endpoint("https", host, 443)
