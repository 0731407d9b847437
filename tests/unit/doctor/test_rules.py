"""rules: each fault is found by itself, and its mend is named; where all is well nothing is said."""

from dataclasses import replace
from typing import Any, Final

import pytest

from pullthrough.doctor.rules import (
    ISSUER,
    NEAR_END_S,
    SKEW_S,
    ClientFacts,
    Finding,
    Leg,
    ServerFacts,
    of_client,
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
ENVIRONMENT: Final = {"HTTPS_PROXY": f"http://{CACHE}", "OLLAMA_HOST": "0.0.0.0"}
CLIENT: Final = ClientFacts(
    daemon=ENVIRONMENT,
    configured={},
    version=(0, 34, 4),
    leg=Leg(address=CACHE, issuer=OURS),
    trusted="",
    roots="",
    hosts=("registry.ollama.ai", "r2.example.com"),
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

CLIENT_FAULTS: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "no daemon": ({"daemon": None}, "no Ollama daemon was found", "systemctl start ollama"),
    "no proxy": ({"daemon": {}}, "the daemon has no HTTPS_PROXY", "ollama-cache connect"),
    "not restarted": (
        {"daemon": {}, "configured": ENVIRONMENT},
        "the daemon has no HTTPS_PROXY",
        "systemctl restart ollama",
    ),
    "HTTP_PROXY": (
        {"daemon": {**ENVIRONMENT, "http_proxy": "http://x:1"}},
        "the daemon has HTTP_PROXY",
        "take HTTP_PROXY",
    ),
    "NO_PROXY": ({"daemon": {**ENVIRONMENT, "NO_PROXY": ".ollama.ai"}}, "NO_PROXY covers what is cached", "NO_PROXY"),
    "NO_PROXY of all": ({"daemon": {**ENVIRONMENT, "no_proxy": "*"}}, "NO_PROXY covers what is cached", "NO_PROXY"),
    "address": (
        {"daemon": {"HTTPS_PROXY": "socks5://x:1"}, "leg": None},
        "HTTPS_PROXY is no address of a proxy",
        "ollama-cache connect",
    ),
    "unreachable": ({"leg": REFUSED}, "the cache cannot be reached", "firewall"),
    "not admitted": (
        {"leg": Leg(address=CACHE, answered="Connection reset by peer")},
        "the cache does not let us in",
        "ollama_cache_clients",
    ),
    "another proxy": ({"leg": Leg(address=CACHE, issuer="WE1")}, "the proxy is no ollama-cache", "HTTPS_PROXY"),
    "goes past": ({"version": (0, 35, 0)}, "this Ollama goes past the cache", "upgrade Ollama"),
    "goes past, the last": ({"version": (0, 40, 2)}, "this Ollama goes past the cache", "port 9200"),
    "roots": ({"roots": "/x: no such file"}, "SSL_CERT_FILE cannot be read", "ollama-cache connect"),
    "not trusted": (
        {"trusted": "self-signed certificate in certificate chain"},
        "the daemon does not trust the cache",
        "ollama-cache connect",
    ),
    "clock": ({"trusted": "certificate is not yet valid"}, "the clock is wrong, here or there", "set-ntp"),
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


@pytest.mark.parametrize(("facts", "what", "mend"), CLIENT_FAULTS.values(), ids=CLIENT_FAULTS.keys())
def test_of_client(facts: dict[str, Any], what: str, mend: str) -> None:
    """One fault, one finding."""
    assert_found(of_client(replace(CLIENT, **facts)), what, mend)


def test_all_is_well() -> None:
    """At the edge of each bound too."""
    assert of_server(replace(SERVER, expires_s=NEAR_END_S, skew_s=-SKEW_S, free=50)) == []
    assert of_client(replace(CLIENT, version=None)) == of_client(replace(CLIENT, version=(0, 40, 3))) == []
    assert of_client(replace(CLIENT, daemon={**ENVIRONMENT, "NO_PROXY": "localhost,10.0.0.0/8"})) == []


def test_several() -> None:
    """Faults do not hide each other, and what only will be wrong is not grave."""
    found = of_server(replace(SERVER, expires_s=0, quarantined=1, ranges="x", free=0))
    assert [finding.grave for finding in found] == [False, False, True, True]


def test_nothing_of_the_environment_is_shown() -> None:
    """A password in a proxy's address is in no finding."""
    secret = {"HTTPS_PROXY": "http://me:hunter2@x:1", "HTTP_PROXY": "http://me:hunter2@x:1", "NO_PROXY": "*"}
    for daemon in (secret, {**secret, "HTTPS_PROXY": "ftp://me:hunter2@x:1"}):
        for leg in (None, REFUSED, Leg(address=CACHE, issuer="x")):
            assert "hunter2" not in str(of_client(replace(CLIENT, daemon=daemon, leg=leg)))
