"""browser_requests: which requests a page in a browser makes."""

import pytest

from pullthrough.net.browser_requests import asks_for_page

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"user-agent": "ollama/0.40.1 (amd64 linux) Go/go1.26"},
        {"user-agent": "curl/8.14.1", "accept": "*/*"},
        {"user-agent": "ollama-transfer/1.0"},
        {"user-agent": "containerd/2.1"},
        {"user-agent": FIREFOX, "sec-fetch-site": "none"},
        {"user-agent": FIREFOX, "sec-fetch-site": "same-origin", "referer": "http://cache:9200/"},
        {"user-agent": FIREFOX, "sec-fetch-site": "same-origin", "origin": "http://cache:9200"},
        {"user-agent": "Go-http-client/1.1", "referer": "http://name-of-the-cache:9200/v2/"},
    ],
)
def test_clients_and_our_own_pages(fields: dict[str, str]) -> None:
    """What pulls models, what our page asks for, and what somebody types."""
    assert not asks_for_page({"host": "cache:9200", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"user-agent": FIREFOX, "sec-fetch-site": "cross-site"},
        {"user-agent": FIREFOX, "sec-fetch-site": "same-site"},
        {"sec-fetch-site": "whatever comes next"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://cache:8080", "sec-fetch-site": "same-origin"},
        {"user-agent": FIREFOX},
    ],
)
def test_pages_of_others(fields: dict[str, str]) -> None:
    """One sign is enough; to a host of a LAN the User-Agent is all that a browser gives away."""
    assert asks_for_page({"host": "cache:9200", **fields})
