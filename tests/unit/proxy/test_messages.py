"""messages: what a response says to the byte."""

import pytest

from pullthrough.proxy.messages import response_of


@pytest.mark.parametrize("raw", [b"https://x/a?b=%2F", "https://x/é漢".encode(), b"https://x/\xff"])
def test_a_field_comes_out_as_it_came_in(raw: bytes) -> None:
    """A registry's address is signed, and need not be ASCII (both HTTP libraries decode so)."""
    value = raw.decode("utf-8", "surrogateescape")
    response = response_of(307, [("Location", value)], b"", 0)
    assert dict(response.headers.fields)[b"Location"] == raw
    assert response.headers["Content-Length"] == "0"
