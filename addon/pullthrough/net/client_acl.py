"""Who may use the cache, and who may read which blob.

Invariant: only `decide` grants a blob. That a manifest lists a blob proves nothing about its bytes: a blob is public
only once an anonymous request for it succeeded upstream; otherwise upstream must have granted it to these very
credentials. Pure state: `now` is a parameter. Holds hashes of credentials, never credentials.
"""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from pullthrough.config.settings import Network
from pullthrough.core.digest import Digest
from pullthrough.net.address_policy import SHARED, unwrap

VOUCHED_S = 60.0
"""How long it is remembered that upstream granted a pair to a credential."""

_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16")
) + tuple(ipaddress.ip_network(text) for text in ("::1/128", "fc00::/7", "fe80::/10"))


class Decision(Enum):
    """The answer to a blob request on a registry host."""

    GRANT = auto()
    ASK_UPSTREAM = auto()


@dataclass(frozen=True, slots=True)
class Evidence:
    """The knowledge about one pair of (host, repository) and digest, and about one caller."""

    public: bool
    """An anonymous request for the digest succeeded upstream."""
    listed: bool
    """A stored manifest of that repository lists it, or upstream granted it to an anonymous request there."""
    vouched: bool
    """Upstream has recently granted this pair to this caller's credentials."""


def decide(evidence: Evidence) -> Decision:
    """Grant a known pair; for any other, have upstream asked with the caller's own credentials."""
    if (evidence.public and evidence.listed) or evidence.vouched:
        return Decision.GRANT
    return Decision.ASK_UPSTREAM


def credential_key(authorization: str | None) -> bytes:
    """Return a fingerprint by which to remember a credential; all anonymous callers share one."""
    return hashlib.sha256((authorization or "").encode("utf-8", "surrogateescape")).digest()


class Vouchers:
    """The pairs that upstream has recently granted to each credential."""

    def __init__(self, *, lifetime_s: float = VOUCHED_S, limit: int = 10_000) -> None:
        self._lifetime_s = lifetime_s
        self._limit = limit
        self._until: dict[tuple[bytes, str, str, Digest], float] = {}

    def add(self, credential: bytes, host: str, repository: str, digest: Digest, *, now: float) -> None:
        """Note that upstream granted this pair to `credential`."""
        key = (credential, host, repository, digest)
        self._until.pop(key, None)
        self._until[key] = now + self._lifetime_s
        # Entries are in the order in which they expire: the oldest come first.
        while self._until and (len(self._until) > self._limit or next(iter(self._until.values())) <= now):
            del self._until[next(iter(self._until))]

    def holds(self, credential: bytes, host: str, repository: str, digest: Digest, *, now: float) -> bool:
        return self._until.get((credential, host, repository, digest), now) > now


class ClientPolicy:
    """The client addresses that are admitted."""

    def __init__(self, clients: Iterable[Network | str]) -> None:
        """`clients` as in Settings."""
        networks: list[Network] = []
        self._any = self._local = False
        for client in clients:
            match client:
                case "any":
                    self._any = True
                case "private":
                    networks += _PRIVATE
                case "local":
                    self._local = True
                case str():
                    raise ValueError(f"expected private, local, any or a network, got {client!r}")
                case network:
                    networks.append(network)
        self._networks = tuple(networks)

    def admits(self, peer: str, *, local: Iterable[Network] = ()) -> bool:
        """Return whether a client at the address `peer` may use the cache; `local` are this machine's networks now."""
        if self._any:
            return True
        try:
            address = unwrap(ipaddress.ip_address(peer.partition("%")[0]))
        except ValueError:
            return False
        networks = (*self._networks, *local) if self._local else self._networks
        return any(address.version == network.version and address in network for network in networks)


def is_shared(peer: str) -> bool:
    """Return whether the address is one that carriers and Tailscale assign (see `address_policy`)."""
    try:
        address = unwrap(ipaddress.ip_address(peer.partition("%")[0]))
    except ValueError:
        return False
    return address.version == 4 and address in SHARED
