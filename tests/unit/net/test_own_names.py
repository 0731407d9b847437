"""own_names: an address, a name of ours, and nothing else."""

import socket

import pytest

from pullthrough.config.settings import Endpoint
from pullthrough.net.own_names import is_ours, own_names


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        pytest.param(None, True, id="HTTP/1.0"),
        pytest.param("10.0.0.1:9200", True, id="IPv4"),
        pytest.param("[::1]:9200", True, id="IPv6"),
        pytest.param("[fe80::1%25eth0]", True, id="IPv6 with a zone"),
        pytest.param("localhost:9200", True, id="localhost"),
        pytest.param("BOX", True, id="our name in capitals"),
        pytest.param("box.local.:9200", True, id="by mDNS, with a final dot"),
        pytest.param("cache.lan", True, id="advertised"),
        pytest.param("evil.example", False, id="a stranger's name"),
        pytest.param("box.evil.example", False, id="a name below a stranger's"),
        pytest.param("localhost.evil.example:9200", False, id="a name that begins like ours"),
        pytest.param("127.0.0.1#.evil.example", False, id="an address before a fragment"),
        pytest.param("127.0.0.1/evil.example", False, id="an address before a path"),
        pytest.param("127.1", False, id="half an address"),
        pytest.param("0x7f000001", False, id="an address as a number"),
        pytest.param("evil.example@10.0.0.1", False, id="a user"),
        pytest.param("[bad", False, id="nonsense"),
        pytest.param("", False, id="nothing"),
        pytest.param(":9200", False, id="a port alone"),
    ],
)
def test_is_ours(monkeypatch: pytest.MonkeyPatch, host: str | None, expected: bool) -> None:
    """Addresses and our names, and nothing that a stranger could have led here."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Box")
    assert is_ours(host, own_names(Endpoint("http", "cache.lan", 0))) is expected
