"""What can be wrong with a cache or with a client's way to it, and what the doctor says of it.

One row per fault: which side looks, how it is made, what is found, and what is part of the command that mends it.
tests/e2e/test_doctor.py and tests/system/test_doctor.py make each of them and nothing else, and ask the doctor; what
became of each row is printed after a test run. `python -m tests.documents` writes it into docs/troubleshooting.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Side(StrEnum):
    """Where the doctor is asked."""

    CACHE = "cache"
    CLIENT = "client"


class Planted(StrEnum):
    """How the fault is made."""

    REAL = "real"
    """By real files, processes and sockets, which the doctor finds as it finds anybody's."""
    RECORDED = "recorded"
    """By what a program says where the fault is, word for word."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    name: str
    what: str
    """The finding."""
    mend: str
    """A part of what the doctor tells to do."""
    side: Side = Side.CLIENT
    planted: Planted = Planted.REAL
    grave: bool = True
    """Whether it stops pulls by the cache now."""


_AGAIN: Final = "ollama-cache connect"
_NO_PROXY: Final = "the daemon has no HTTPS_PROXY"
_BAD_PROXY: Final = "HTTPS_PROXY is no address of a proxy"
_UNTRUSTED: Final = "the daemon does not trust the cache"
_NO_LIST: Final = "SSL_CERT_FILE cannot be read"
_RESTART: Final = "systemctl restart ollama"

CLIENT: Final = (
    Fault("no daemon runs", "no Ollama daemon was found", "systemctl start ollama"),
    Fault("the daemon's process is not to be seen", "the Ollama daemon cannot be looked at", "sudo"),
    Fault("HTTPS_PROXY in the shell alone", _NO_PROXY, _AGAIN),
    Fault("HTTP_PROXY in place of HTTPS_PROXY", _NO_PROXY, _AGAIN),
    Fault("HTTP_PROXY beside HTTPS_PROXY", "the daemon has HTTP_PROXY", "take HTTP_PROXY out"),
    Fault("the service was not restarted", _NO_PROXY, _RESTART),
    Fault("systemd has not loaded the drop-in", _NO_PROXY, "systemctl daemon-reload"),
    Fault("HTTPS_PROXY=https://", "HTTPS_PROXY begins with https://", "HTTPS_PROXY=http://"),
    Fault("HTTPS_PROXY=socks5://", _BAD_PROXY, _AGAIN),
    Fault("HTTPS_PROXY with an IPv6 address without brackets", _BAD_PROXY, _AGAIN),
    Fault("HTTPS_PROXY names the plain port", "HTTPS_PROXY names the port that is no proxy", "usually 8080"),
    Fault("HTTPS_PROXY names another proxy", "the proxy is no ollama-cache", _AGAIN),
    Fault("HTTPS_PROXY names a proxy that wants a password", "the proxy refuses", _AGAIN),
    Fault("the cache's name does not resolve", "the cache's name is unknown here", "DNS"),
    Fault("nobody listens there (IPv4)", "the cache cannot be reached", "firewall"),
    Fault("nobody listens there (IPv6)", "the cache cannot be reached", "firewall"),
    Fault("`clients` is too narrow", "the cache does not let us in", "ollama_cache_clients"),
    Fault("NO_PROXY names the registry", "NO_PROXY covers what is cached", "NO_PROXY"),
    Fault("NO_PROXY names the blob host's domain", "NO_PROXY covers what is cached", "NO_PROXY"),
    Fault("NO_PROXY=*", "NO_PROXY covers what is cached", "NO_PROXY"),
    Fault("Ollama 0.35.0", "this Ollama goes past the cache", "upgrade Ollama"),
    Fault("Ollama 0.40.2", "this Ollama goes past the cache", "--mode transparent"),
    Fault("no certificate is installed", _UNTRUSTED, _AGAIN),
    Fault("the certificate of another authority is installed", _UNTRUSTED, _AGAIN),
    Fault("the certificate was copied, and not taken over", _UNTRUSTED, "update-ca-certificates"),
    Fault("the certificate came after the daemon's start", "the certificate came after the daemon's start", _RESTART),
    Fault("SSL_CERT_FILE is not there", _NO_LIST, _AGAIN),
    Fault("SSL_CERT_FILE is not for the daemon's user", _NO_LIST, "chmod a+r"),
    Fault("SSL_CERT_FILE holds no certificate", _NO_LIST, _AGAIN),
    Fault("the cache's leaf has expired", "the cache's certificate is out of its time", "set-ntp"),
    Fault("the cache's leaf is not valid yet", "the cache's certificate is out of its time", "set-ntp"),
    Fault("the authority does not vouch for the name", "the cache's authority does not vouch for", "ca renew"),
    Fault("the client's clock is wrong", "the clock is wrong", "timedatectl set-ntp true"),
    Fault("a DNS override has A alone", "DNS leads past the cache in part", "AAAA"),
    Fault("a hosts entry and Ollama 0.35", "this Ollama refuses a hosts entry", _AGAIN),
    Fault(
        "the cache does not reach the registry",
        "the cache does not reach the registry",
        "ollama-cache doctor",
        grave=False,
    ),
    Fault(
        "Schannel asks for a list of revoked certificates",
        "curl here wants a list of revoked certificates",
        "--ssl-revoke-best-effort",
        planted=Planted.RECORDED,
        grave=False,
    ),
)

_CA: Final = "the certificate authority cannot be used"
_STORE: Final = "the store cannot be used"
_PORT: Final = "another program has the port"
_REGISTRY: Final = "the registry cannot be reached"
_BLOB_HOST: Final = "the blob host cannot be reached"
_PORTAL: Final = "something else answers in the registry's place"
_ADVERTISE: Final = "clients cannot follow the name in advertise"


def _at_cache(name: str, what: str, mend: str, *, grave: bool = True, planted: Planted = Planted.REAL) -> Fault:
    return Fault(name, what, mend, Side.CACHE, planted, grave)


CACHE: Final = (
    _at_cache("the cache does not run", "the cache does not run", "ollama-cache run"),
    _at_cache("another program has the proxy's port", _PORT, "--listen-port"),
    _at_cache("another program has the plain port", _PORT, "listen="),
    _at_cache("the cache that runs has another store", "the cache that runs has another store", "--dir"),
    _at_cache("a cache of which nothing but its port is known", "the cache that runs has another store", "--dir"),
    _at_cache("the store is another user's", "the store is another user's", "sudo ollama-cache doctor"),
    _at_cache("the folder is no store", _STORE, "look at dir"),
    _at_cache("a newer version made the store", _STORE, "look at dir"),
    _at_cache("the store is on a read-only disk", "the store cannot be written to", "remount,rw"),
    _at_cache("the index is damaged", "the index is damaged", "ollama-cache run", grave=False),
    _at_cache("a blob had other bytes", "bytes in quarantine", "ollama-cache verify", grave=False),
    _at_cache("the disk is full", "the disk is full", "ollama-cache prune --all"),
    _at_cache("`min_free` is more than the disk has", "min_free is more than the disk has", "ollama_cache_min_free="),
    _at_cache("the authority is gone", _CA, "restore the folder certs/"),
    _at_cache("others can read the authority's key", _CA, "chmod 600"),
    _at_cache("the authority has expired", _CA, "timedatectl set-ntp true"),
    _at_cache("the authority does not permit a registry", _CA, "ollama-cache ca renew"),
    _at_cache("the authority nears its end", "the certificate authority nears its end", "ca renew", grave=False),
    _at_cache(
        "the cache was started with another authority",
        "the running cache has another authority",
        "start the cache again",
    ),
    _at_cache("a leaf has expired", "the cache's certificate was not made anew", "start the cache again"),
    _at_cache(
        "a leaf is about to expire", "the cache's certificate was not made anew", "start the cache again", grave=False
    ),
    _at_cache("nobody listens at the proxy's port", "the proxy's port cannot be reached", "open the port"),
    _at_cache("a bare mitmdump is at the proxy's port", "what listens there is not this cache", "ollama-cache run"),
    _at_cache("no proxy is at the proxy's port", "what listens there is not this cache", "ollama-cache run"),
    _at_cache("something else is at the plain port", "the blob server's port does not serve", "look at listen"),
    _at_cache(
        "it listens on loopback alone",
        "the cache listens for this machine alone",
        "--listen-host 0.0.0.0",
        grave=False,
    ),
    _at_cache("`advertise` does not resolve", _ADVERTISE, "advertise", grave=False),
    _at_cache("`advertise` is an IPv6 address, `listen` has none", _ADVERTISE, "advertise", grave=False),
    _at_cache("`clients` is too narrow", "clients are turned away", "ollama_cache_clients=", grave=False),
    _at_cache("few descriptors", "there are few descriptors", "LimitNOFILE", grave=False),
    _at_cache("the registry is down", _REGISTRY, "firewall"),
    _at_cache("the registry's name does not resolve", _REGISTRY, "DNS"),
    _at_cache("the registry's certificate is another's", _REGISTRY, "ssl_verify_upstream_trusted_ca"),
    _at_cache("the parent proxy wants a password", _REGISTRY, "HTTPS_PROXY"),
    _at_cache("the parent proxy is down", _REGISTRY, "HTTPS_PROXY"),
    _at_cache("a login page is in the registry's place", _PORTAL, "log in to the network"),
    _at_cache("a filter forbids the registry", _PORTAL, "web filter"),
    _at_cache("the blob host is down", _BLOB_HOST, "firewall"),
    _at_cache("the blob host's name does not resolve", _BLOB_HOST, "DNS"),
    _at_cache("something on the way ignores Range", "blobs cannot be had in parts", "unaltered"),
    _at_cache("the registry sends no addresses of blobs", "there are no signed addresses", "gateway", grave=False),
    _at_cache("the clock is ahead", "the clock is wrong", "timedatectl set-ntp true"),
    _at_cache("the clock is behind", "the clock is wrong", "timedatectl set-ntp true"),
    _at_cache(
        "Ollama 0.35 pulls by HTTPS_PROXY",
        "pulls go past the cache",
        "upgrade Ollama",
        grave=False,
        planted=Planted.RECORDED,
    ),
    _at_cache(
        "the fleet's object store is down",
        "the fleet's object store cannot be used",
        "credentials",
        grave=False,
        planted=Planted.RECORDED,
    ),
)

ALL: Final = (*CACHE, *CLIENT)
BY_NAME: Final = {(fault.side, fault.name): fault for fault in ALL}


def markdown() -> str:
    """Return the table of docs/troubleshooting.md."""
    rows = [
        f"| {fault.side} | {fault.name} | {fault.what} | {fault.mend} | {fault.planted} |".replace("*", r"\*")
        for fault in ALL
    ]
    return "\n".join(
        ["| side | fault | what `doctor` finds | the mend names | planted |", f"|{' --- |' * 5}", *rows, ""]
    )


def lines(outcomes: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """Give each fault and what became of its test, as a table for a terminal."""
    width, finding = (max(len(text) for text in texts) for texts in zip(*((f.name, f.what) for f in ALL), strict=True))
    for fault in ALL:
        outcome = outcomes.get((fault.side, fault.name), "-")
        yield f"{fault.side:6}  {fault.name:{width}}  {fault.what:{finding}}  {fault.planted:8}  {outcome}"
    found = sum(outcome == "passed" for outcome in outcomes.values())
    real = sum(fault.planted is Planted.REAL for fault in ALL)
    yield f"{found} of {len(ALL)} faults were made and found; {real} are planted for real"
