"""front_page: a browser that asks the proxy's port for `/` is led on, and nothing else is."""

import socket
from pathlib import Path
from typing import Final

import pytest
from mitmproxy import http

from pullthrough.config.options import parse_settings
from pullthrough.proxy.front_page import front_page

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
