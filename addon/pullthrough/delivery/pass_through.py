"""Pass a request through to the server it was meant for, and the answer back, as they arrive.

This is for requests that are not answered here: uploads to the blob host, and addresses there that are not ours. A body
is passed on while it arrives; an answer that comes before the body's end is passed back at once, and ends the client's
connection.

Invariant: method, target, fields and body are those that were sent, but for Expect (answered here) and CDN-Loop; an
answer that breaks off ends the client's connection short. Nothing is kept.
"""

from dataclasses import dataclass
from typing import Final

import h11

from pullthrough.config.settings import Endpoint
from pullthrough.core.cdn_loop import CDN_LOOP, LoopGuard
from pullthrough.core.errors import CacheError, LoopDetected, Offline, UpstreamUnreachable
from pullthrough.delivery.socket_polling import either_readable, readable
from pullthrough.delivery.tls_outlet import TlsOutlet
from pullthrough.upstream.dialer import Dialed, Dialer, translated

CLIENT_SILENT_S: Final = 600.0
"""How long a client may take between two pieces of what it uploads, as mitmproxy has it (tcp_timeout)."""

_EARLY: Final = 4 << 10
"""Bytes that are read at once of an answer that comes before the request's end: it is looked for behind every piece."""
_Event = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]


@dataclass(frozen=True, slots=True)
class Way:
    """Where the requests of a host that are passed through go."""

    host: str
    endpoint: Endpoint
    dialer: Dialer
    loop: LoopGuard
    offline: bool


class PassThrough:
    """One client's requests on their way to one server, over one connection while that lasts."""

    def __init__(self, way: Way, out: TlsOutlet) -> None:
        self._way = way
        self._out = out
        self._line: Dialed | None = None
        self._upstream = h11.Connection(h11.CLIENT)
        self._early: _Event | None = None
        """What the server has begun its answer with, before the request's end."""

    def close(self) -> None:
        """Let go of the connection to the server."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def exchange(self, client: h11.Connection, request: h11.Request) -> int:
        """Pass the request through and its answer back; return the answer's status.

        CacheError where there is no answer; ClientGone; h11.RemoteProtocolError for what is no HTTP; PassThroughBroken
        where an answer broke off.
        """
        self._check(request)
        line = self._connect()
        try:
            self._send_request(line, client, request)
            status = self._return_answer(line, client)
        except BaseException:
            self.close()
            raise
        if self._upstream.our_state is self._upstream.their_state is h11.DONE:
            self._upstream.start_next_cycle()
        else:
            self.close()
        return status

    def _check(self, request: h11.Request) -> None:
        trail = next((value.decode("latin-1") for name, value in request.headers if name == b"cdn-loop"), "")
        if self._way.loop.is_own(trail):
            raise LoopDetected(f"expected another way to {self._way.host}, got one that leads back here")
        if self._way.offline:
            path = request.target.decode("latin-1").partition("?")[0]
            raise Offline(f"offline: {request.method.decode()} {path} is the registry's")

    def _connect(self) -> Dialed:
        if self._line is not None and readable(self._line.sock, 0.0):
            # Bytes that were not asked for make the connection unusable.
            self.close()
        if self._line is None:
            self._line = self._way.dialer.dial(self._way.endpoint)
            self._upstream, self._early = h11.Connection(h11.CLIENT), None
        return self._line

    def _fields(self, request: h11.Request, line: Dialed) -> list[tuple[bytes, bytes]]:
        trail, fields = "", []
        for name, value in request.headers.raw_items():
            match name.lower():
                case b"cdn-loop":
                    trail = value.decode("latin-1")
                case b"host":
                    fields.append((name, self._way.endpoint.authority.encode() if self._is_moved else value))
                # Credentials for this proxy must not reach the servers behind it (RFC 9110 section 11.7.2).
                case b"expect" | b"proxy-authorization":
                    pass
                case _:
                    fields.append((name, value))
        if not any(name.lower() == b"host" for name, _ in fields):
            fields.append((b"Host", self._way.endpoint.authority.encode()))  # HTTP/1.0 needs none
        fields.append((CDN_LOOP.encode(), self._way.loop.extend(trail).encode("latin-1")))
        if line.proxy is not None:
            fields += [(name.encode(), value.encode("latin-1")) for name, value in line.proxy.fields.items()]
        return fields

    @property
    def _is_moved(self) -> bool:
        return self._way.endpoint.host != self._way.host

    def _send_request(self, line: Dialed, client: h11.Connection, request: h11.Request) -> None:
        origin = self._way.endpoint.origin.encode() if line.proxy is not None else b""
        head = h11.Request(method=request.method, target=origin + request.target, headers=self._fields(request, line))
        line.write(self._upstream.send(head) or b"")
        if client.they_are_waiting_for_100_continue:
            self._out.put(
                client.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b""
            )
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                if not self._wait_for_client(line):
                    return
                client.receive_data(self._out.read())
                continue
            if isinstance(event, h11.Data):
                try:
                    line.write(self._upstream.send(event) or b"")
                except CacheError:
                    # A server that refuses does not always read to the end: its answer may already be here.
                    if self._has_answered(line):
                        return
                    raise
                if self._has_answered(line):
                    return
                continue
            if isinstance(event, h11.EndOfMessage):
                line.write(self._upstream.send(h11.EndOfMessage()) or b"")
                return
            raise UpstreamUnreachable("the client ended within its request")

    def _wait_for_client(self, line: Dialed) -> bool:
        """Return whether more of the body has arrived; False once the server has begun to answer."""
        while not self._has_answered(line):
            if self._out.readable(0.0):
                return True
            if not any(either_readable(self._out.sock, line.sock, CLIENT_SILENT_S)):
                raise UpstreamUnreachable("the client sent nothing more")
        return False

    def _has_answered(self, line: Dialed) -> bool:
        """Return whether the server has begun its answer, or ended. TLS session tickets and interim responses are none
        (RFC 8446 section 4.6.1, RFC 9110 section 15.2).
        """
        buffer = memoryview(bytearray(_EARLY))
        with translated():
            while self._early is None:
                event = self._upstream.next_event()
                if event is h11.NEED_DATA:
                    if (count := line.take(buffer)) is None:
                        return False
                    self._upstream.receive_data(bytes(buffer[:count]))
                elif not isinstance(event, h11.InformationalResponse):
                    self._early = event
        return True

    def _return_answer(self, line: Dialed, client: h11.Connection) -> int:
        status = 0
        while True:
            try:
                early, self._early = self._early, None
                with translated():
                    event = early or self._upstream.next_event()
                if event is h11.NEED_DATA:
                    self._upstream.receive_data(line.read())
                    continue
            except CacheError as error:
                if status:
                    raise PassThroughBroken(status, str(error)) from None
                raise
            match event:
                case h11.Response():
                    status = event.status_code
                    fields = event.headers.raw_items()
                    answer = h11.Response(status_code=status, headers=fields, reason=event.reason)
                    self._out.put(client.send(answer) or b"")
                case h11.Data():
                    self._out.put(client.send(event) or b"")
                case h11.EndOfMessage():
                    self._out.put(client.send(h11.EndOfMessage(headers=event.headers)) or b"")
                    return status
                case h11.InformationalResponse():
                    pass
                case _:
                    raise UpstreamUnreachable("the server ended without an answer")


class PassThroughBroken(CacheError):
    """The answer broke off after its head had been passed back."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status
