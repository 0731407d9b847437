"""messages: which clients may ask past this proxy for what an answer leads to."""

import pytest

from pullthrough.registry.messages import Request


@pytest.mark.parametrize(
    ("agent", "follows", "may_bypass", "is_known"),
    [
        ("ollama/0.1.30 (amd64 linux) Go/go1.22", True, False, False),
        ("ollama/0.34.4 (amd64 linux) Go/go1.26", True, False, False),
        ("ollama/0.34.5 (amd64 linux) Go/go1.26", False, True, False),
        ("ollama/0.35.0 (amd64 linux) Go/go1.27", False, True, True),
        ("ollama/0.40.2 (amd64 linux) Go/go1.27", False, True, True),
        ("ollama/0.40.3 (amd64 linux) Go/go1.27", False, True, False),
        ("ollama/1.0.0 (amd64 linux) Go/go1.30", False, True, False),
        ("ollama/0.0.0 (amd64 linux) Go/go1.27", False, True, False),
        ("ollama/99999999.0.0", False, True, False),
        ("Go-http-client/1.1", False, True, False),
        ("curl/8.0", False, True, False),
        ("", False, True, False),
        ("ollama-transfer/1.0", False, False, False),
    ],
)
def test_client_classes(agent: str, follows: bool, may_bypass: bool, is_known: bool) -> None:
    """Up to 0.34.4 parts take the proxy; x/transfer is past it with both hops; who is unknown counts as new."""
    request = Request("GET", "https", "registry.ollama.ai", "/", {"user-agent": agent} if agent else {}, tunnelled=True)
    assert request.follows_any_redirect is follows
    assert request.may_bypass is may_bypass
    assert request.is_known_to_bypass is is_known
    other_way = Request("GET", "https", "registry.ollama.ai", "/", {"user-agent": agent})
    assert not other_way.may_bypass and not other_way.is_known_to_bypass


@pytest.mark.parametrize("field", ["ollama/999.0.0 \x01", "ollama/999.0.0 \udcff", "a\x7f"])
def test_what_cannot_be_sent_on_is_not_there(field: str) -> None:
    """Else each request in that client's name would fail, and the registry be taken for one that is down."""
    request = Request("GET", "https", "registry.ollama.ai", "/", {"user-agent": field, "cdn-loop": field})
    assert (request.agent, request.trail, request.version, request.forwarded) == ("", "", None, {})
