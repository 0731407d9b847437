"""End an incomplete response so that its client notices (RFC 9112 section 8).

A body that is shorter than its Content-Length is an error to Go, curl and browsers. Python's urllib, when it is read
in pieces, and Java's streams take its end for the end, and what was read for the whole. They get a reset. Ollama
keeps what an orderly close has brought and throws away what a reset has (server/download.go), so Go's clients get the
close.

Invariant: what ends the connection while a body is under way makes no difference: the system resets it, even when the
process is killed.
"""

import contextlib
import socket
import struct
import sys
from typing import Final

KEEPING: Final = ("ollama", "Go-http-client/")
"""How the User-Agent of those begins that notice a short body, and keep it. Ollama asks for parts as plain Go."""

_NUMBERS: Final = "hh" if sys.platform == "win32" else "ii"
"""The members of `struct linger`."""


def notices_short_bodies(agent: str) -> bool:
    """Return whether a client with this User-Agent takes an orderly close within a body for the error that it is."""
    return agent.startswith(KEEPING)


def begin_body(sock: socket.socket) -> None:
    """Have the connection reset, whoever closes it, until `end_body`."""
    _set_linger(sock, on=True)


def end_body(sock: socket.socket) -> None:
    """Have the connection closed in order again: the body is complete."""
    _set_linger(sock, on=False)


def _set_linger(sock: socket.socket, *, on: bool) -> None:
    # A client that has left, as it may with the last byte, has had the socket closed: there is nothing left to end.
    with contextlib.suppress(OSError):
        # With a time of 0, closing discards what is unsent and resets.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(_NUMBERS, on, 0))
