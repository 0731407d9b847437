"""A strict, blocking HTTP/1.1 client on sockets and ssl, mostly through a CONNECT proxy.

Invariant: nothing is repaired, retried, decoded or followed: what the peer sent is what the test sees, and
anything that RFC 9112 does not allow raises ProtocolError. Knows no registry and no Ollama.
"""

import contextlib
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import urlsplit

Ended = Literal["complete", "fin", "rst"]
"""How a body ended: as framed; by a close before that; by a reset (or a broken TLS record)."""

Resolve = Mapping[tuple[str, int], tuple[str, int]]

GO_ALPN: Final = ("h2", "http/1.1")
_MAX_HEAD: Final = 64 * 1024
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_STATUS_LINE: Final = re.compile(r"HTTP/1\.1 (?P<status>[1-9][0-9]{2}) (?P<reason>[\t \x21-\x7e\x80-\xff]*)")
_FIELD_LINE: Final = re.compile(rf"(?P<name>{_TOKEN}):[\t ]*(?P<value>[\t \x21-\x7e\x80-\xff]*?)[\t ]*")
_CHUNK_LINE: Final = re.compile(r"(?P<size>[0-9A-Fa-f]{1,16})(?:[\t ]*;.*)?")


class ProtocolError(Exception):
    """The peer sent what RFC 9112 does not allow here."""


class ConnectRefused(Exception):
    """The proxy answered CONNECT with something else than 200."""

    def __init__(self, response: "Response", body: bytes) -> None:
        super().__init__(f"expected 200 to CONNECT, got {response.status} {response.reason}: {body[:500]!r}")
        self.status = response.status
        self.headers = response.headers
        self.body = body


class ClosedBeforeResponse(Exception):
    """The connection ended before the first byte of a response; `ended` tells how."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(f"connection ended ({ended}) before a response")
        self.ended = ended


@dataclass(frozen=True, slots=True)
class _End:
    """The receiving side is over."""

    how: Literal["fin", "rst"]
    close_notify: bool = False


class Connection:
    """One connection, one exchange at a time. Not shared between threads, but for `abort`."""

    def __init__(self, sock: socket.socket, *, authority: str, absolute: str = "") -> None:
        self._sock = sock
        self._authority = authority
        self._absolute = absolute
        """`http://authority` when targets have to be in absolute form."""
        self._buffer = bytearray()
        self._end: _End | None = None
        self._current: Response | None = None
        self._timeout_s: float | None = None
        self._deadline: float | None = None

    # --- facts

    @property
    def alpn(self) -> str | None:
        """The protocol that TLS selected; None without TLS or selection."""
        return self._sock.selected_alpn_protocol() if isinstance(self._sock, ssl.SSLSocket) else None

    @property
    def peer_certificate(self) -> bytes:
        """The leaf certificate, DER."""
        assert isinstance(self._sock, ssl.SSLSocket)
        return self._sock.getpeercert(binary_form=True) or b""

    @property
    def close_notify(self) -> bool:
        """The peer ended its TLS stream properly."""
        return self._end is not None and self._end.close_notify

    @property
    def is_reusable(self) -> bool:
        """The last response is over, nothing forbids another one, and the peer has sent nothing since."""
        if self._end is not None or self._buffer or self._sock.fileno() < 0:
            return False
        if self._current is not None and not (self._current.ended == "complete" and self._current.keeps_alive):
            return False
        pending = isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return not pending and not poller.poll(0)

    # --- time

    def set_timeout(self, timeout_s: float | None) -> None:
        """How long one read or write may take; TimeoutError beyond."""
        self._timeout_s, self._deadline = timeout_s, None
        self._sock.settimeout(timeout_s)

    def set_deadline(self, deadline: float | None) -> None:
        """When (time.monotonic) all reads and writes have to be over; None takes it away again."""
        self._deadline = deadline
        if deadline is None:
            self._sock.settimeout(self._timeout_s)

    def _arm(self) -> None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left)

    # --- bytes

    def _receive_into(self, view: memoryview) -> int:
        """Some bytes, or 0 at the end; `_end` says what kind of end."""
        if self._end is not None:
            return 0
        self._arm()
        try:
            count = self._sock.recv_into(view)
        except TimeoutError:
            raise
        except ssl.SSLEOFError:
            self._end = _End("fin")
            return 0
        except (ConnectionError, ssl.SSLError):
            self._end = _End("rst")
            return 0
        if count == 0:
            self._end = _End("fin", close_notify=isinstance(self._sock, ssl.SSLSocket))
        return count

    def _fill(self) -> bool:
        data = bytearray(16 * 1024)
        count = self._receive_into(memoryview(data))
        self._buffer += data[:count]
        return count > 0

    def _line(self) -> str | None:
        """A line without its CRLF; None when the connection ended first."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise ProtocolError(f"expected a line of at most {_MAX_HEAD} bytes")
            if not self._fill():
                return None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        if not line.endswith(b"\r\n"):
            raise ProtocolError(f"expected a line that ends in CRLF, got {line!r}")
        return line[:-2].decode("latin-1")

    def _take(self, view: memoryview) -> int:
        if self._buffer:
            count = min(len(self._buffer), len(view))
            view[:count] = self._buffer[:count]
            del self._buffer[:count]
            return count
        return self._receive_into(view)

    # --- exchanges

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        body: bytes | Iterable[bytes] = b"",
    ) -> "Response":
        """Send a request and return its response with the body unread. Host is added first unless given."""
        if self._current is not None and self._current.ended != "complete":
            raise ProtocolError("expected the previous response to be read to its end")
        if self._buffer:
            raise ProtocolError(f"expected nothing between two responses, got {bytes(self._buffer[:200])!r}")
        fields = list(headers.items() if isinstance(headers, Mapping) else headers)
        if not any(name.lower() == "host" for name, _value in fields):
            fields.insert(0, ("Host", self._authority))
        head = f"{method} {self._absolute}{target} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
        try:
            self.send(head.encode("latin-1"))
            for piece in (body,) if isinstance(body, bytes) else body:
                if piece:
                    self.send(piece)
        except (ConnectionError, ssl.SSLEOFError):
            # The answer may already be here: a server is free to refuse before it has read everything.
            pass
        return self._respond(method)

    def send(self, data: bytes) -> None:
        """Write raw bytes."""
        self._arm()
        self._sock.sendall(data)

    def _respond(self, method: str) -> "Response":
        while True:
            first = self._line()
            if first is None:
                assert self._end is not None
                if self._buffer:
                    raise ProtocolError(f"expected a status line, got {bytes(self._buffer[:200])!r} and the end")
                raise ClosedBeforeResponse(self._end.how)
            match = _STATUS_LINE.fullmatch(first)
            if match is None:
                raise ProtocolError(f"expected a status line, got {first!r}")
            headers = self._fields()
            status = int(match["status"])
            if status >= 200 or status == 101:
                break
        self._current = Response(self, method, status, match["reason"], headers)
        return self._current

    def _fields(self) -> list[tuple[str, str]]:
        fields: list[tuple[str, str]] = []
        while (line := self._line()) != "":
            if line is None:
                raise ProtocolError("expected an empty line after the header, got the end of the connection")
            match = _FIELD_LINE.fullmatch(line)
            if match is None:
                raise ProtocolError(f"expected a field line, got {line!r}")
            fields.append((match["name"], match["value"]))
        return fields

    # --- ends

    def abort(self) -> None:
        """End the connection now, from any thread; a read that is under way returns."""
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown: that drops the TLS object under the feet of the reading thread.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def reset(self) -> None:
        """Close with RST: what was sent and not yet acknowledged is lost."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        """Close, with close_notify while the peer still listens."""
        if self._sock.fileno() < 0:
            return
        if isinstance(self._sock, ssl.SSLSocket) and (self._end is None or self._end.how == "fin"):
            with contextlib.suppress(OSError, ValueError):
                # Nobody waits for the peer's close_notify: the rest of a body may come before it.
                self._sock.settimeout(0.0)
                self._sock.unwrap()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Response:
    """A response head, and its body as it arrives."""

    def __init__(
        self, connection: Connection, method: str, status: int, reason: str, headers: list[tuple[str, str]]
    ) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        """Names and values as on the wire, in order."""
        self.ended: Ended | None = None
        """None until the end of the body has been seen."""
        self._connection = connection
        lengths = {value for name, value in headers if name.lower() == "content-length"}
        codings = [value for name, value in headers if name.lower() == "transfer-encoding"]
        if len(lengths) > 1 or any(not re.fullmatch("[0-9]+", value) for value in lengths):
            raise ProtocolError(f"expected one decimal Content-Length, got {sorted(lengths)}")
        if codings and (lengths or codings != ["chunked"]):
            raise ProtocolError(
                f"expected Transfer-Encoding: chunked alone, got {codings} and lengths {sorted(lengths)}"
            )
        self.content_length: int | None = int(lengths.pop()) if lengths else None
        """The field's value; None when absent. For a HEAD it is the length that a GET would have."""
        self.is_chunked = bool(codings)
        bodiless = method == "HEAD" or status in (204, 304) or (method == "CONNECT" and 200 <= status < 300)
        self._left: int | None = 0 if bodiless else (None if self.is_chunked else self.content_length)
        """Bytes left of the body or of the present chunk; None: until close, or before the first chunk."""
        self._in_chunk = False
        if self._left == 0:
            self.ended = "complete"

    def __repr__(self) -> str:
        return f"<Response {self.status} {self.reason} {self.headers} ended={self.ended}>"

    def header(self, name: str) -> str | None:
        """The value of a field that may occur once; None when absent."""
        values = [value for own, value in self.headers if own.lower() == name.lower()]
        if len(values) > 1:
            raise ProtocolError(f"expected one {name}, got {values}")
        return values[0] if values else None

    @property
    def keeps_alive(self) -> bool:
        """The connection can carry another exchange once this body is over."""
        framed = self.is_chunked or self._left is not None
        return framed and (self.header("Connection") or "").lower() != "close"

    @property
    def closed_short(self) -> bool:
        """The body ended before its framing said so."""
        return self.ended in ("fin", "rst")

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Some of the body; 0 at its end, and `ended` says which end."""
        view = memoryview(buffer)
        if self.ended is not None or not view:
            return 0
        if self.is_chunked and not self._in_chunk and not self._next_chunk():
            return 0
        if self._left is not None:
            view = view[: self._left]
        count = self._connection._take(view)
        if count == 0:
            self._short(is_framed=self._left is not None)
            return 0
        if self._left is not None:
            self._left -= count
            if self._left == 0 and not self.is_chunked:
                self.ended = "complete"
            elif self._left == 0 and (line := self._connection._line()) != "":
                self._in_chunk = False
                if line is not None:
                    raise ProtocolError(f"expected CRLF after a chunk, got {line!r}")
                self._short(is_framed=True)
            elif self._left == 0:
                self._in_chunk = False
        return count

    def _next_chunk(self) -> bool:
        line = self._connection._line()
        if line is None:
            self._short(is_framed=True)
            return False
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise ProtocolError(f"expected a chunk size, got {line!r}")
        self._left = int(match["size"], 16)
        self._in_chunk = self._left > 0
        if not self._in_chunk:
            self._connection._fields()
            self.ended = "complete"
        return self._in_chunk

    def _short(self, *, is_framed: bool) -> None:
        end = self._connection._end
        assert end is not None
        # Without framing a close ends the body, but over TLS only if it was announced (RFC 9112 section 9.8).
        is_proper = end.close_notify or not isinstance(self._connection._sock, ssl.SSLSocket)
        self.ended = "complete" if not is_framed and end.how == "fin" and is_proper else end.how

    def read(self, count: int = -1) -> bytes:
        """`count` bytes of the body, or all; less only at its end."""
        data = bytearray()
        piece = bytearray(64 * 1024)
        while count < 0 or len(data) < count:
            wanted = len(piece) if count < 0 else min(len(piece), count - len(data))
            got = self.readinto(memoryview(piece)[:wanted])
            if not got:
                break
            data += piece[:got]
        return bytes(data)


def client_context(cafile: Path, alpn: Sequence[str] = GO_ALPN) -> ssl.SSLContext:
    """A context that trusts the certificates in `cafile` and no others."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def connect(
    proxy_url: str | None,
    host: str,
    port: int,
    cafile: Path | None,
    *,
    alpn: Sequence[str] = GO_ALPN,
    timeout_s: float | None = 60.0,
    deadline: float | None = None,
    resolve: Resolve | None = None,
    server_hostname: str | None = None,
    connect_headers: Sequence[tuple[str, str]] = (),
    context: ssl.SSLContext | None = None,
) -> Connection:
    """Connect to `host:port` with TLS (without, when `cafile` and `context` are None).

    With a proxy, TLS goes through CONNECT and plain HTTP uses absolute-form targets. Without one, `resolve`
    tells where a name is found. `server_hostname` is what SNI names and the certificate must be for, by
    default `host`. What ALPN selected is `Connection.alpn`; h2 raises, because nobody here speaks it.
    """
    is_tls = cafile is not None or context is not None
    default_port = 443 if is_tls else 80
    authority = host if port == default_port else f"{host}:{port}"
    if proxy_url is None:
        address = (resolve or {}).get((host, port), (host, port))
    else:
        split = urlsplit(proxy_url)
        assert split.scheme == "http" and split.hostname, f"expected http://host:port, got {proxy_url}"
        address = (split.hostname, split.port or 80)
    limits = [timeout_s] if timeout_s is not None else []
    if deadline is not None:
        limits.append(max(0.001, deadline - time.monotonic()))
    sock = socket.create_connection(address, min(limits, default=None))
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if proxy_url is not None and is_tls:
            tunnel = Connection(sock, authority=f"{host}:{port}")
            tunnel.set_timeout(timeout_s)
            tunnel.set_deadline(deadline)
            response = tunnel.request(
                "CONNECT",
                f"{host}:{port}",
                [("Host", f"{host}:{port}"), ("User-Agent", "Go-http-client/1.1"), *connect_headers],
            )
            if response.status != 200:
                raise ConnectRefused(response, response.read())
            tunnel._arm()
        if is_tls:
            if context is None:
                assert cafile is not None
                context = client_context(cafile, alpn)
            sock = context.wrap_socket(sock, server_hostname=server_hostname or host, suppress_ragged_eofs=False)
    except BaseException:
        sock.close()
        raise
    absolute = f"http://{authority}" if proxy_url is not None and not is_tls else ""
    connection = Connection(sock, authority=authority, absolute=absolute)
    connection.set_timeout(timeout_s)
    connection.set_deadline(deadline)
    if connection.alpn == "h2":
        connection.close()
        raise ProtocolError("expected http/1.1 to be selected by ALPN, got h2")
    return connection
