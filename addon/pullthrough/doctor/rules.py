"""Judgement of a cache from the facts about it.

Invariant: every finding names the problem, its cause or effect, and the remedy. Pure: other modules gather the facts,
most of which are texts that are "" when all is well.
"""

import math
import re
import shlex
from dataclasses import dataclass
from typing import Final

from pullthrough.core.humanize import size_text

SKEW_S: Final = 300.0
"""More than a clock set by NTP is ever off; certificates tolerate a day."""
NEAR_END_S: Final = 90 * 86400.0
LEAF_S: Final = 7 * 86400.0
"""A leaf with less time left was not renewed, which is due when a third of its 90 days is left."""
FEW_DESCRIPTORS: Final = 4096
"""Enough for about fifteen hundred connections; one Ollama opens sixteen or more."""
SET_CLOCK: Final = "timedatectl set-ntp true"
PAST_PROXY: Final = (
    "upgrade Ollama, make the cache the client's gateway (--mode transparent@8081), or pull from its port 9200: "
    "ollama pull --insecure http://CACHE:9200/NAMESPACE/MODEL"
)
"""The remedies for a client that downloads past every proxy."""
ISSUER: Final = "ollama-cache CA"
"""The prefix of all our authorities' names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, or, if not `grave`, one that limits the cache or is still to come."""

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
    """Why the proxy could not be reached."""
    answered: str = ""
    """Why CONNECT led to no TLS."""
    issuer: str = ""
    """The common name of the presented certificate's issuer."""
    left_s: float = math.inf
    """How long the presented certificate is still valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """A cache, seen from its own machine."""

    authority: str
    """Why the CA cannot be used."""
    expires_s: float
    """How long the CA is still valid."""
    issuer: str
    """The CA's common name; "" if the CA cannot be used."""
    store: str
    """Why the folder is not a store."""
    owner: str
    """Why this user may not judge the folder: who owns it."""
    unwritable: str
    """Why the folder cannot be written to."""
    index: str
    """Why the store's index cannot be read."""
    quarantined: int
    running: bool
    """Whether a daemon answers at the store's control socket; True on systems without such sockets."""
    elsewhere: tuple[str, ...]
    """The other stores that caches on this machine are running on."""
    leg: Leg
    port: str
    """Why the blob server's port does not serve our certificate."""
    taken: bool
    """Whether anything listens at that port."""
    local: tuple[str, ...]
    """The ports that only this machine can reach."""
    advertised: str
    """Why clients cannot reach the blob server under its advertised name."""
    refused: str
    """How many client connections were refused since the start, and whose was the last."""
    descriptors: int
    """How many files and sockets the daemon may have open; 0 if unknown."""
    upstream: str
    """Why the registry cannot be used."""
    displaced: str
    """What last answered in a registry's place."""
    blob_host: str
    """Why the blob host cannot be used."""
    object_store: str
    """Why the fleet's object store cannot be used."""
    ranges: str
    """Why the registry's blobs cannot be fetched in parts."""
    unsigned: str
    """Why the registry's redirects do not help clients that fetch past this proxy."""
    bypassed: int
    """Pulls since the start that went past the cache."""
    skew_s: float
    """How far our clock is ahead of the registry's."""
    disk: int
    """The size of the store's disk (bytes); `free` and `min_free` are bytes too."""
    free: int
    min_free: int


def of_server(facts: ServerFacts) -> list[Finding]:
    """Return the findings, causes first."""
    found = [*_of_authority(facts), *_of_store(facts), *_of_ports(facts), *_of_clients(facts), *_of_upstream(facts)]
    if facts.bypassed:
        why = f"{facts.bypassed} pulls since the start, by Ollama 0.35.0 to 0.40.2, which download past every proxy"
        found.append(Finding("pulls go past the cache", why, PAST_PROXY, grave=False))
    if abs(facts.skew_s) > SKEW_S:
        side = "ahead of" if facts.skew_s > 0 else "behind"
        why = f"{abs(facts.skew_s):.0f} s {side} the registry's: certificates and redirects seem expired"
        found.append(Finding("the clock is wrong", why, SET_CLOCK))
    return found


def _of_authority(facts: ServerFacts) -> list[Finding]:
    if facts.authority:
        mend = "restore the folder certs/ from a backup, then start the cache again"
        if "permits" in facts.authority:
            mend = "ollama-cache ca renew"
        elif "chmod" in facts.authority:
            mend = facts.authority.rpartition("run `")[2].rstrip("`")
        elif "valid at" in facts.authority:
            mend = f"{SET_CLOCK}; if that is right, move the ollama-cache-ca-* files away and set each client up anew"
        return [Finding("the certificate authority cannot be used", facts.authority, mend)]
    if facts.expires_s < NEAR_END_S:
        why = f"it is good for {facts.expires_s / 86400:.0f} more days, then no client trusts the cache"
        return [Finding("the certificate authority nears its end", why, "ollama-cache ca renew", grave=False)]
    return []


def _of_store(facts: ServerFacts) -> list[Finding]:
    if facts.owner:
        return [
            Finding("the store is another user's", facts.owner, "sudo ollama-cache doctor --dir DIR, or as that user")
        ]
    found = []
    if facts.store:
        found.append(Finding("the store cannot be used", facts.store, "ollama-cache config: look at dir"))
    elif facts.unwritable:
        why = f"{facts.unwritable}: what is stored is served, and nothing is recorded"
        found.append(
            Finding("the store cannot be written to", why, "mount -o remount,rw, or chown it to the cache's user")
        )
    if facts.index:
        why = f"{facts.index}; the next start makes it anew from the files of the store, and nothing is lost"
        found.append(Finding("the index is damaged", why, "ollama-cache run, then ollama-cache verify", grave=False))
    if facts.quarantined:
        why = f"{facts.quarantined} blobs had other bytes than their names say: a disk or a proxy that errs"
        found.append(Finding("bytes in quarantine", why, "ollama-cache verify", grave=False))
    free, kept, disk = map(size_text, (facts.free, facts.min_free, facts.disk))
    if facts.min_free >= facts.disk:
        why = f"min_free keeps {kept}, and the whole disk of the store has {disk}: no model is ever kept"
        mend = f"--set ollama_cache_min_free=SIZE with much less than {disk}, or another disk for dir"
        found.append(Finding("min_free is more than the disk has", why, mend))
    elif facts.free < facts.min_free:
        why = f"{free} is free, min_free keeps {kept}: models are evicted, and then not kept"
        mend = "ollama-cache prune --all, --set ollama_cache_min_free=SIZE with less than that, or another disk for dir"
        found.append(Finding("the disk is full", why, mend))
    return found


def _of_ports(facts: ServerFacts) -> list[Finding]:
    leg, start = facts.leg, "ollama-cache run"
    if not facts.running:
        if facts.owner:
            return []  # this user cannot tell whether it runs
        if facts.elsewhere:
            why = f"nobody serves this one, and {', '.join(facts.elsewhere)} is served"
            mend = f"ollama-cache doctor --dir {shlex.quote(facts.elsewhere[0])}, or ollama-cache run for this one too"
            return [Finding("the cache that runs has another store", why, mend)]
        if leg.issuer.startswith(ISSUER):
            why = f"a cache of another store has {leg.address}, and signs as {leg.issuer}"
            return [Finding("the cache that runs has another store", why, "--dir DIR with the store of that cache")]
        if facts.taken or not leg.reached:
            where = "the blob server's" if facts.taken else "the proxy's"
            why = f"no cache runs on this store, and {where} port is taken: the start would fail"
            return [Finding("another program has the port", why, f"stop it, or {start} --listen-port and listen=")]
        return [Finding("the cache does not run", "nobody answers at the store's control socket", start)]
    if leg.reached:
        why = f"{leg.address}: {leg.reached}"
        return [Finding("the proxy's port cannot be reached", why, "open the port in this machine's firewall")]
    if facts.issuer and leg.issuer != facts.issuer and leg.issuer.startswith(ISSUER):
        why = f"{leg.address} signs as {leg.issuer}, and the files are of {facts.issuer}, which clients are given"
        mend = "start the cache again; if its files were replaced by mistake, restore certs/ from a backup first"
        return [Finding("the running cache has another authority", why, mend)]
    found = []
    if leg.answered or (facts.issuer and leg.issuer != facts.issuer):
        why = f"{leg.address}: {leg.answered or f'got a certificate of {leg.issuer}'}, expected one of {facts.issuer}"
        found.append(Finding("what listens there is not this cache", why, f"{start}, instead of a bare mitmdump"))
    elif leg.left_s < LEAF_S and not facts.authority:
        why = "has expired" if leg.left_s <= 0 else f"is good for {leg.left_s / 3600:.0f} more hours"
        why = f"{leg.address} presents one that {why}; a new one is due a month before the end of the old one"
        mend = f"{SET_CLOCK}, then start the cache again, which makes a new one"
        found.append(Finding("the cache's certificate was not made anew", why, mend, grave=leg.left_s <= 0))
    if facts.port:
        mend = "restart the cache, if its CA was replaced meanwhile; else look at listen"
        found.append(Finding("the blob server's port does not serve", facts.port, mend))
    return found


def _of_clients(facts: ServerFacts) -> list[Finding]:
    """Return what keeps clients on other machines from using the cache."""
    found = []
    if facts.local:
        why = f"{', '.join(facts.local)}: no other machine can connect to it"
        mend = "ollama-cache run --listen-host 0.0.0.0, and listen=:9200, unless this machine alone is to use it"
        found.append(Finding("the cache listens for this machine alone", why, mend, grave=False))
    if facts.advertised:
        mend = "ollama-cache config: set advertise to a name or an address that clients reach"
        found.append(Finding("clients cannot follow the name in advertise", facts.advertised, mend, grave=False))
    if facts.refused:
        why = f"{facts.refused}, which is not in ollama_cache_clients"
        mend = "if it is yours, add its network: --set ollama_cache_clients=private,local,NETWORK"
        found.append(Finding("clients are turned away", why, mend, grave=False))
    if 0 < facts.descriptors < FEW_DESCRIPTORS:
        why = f"the cache may have {facts.descriptors} files and sockets open, and each client takes two and more"
        mend = (
            "LimitNOFILE=65536 in the service (sudo systemctl edit ollama-cache), or ulimit -n 65536 before the start"
        )
        found.append(Finding("there are few descriptors", why, mend, grave=False))
    return found


def _of_upstream(facts: ServerFacts) -> list[Finding]:
    found = []
    if facts.displaced:
        mend = (
            "log in to the network (a captive portal), or exempt the registry and the blob host from the web filter or "
            "TLS inspection"
        )
        why = f"{facts.displaced}; only stored models are served, and nothing becomes public or private by it"
        found.append(Finding("something else answers in the registry's place", why, mend))
    elif facts.upstream:
        why = f"{facts.upstream}; only stored models are served"
        found.append(Finding("the registry cannot be reached", why, _opens(facts.upstream)))
    elif facts.ranges and not facts.blob_host:
        mend = "let the registry's and the blob host's answers pass unaltered where this machine's traffic is inspected"
        found.append(Finding("blobs cannot be had in parts", facts.ranges, mend))
    elif facts.unsigned and not facts.blob_host:
        why = f"{facts.unsigned}: Ollama 0.35.0 to 0.40.2 cannot pull by HTTPS_PROXY here"
        found.append(Finding("there are no signed addresses", why, PAST_PROXY, grave=False))
    if facts.blob_host and not facts.displaced:
        why = f"{facts.blob_host}; pulls of what is not stored stop at the first blob"
        found.append(Finding("the blob host cannot be reached", why, _opens(facts.blob_host)))
    if facts.object_store:
        why = f"{facts.object_store}; this cache fetches for itself alone"
        mend = "its URL and its credentials in this cache's environment, and the way to it: ollama-cache tier status"
        found.append(Finding("the fleet's object store cannot be used", why, mend, grave=False))
    return found


def _opens(problem: str) -> str:
    """Return the remedy for a server that cannot be reached."""
    problem = problem.lower()
    if "certificate" in problem:
        return "--set ssl_verify_upstream_trusted_ca=FILE, with the CA of whoever inspects TLS here"
    if "parent proxy" in problem:
        return "HTTPS_PROXY in the environment of the cache: its address, and user:password@ where it wants them"
    if any(words in problem for words in ("resol", "name or service", "no address")):
        unresolved = re.search(r"([\w.-]+): name resolution failed", problem)
        host = unresolved[1] if unresolved else "registry.ollama.ai"
        return f"DNS of this machine: getent hosts {host}, and /etc/resolv.conf"
    return "open this machine's way to it: firewall, routes, HTTPS_PROXY in the environment of the cache"
