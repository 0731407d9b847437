"""What is wrong with a cache, from what was found out about it.

Invariant: every finding names what was found, what comes of it, and what mends it. Pure: looking is done elsewhere, and
each fact is a value that says "" or True where all is well.
"""

from dataclasses import dataclass
from typing import Final

SKEW_S: Final = 300.0
"""More than a clock that is set by NTP is ever off; certificates bear a day."""
NEAR_END_S: Final = 90 * 86400.0
SET_CLOCK: Final = "timedatectl set-ntp true"
PAST_PROXY: Final = (
    "upgrade Ollama, make the cache the client's gateway (--mode transparent@8081), or pull from its port 9200: "
    "ollama pull --insecure http://CACHE:9200/NAMESPACE/MODEL"
)
"""What helps a client that downloads past every proxy."""
ISSUER: Final = "ollama-cache CA"
"""How the name of each of our authorities begins."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or that will be where not `grave`."""

    what: str
    why: str
    mend: str
    grave: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """An attempt to reach a registry through a proxy."""

    address: str
    """host:port of the proxy."""
    reached: str = ""
    """Why nothing took the connection."""
    answered: str = ""
    """Why there was no TLS behind CONNECT."""
    issuer: str = ""
    """The common name of who signed what was presented."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """A cache, seen from its own machine."""

    authority: str
    """Why the CA cannot be used."""
    expires_s: float
    """How long the CA is still good."""
    issuer: str
    """The CA's common name, "" where it cannot be used."""
    store: str
    """Why the folder is no store."""
    quarantined: int
    running: bool
    """Whether a daemon answers at the store's control socket; True where there is no such socket."""
    leg: Leg
    port: str
    """Why the blob server's port does not give our certificate."""
    taken: bool
    """Whether anybody listens at that port."""
    upstream: str
    """Why the registry cannot be used."""
    displaced: str
    """What answered last in the place of a registry."""
    ranges: str
    """Why its blobs cannot be had in parts."""
    unsigned: str
    """Why its redirects are no use to clients that fetch past this proxy."""
    bypassed: int
    """Pulls since the start that went past the cache."""
    skew_s: float
    """How far our clock is ahead of the registry's."""
    free: int
    min_free: int


def of_server(facts: ServerFacts) -> list[Finding]:
    """What is wrong, the causes first."""
    found = []
    if facts.authority:
        mend = "ollama-cache ca renew" if "permits" in facts.authority else "what the message says, or restore certs/"
        found.append(Finding("the certificate authority cannot be used", facts.authority, mend))
    elif facts.expires_s < NEAR_END_S:
        why = f"it is good for {facts.expires_s / 86400:.0f} more days, then no client trusts the cache"
        found.append(Finding("the certificate authority nears its end", why, "ollama-cache ca renew", grave=False))
    if facts.store:
        found.append(Finding("the store cannot be used", facts.store, "ollama-cache config: look at dir"))
    if facts.quarantined:
        why = f"{facts.quarantined} blobs had other bytes than their names say: a disk or a proxy that errs"
        found.append(Finding("bytes in quarantine", why, "ollama-cache verify", grave=False))
    found += _of_ports(facts)
    if facts.displaced:
        mend = (
            "log in to the network (a captive portal), or exempt the registry and the blob host from the web filter or "
            "TLS inspection"
        )
        why = f"{facts.displaced}; only stored models are served, and nothing becomes public or private by it"
        found.append(Finding("something else answers in the registry's place", why, mend))
    elif facts.upstream:
        mend = "open this machine's way to it: DNS, firewall, HTTPS_PROXY of the cache"
        if "certificate" in facts.upstream.lower():
            mend = "--set ssl_verify_upstream_trusted_ca=FILE, with the CA of whoever inspects TLS here"
        found.append(
            Finding("the registry cannot be reached", f"{facts.upstream}; only stored models are served", mend)
        )
    elif facts.ranges:
        mend = "let the registry's and the blob host's answers pass unaltered where this machine's traffic is inspected"
        found.append(Finding("blobs cannot be had in parts", facts.ranges, mend))
    if facts.bypassed:
        why = f"{facts.bypassed} pulls since the start, by Ollama 0.35.0 to 0.40.2, which download past every proxy"
        found.append(Finding("pulls go past the cache", why, PAST_PROXY, grave=False))
    if facts.unsigned and not (facts.upstream or facts.displaced):
        why = f"{facts.unsigned}: Ollama 0.35.0 to 0.40.2 cannot pull by HTTPS_PROXY here"
        found.append(Finding("there are no signed addresses", why, PAST_PROXY, grave=False))
    if abs(facts.skew_s) > SKEW_S:
        side = "ahead of" if facts.skew_s > 0 else "behind"
        why = f"{abs(facts.skew_s):.0f} s {side} the registry's: certificates and redirects seem expired"
        found.append(Finding("the clock is wrong", why, SET_CLOCK))
    if facts.free < facts.min_free:
        why = f"{facts.free} bytes are free, min_free keeps {facts.min_free}: models are evicted, and then not kept"
        found.append(Finding("the disk is full", why, "ollama-cache prune --all, or another disk for dir"))
    return found


def _of_ports(facts: ServerFacts) -> list[Finding]:
    leg, start = facts.leg, "ollama-cache run"
    if not facts.running:
        if facts.taken or not leg.reached:
            where = "the blob server's" if facts.taken else "the proxy's"
            why = f"no cache runs on this store, and {where} port is taken: the start would fail"
            return [Finding("another program has the port", why, f"stop it, or {start} --listen-port and listen=")]
        return [Finding("the cache does not run", "nobody answers at the store's control socket", start)]
    found = []
    if leg.reached:
        found.append(Finding("the proxy's port cannot be reached", f"{leg.address}: {leg.reached}", "open the port"))
    elif leg.answered or (facts.issuer and leg.issuer != facts.issuer):
        why = f"{leg.address}: {leg.answered or f'got a certificate of {leg.issuer}'}, expected one of {facts.issuer}"
        found.append(Finding("what listens there is not this cache", why, f"{start}, instead of a bare mitmdump"))
    if facts.port:
        mend = "restart the cache, if its CA was replaced meanwhile; else look at listen"
        found.append(Finding("the blob server's port does not serve", facts.port, mend))
    return found
