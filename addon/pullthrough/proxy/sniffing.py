"""The server that a client wants if it takes us for it, from the first bytes of its connection.

Invariant: there is no result before the name is complete, and nothing is read beyond the ClientHello or the head of the
first request. A name is no more than the client's claim.
"""

import re
from dataclasses import dataclass
from typing import Final

from mitmproxy.proxy.layers.tls import parse_client_hello

LONGEST: Final = 64 << 10
"""The bytes within which a name must come; a ClientHello with post-quantum keys and a ticket has about 2 KiB."""

_TLS: Final = b"\x16\x03"
_HTTP: Final = re.compile(rb"[A-Z]{1,10}(\Z| [^\n]*(\Z|HTTP/1\.[01]\r?\n))")
"""Matches what is, or may become, an HTTP/1 request line."""
_END: Final = re.compile(rb"\n\r?\n")
_HOST: Final = re.compile(rb"\nHost:[ \t]*([^\s:]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FirstBytes:
    """The beginning of a connection; `name` is as the client spells it, None if it gives none that we can read."""

    name: str | None
    encrypted: bool


def read_opening(data: bytes) -> FirstBytes | None:
    """Read the beginning of a connection from `data`, all that has come so far; None while more is needed.

    The name is from server_name in a ClientHello (RFC 6066 section 3), or from Host in an HTTP/1 request.
    """
    is_long = len(data) >= LONGEST
    if data[:2] == _TLS[: len(data)]:
        try:
            hello = parse_client_hello(data)
        except ValueError:
            return FirstBytes(None, encrypted=True)
        if hello is None:
            return FirstBytes(None, encrypted=True) if is_long else None
        return FirstBytes(hello.sni, encrypted=True)
    if not _HTTP.match(data):
        return FirstBytes(None, encrypted=False)
    end = _END.search(data)
    if end is None and not is_long:
        return None
    host = _HOST.search(data, 0, end.end() if end else LONGEST)
    return FirstBytes(host[1].decode("latin-1") if host else None, encrypted=False)
