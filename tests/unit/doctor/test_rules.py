"""rules: each fault is found by itself, and its mend is named; where all is well nothing is said."""

from dataclasses import replace
from typing import Any, Final

import pytest

from pullthrough.doctor.rules import (
    ISSUER,
    NEAR_END_S,
    SKEW_S,
    Finding,
    Leg,
    ServerFacts,
    of_server,
)

OURS: Final = f"{ISSUER} 00c0ffee"
CACHE: Final = "cache.lan:8080"
SERVER: Final = ServerFacts(
    authority="",
    expires_s=10 * NEAR_END_S,
    issuer=OURS,
    store="",
    quarantined=0,
    running=True,
    leg=Leg(address=CACHE, issuer=OURS),
    port="",
    taken=True,
    upstream="",
    displaced="",
    ranges="",
    unsigned="",
    bypassed=0,
    skew_s=0.0,
    free=100,
    min_free=50,
)
REFUSED: Final = Leg(address=CACHE, reached="Connection refused")

SERVER_FAULTS: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "CA permits too little": (
        {"authority": "expected a CA that permits hf.co, got one that permits x", "issuer": ""},
        "the certificate authority cannot be used",
        "ollama-cache ca renew",
    ),
    "CA unreadable": ({"authority": "key.pem: no such file"}, "the certificate authority cannot be used", "restore"),
    "CA nears its end": ({"expires_s": NEAR_END_S - 1}, "the certificate authority nears its end", "ca renew"),
    "store": ({"store": "expected format 1, got 2"}, "the store cannot be used", "config"),
    "quarantine": ({"quarantined": 2}, "bytes in quarantine", "ollama-cache verify"),
    "not running": (
        {"running": False, "taken": False, "leg": REFUSED},
        "the cache does not run",
        "ollama-cache run",
    ),
    "proxy's port taken": ({"running": False, "taken": False}, "another program has the port", "--listen-port"),
    "blob port taken": ({"running": False, "leg": REFUSED}, "another program has the port", "listen="),
    "proxy unreachable": ({"leg": REFUSED}, "the proxy's port cannot be reached", "open the port"),
    "no addon": (
        {"leg": Leg(address=CACHE, issuer="mitmproxy")},
        "what listens there is not this cache",
        "instead of a bare mitmdump",
    ),
    "no proxy": (
        {"leg": Leg(address=CACHE, answered="Tunnel connection failed: 404")},
        "what listens there is not this cache",
        "ollama-cache run",
    ),
    "blob port": ({"port": "expected our certificate"}, "the blob server's port does not serve", "restart the cache"),
    "upstream": ({"upstream": "name resolution failed"}, "the registry cannot be reached", "DNS, firewall"),
    "upstream's TLS": (
        {"upstream": "self-signed certificate in certificate chain"},
        "the registry cannot be reached",
        "ssl_verify_upstream_trusted_ca",
    ),
    "ranges": ({"ranges": "expected 206, got 200"}, "blobs cannot be had in parts", "unaltered"),
    "bypassed": ({"bypassed": 7}, "pulls go past the cache", "gateway"),
    "a captive portal": (
        {"displaced": "something else answers in the place of registry.ollama.ai: 200 text/html"},
        "something else answers in the registry's place",
        "log in to the network",
    ),
    "chain of caches": ({"unsigned": "redirects to 10.0.0.9"}, "there are no signed addresses", "port 9200"),
    "clock ahead": ({"skew_s": SKEW_S + 1}, "the clock is wrong", "timedatectl set-ntp true"),
    "clock behind": ({"skew_s": -SKEW_S - 1}, "the clock is wrong", "timedatectl set-ntp true"),
    "disk": ({"free": 49}, "the disk is full", "ollama-cache prune --all"),
}


def assert_found(findings: list[Finding], what: str, mend: str) -> None:
    """Exactly this is wrong."""
    assert [finding.what for finding in findings] == [what]
    assert mend in findings[0].mend
    assert findings[0].why


@pytest.mark.parametrize(("facts", "what", "mend"), SERVER_FAULTS.values(), ids=SERVER_FAULTS.keys())
def test_of_server(facts: dict[str, Any], what: str, mend: str) -> None:
    """One fault, one finding."""
    assert_found(of_server(replace(SERVER, **facts)), what, mend)


def test_all_is_well() -> None:
    """At the edge of each bound too."""
    assert of_server(replace(SERVER, expires_s=NEAR_END_S, skew_s=-SKEW_S, free=50)) == []


def test_several() -> None:
    """Faults do not hide each other, and what only will be wrong is not grave."""
    found = of_server(replace(SERVER, expires_s=0, quarantined=1, ranges="x", free=0))
    assert [finding.grave for finding in found] == [False, False, True, True]
