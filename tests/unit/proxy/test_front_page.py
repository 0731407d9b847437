"""front_page: a browser that asks the proxy's port for `/` is led on, a program is told, and clients are served."""

import socket
from pathlib import Path
from typing import Final

import pytest
from mitmproxy import http

from pullthrough.config.options import parse_settings
from pullthrough.proxy.front_page import front_page, guidance

BROWSER: Final = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def led(url: str, *, accept: str = BROWSER, method: str = "GET", **options: str) -> str | None:
    texts = {"listen": ":9200", "advertise": "cache.lan", **options}
    settings = parse_settings(texts, dir=Path("/store"), certs=Path("/certs"))
    headers = {"Accept": accept} if accept else {}
    return front_page(http.Request.make(method, url, headers=headers), settings, lambda: {80, 8080})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8080/", "http://127.0.0.1:9200/"),
        ("http://LOCALHOST:8080/", "http://localhost:9200/"),
        ("http://cache.lan:8080/", "http://cache.lan:9200/"),
        ("http://box.local/", "http://box.local:9200/"),
    ],
)
def test_browsers(monkeypatch: pytest.MonkeyPatch, url: str, expected: str) -> None:
    """They keep the name that they asked by."""
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    assert led(url) == expected


def test_advertised_port() -> None:
    """Where the plain port has another number for clients, that one."""
    assert led("http://cache.lan:8080/", advertise="cache.lan:9300") == "http://cache.lan:9300/"


@pytest.mark.parametrize(
    ("url", "facts"),
    [
        pytest.param("http://127.0.0.1:8080/", {"accept": "*/*"}, id="curl"),
        pytest.param("http://127.0.0.1:8080/", {"accept": ""}, id="Go"),
        pytest.param("http://127.0.0.1:8080/", {"accept": "application/json"}, id="a registry client"),
        pytest.param("http://127.0.0.1:8080/", {"method": "HEAD"}, id="HEAD"),
        pytest.param("http://127.0.0.1:8080/v2/", {}, id="another path"),
        pytest.param("http://127.0.0.1:8081/", {}, id="another port"),
        pytest.param("https://127.0.0.1:8080/", {}, id="TLS"),
        pytest.param("http://192.0.2.77:8080/", {}, id="another machine"),
        pytest.param("http://evil.example/", {}, id="a web site by the proxy's own port number"),
        pytest.param("http://127.0.0.1:8080/", {"listen": "off"}, id="no plain port"),
    ],
)
def test_everything_else(url: str, facts: dict[str, str]) -> None:
    """A proxy's business."""
    assert led(url, **facts) is None


def told(target: str, host: str, *, method: str = "GET", listen: str = ":9200") -> http.Response | None:
    """What becomes of a request with this target and Host field, as mitmproxy reads it."""
    settings = parse_settings({"listen": listen}, dir=Path("/store"), certs=Path("/certs"))
    request = http.Request.make(method, target if "://" in target else f"http://{host}{target}")
    return guidance(request, settings, lambda: {80, 8080})


@pytest.mark.parametrize("host", ["cache:8080", "127.0.0.1:8080", "[fd00::1]:8080", "docker.host:8080", "127.0.0.1"])
@pytest.mark.parametrize("target", ["/", "/readyz"])
def test_programs(host: str, target: str) -> None:
    """By whatever name they have come: what this is, and where the pages are."""
    response = told(target, host)
    assert response is not None and response.status_code == 421
    page = f"http://{host.rsplit(':', 1)[0] if not host.endswith('.1') else host}:9200/"
    assert page in response.reason and response.text.endswith(f"serves no pages: pages are at {page}\n")
    head = told(target, host, method="HEAD")
    assert head is not None and head.content == b""


def test_programs_without_a_plain_port() -> None:
    """There is no page to be sent to."""
    response = told("/", "cache:8080", listen="off")
    assert response is not None and "pages are off (listen=off)" in response.reason


@pytest.mark.parametrize(
    ("target", "host"),
    [("http://example.com/", "example.com"), ("http://cache:3128/", "cache:3128"), ("/", "example.com")],
)
def test_clients_of_a_proxy(target: str, host: str) -> None:
    """They ask for other ports than ours, or for a server's own."""
    assert told(target, host) is None
