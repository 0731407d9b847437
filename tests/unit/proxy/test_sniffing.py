"""sniffing: the name in the first bytes of a connection, however they are cut."""

import ssl

import pytest

from pullthrough.proxy.sniffing import LONGEST, FirstBytes, read_opening

REQUEST = b"GET /v2/ HTTP/1.1\r\nUser-Agent: x\r\nHOST:  Registry.Ollama.AI:80\r\n\r\n"


def client_hello(name: str | None, *, padding: int = 0) -> bytes:
    """What OpenSSL says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["http/1.1"] + [f"{number:0>200}" for number in range(padding)])
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(client_hello("registry.ollama.ai"), FirstBytes("registry.ollama.ai", True), id="tls"),
        pytest.param(client_hello("a.example", padding=40), FirstBytes("a.example", True), id="long hello"),
        pytest.param(client_hello(None), FirstBytes(None, True), id="no server name"),
        pytest.param(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01x", FirstBytes(None, True), id="no true hello"),
        pytest.param(REQUEST, FirstBytes("Registry.Ollama.AI", False), id="http"),
        pytest.param(REQUEST.replace(b"\r", b""), FirstBytes("Registry.Ollama.AI", False), id="http, bare newlines"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", FirstBytes(None, False), id="no host"),
        pytest.param(
            b"GET / HTTP/1.1\r\nX: y\r\n\r\nHost: a\r\n\r\n", FirstBytes(None, False), id="host in the content"
        ),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", FirstBytes(None, False), id="http2 by prior knowledge"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", FirstBytes(None, False), id="ssh"),
        pytest.param(b"\x00\x01", FirstBytes(None, False), id="something else"),
    ],
)
def test_opening(data: bytes, expected: FirstBytes) -> None:
    """The whole says it, and so does every longer cut; a shorter one says nothing or the same."""
    assert read_opening(data) == expected
    assert read_opening(data + b"more") == expected
    said = [read_opening(data[:length]) for length in range(len(data))]
    assert set(said) <= {None, expected}
    assert said[0] is None


@pytest.mark.parametrize(
    ("begin", "encrypted"), [(b"\x16\x03\x01\x40\x00\x01\x00\xff\xff", True), (b"GET / HTTP/1.1\r\n", False)]
)
def test_patience_has_an_end(begin: bytes, encrypted: bool) -> None:
    """A head that does not end is no reason to keep everything that comes."""
    assert read_opening(begin) is None
    records = begin + b"x" * 16380 + b"\x16\x03\x01\x40\x00" + b"x" * LONGEST if encrypted else begin + b"x" * LONGEST
    assert read_opening(records) == FirstBytes(None, encrypted)
