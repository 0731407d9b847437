"""incomplete: who gets a reset, and that it is one whoever closes."""

import socket
from collections.abc import Iterator

import pytest

from pullthrough.server.incomplete import begin_body, end_body, notices_short_bodies


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("ollama/0.41.0 (amd64 linux) Go/go1.27", True),
        ("ollama-transfer/1.0", True),
        ("Go-http-client/1.1", True),
        ("Go-http-client/2.0", True),
        ("Python-urllib/3.12", False),
        ("Java/21.0.1", False),
        ("curl/8.5.0", False),
        ("", False),
    ],
)
def test_who_notices(agent: str, expected: bool) -> None:
    """Go's clients, and nobody else that is known to lose by it."""
    assert notices_short_bodies(agent) is expected


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, by TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname(), timeout=10)
        server, _ = listening.accept()
    with client, server:
        yield server, client


def test_a_body_that_is_cut(pair: tuple[socket.socket, socket.socket]) -> None:
    """Closing resets."""
    server, client = pair
    begin_body(server)
    server.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_body_that_is_complete(pair: tuple[socket.socket, socket.socket]) -> None:
    """All of it arrives, and then the end."""
    server, client = pair
    begin_body(server)
    server.sendall(b"body")
    end_body(server)
    server.close()
    assert client.recv(100) + client.recv(100) == b"body"


def test_a_client_that_leaves_with_the_last_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    """The socket has been closed meanwhile, and the body was sent whole: nothing is amiss."""
    server, _ = pair
    begin_body(server)
    server.close()
    end_body(server)
