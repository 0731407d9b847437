"""A client's connection to the blob host, served from a thread: TLS, HTTP/1.1, and the bytes of blobs.

The way of a request and of its bytes:

    `takeover` (mitmproxy)   takes the socket when CONNECT is answered, or with the first bytes where we are the gateway
    `byte_threads`           gives it a thread, now or when one is free
    here                     handshake; head by head (h11), each turned into a `Request`
    the event loop           `Registry.answer` decides: an answer with a reader, or None
    `byte_sender`            asks the reader what is there, and has it sent
    `outlets`                one pread and one SSL_write for each MiB
    here                     the next head; after LINGER_S without one `byte_threads` parks the connection

Invariant: what is not answered by the registry's core is passed on by `pass_through`, or refused; SNI, Host and the
request target name the blob host, else 421. A body ends whole, or the connection ends with FIN short of its
Content-Length, which lets Ollama keep what it has (server/download.go: an unexpected EOF keeps progress, a reset does
not).
"""

import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import h11
from OpenSSL import SSL

from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.errors import CacheError, Misdirected
from pullthrough.delivery.byte_sender import LoopCalls, LoopReader, Sending, send, take
from pullthrough.delivery.outlets import ClientGone
from pullthrough.delivery.pass_through import PassThrough, PassThroughBroken, Way
from pullthrough.delivery.tls_contexts import TlsContext
from pullthrough.delivery.tls_outlet import TlsOutlet
from pullthrough.recording.reader import FileSpan, Reader
from pullthrough.registry.messages import Answer, Request, failure

_log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 30.0
HEAD_S: Final = 30.0
"""The longest that a request's head may take from its first byte to its last."""
LINGER_S: Final = 2.0
"""How long a thread waits for its client's next request."""
LONGEST_HEAD: Final = 64 << 10
ESTABLISHED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Service:
    """What all connections to the blob host share."""

    host: str
    answer: Callable[[Request], Coroutine[Any, Any, Answer | None]]
    calls: LoopCalls
    requests: RequestLog
    tls: TlsContext
    way: Way


class _Body:
    """A number of bytes for h11 to count: the bytes themselves do not go through it."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class BlobConnection:
    """One client's connection."""

    def __init__(
        self, service: Service, client: str, out: TlsOutlet, *, tunnelled: bool, on_close: Callable[[], object]
    ) -> None:
        """With `tunnelled`, the client waits for the answer to its CONNECT. `on_close` is called on the loop."""
        self._service = service
        self._client = client
        self._out = out
        self._tunnelled = tunnelled
        self._on_close = on_close
        self._is_open = False
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=LONGEST_HEAD)
        self._passing = PassThrough(service.way, out)

    # --- for byte_threads

    @property
    def deadline(self) -> float:
        return self._out.deadline

    @deadline.setter
    def deadline(self, until: float) -> None:
        self._out.deadline = until

    def fileno(self) -> int:
        return self._out.sock.fileno()

    def run(self) -> bool:
        self.deadline = math.inf
        try:
            if not self._is_open:
                self._open()
            while self._wait_for_head():
                if not self._exchange():
                    self._out.say_goodbye()
                    return False
        except ClientGone:
            return False
        return self._h11.our_state is h11.IDLE

    def stop(self) -> None:
        is_late = self.deadline < time.monotonic()
        self._out.stop("client took too little for too long" if is_late else "the cache is shutting down")

    def close(self) -> None:
        self._passing.close()
        self._out.close()
        self._service.calls.soon(self._on_close)

    # --- the beginning

    def _open(self) -> None:
        self.deadline = time.monotonic() + HANDSHAKE_S
        if self._tunnelled:
            self._out.greet(ESTABLISHED)
        try:
            self._out.handshake(self._service.tls.current)
        except SSL.Error as error:
            reasons = "; ".join(reason for *_, reason in error.args[0])
            said = "client %s did not accept our certificate for %s (%s): does it trust the CA?"
            if "alert" not in reasons:
                said = "client %s does not speak TLS to %s as we do (%s)"
            _log.warning(said, self._client, self._service.host, reasons)
            raise ClientGone(reasons) from None
        self.deadline = math.inf
        self._is_open = True

    # --- requests

    def _wait_for_head(self) -> bool:
        """Return whether the next request has begun to arrive; False if none did for LINGER_S, or none will."""
        if self._h11.trailing_data[0]:
            return True
        if not self._out.readable(LINGER_S):
            return False
        if self._h11.their_state is not h11.IDLE:
            return False
        data = self._out.read(HEAD_S)
        if not data:
            self._h11.receive_data(b"")
            raise ClientGone("client disconnected")
        self._h11.receive_data(data)
        return True

    def _exchange(self) -> bool:
        """Answer one request; return whether another one may follow."""
        request: h11.Request | None = None
        try:
            request = self._next_request()
            target = self._check_names(request)
            if _has_body(request) or (reply := self._decide(request, target)) is None:
                self._pass_on(request)
            else:
                self._skip_request()
                self._reply(request, target, *reply)
        except h11.RemoteProtocolError as error:
            # Its own words quote what was received, with credentials and signed queries.
            what = "head" if request is None else "body"
            message = f"expected the {what} of a request of HTTP/1.1, got something else; the client has to be mended"
            return self._refuse(request, error.error_status_hint, message)
        except Misdirected as error:
            return self._refuse(request, error.status_hint, str(error))
        if self._h11.our_state is self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            return True
        return False

    def _next_request(self) -> h11.Request:
        until = time.monotonic() + HEAD_S
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(self._out.read(until - time.monotonic()))
        if not isinstance(event, h11.Request):
            raise ClientGone("client disconnected")
        return event

    def _check_names(self, request: h11.Request) -> str:
        """Return the target in origin form. Misdirected unless all names are the blob host's (RFC 9110 section
        15.5.20).
        """
        target, host = request.target.decode("latin-1"), self._service.host
        names = {"SNI": self._out.server_name, "Host": None}
        for field, value in request.headers:
            if field == b"host":
                names["Host"] = _name(value)
        if not target.startswith("/"):
            scheme, _, rest = target.partition("://")
            authority, slash, path = rest.partition("/")
            # Not the target itself: its query may be signed.
            is_https = scheme.lower() == "https"
            names["the request target"] = _name(authority.encode("latin-1")) if is_https else "no address with https"
            target = slash + path
        for kind, name in names.items():
            if name is not None and name.lower().rstrip(".") != host:
                raise Misdirected(f"expected {kind} {host}, got {name!r}")
        return target

    def _decide(self, request: h11.Request, target: str) -> tuple[Answer, FileSpan | None] | None:
        """Return the answer, and the first bytes of its body if all are here; None for a request to pass through."""
        if request.method not in (b"GET", b"HEAD"):
            return None
        headers: dict[str, str] = {}
        for field, value in request.headers:
            name, text = field.decode("latin-1"), value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        method = request.method.decode("latin-1")
        asked = Request(
            method,
            "https",
            self._service.host,
            target,
            headers,
            client=self._client,
            tunnelled=self._tunnelled,
        )
        return self._service.calls.wait(self._answer(asked), self._out.is_gone, _discard)

    async def _answer(self, asked: Request) -> tuple[Answer, FileSpan | None] | None:
        """On the loop."""
        try:
            answer = await self._service.answer(asked)
        except Exception:
            # Never upstream's bytes by accident, never text that ends in a model file.
            _log.exception("answering %s failed", asked.target.partition("?")[0])
            answer = Answer(502, CacheStatus(Outcome.MISS))
        if answer is None:
            return None
        first = await take(answer.body, 0.0) if isinstance(answer.body, Reader) and answer.body.is_complete else None
        return answer, first if isinstance(first, FileSpan) else None

    def _skip_request(self) -> None:
        event = self._h11.next_event()
        assert isinstance(event, h11.EndOfMessage)

    # --- answers

    def _reply(self, request: h11.Request, target: str, answer: Answer, first: FileSpan | None) -> None:
        line = (self._client, request.method.decode("latin-1"), target)
        body = answer.body
        reader = body if isinstance(body, Reader) else None
        began, sending = time.monotonic(), Sending()
        try:
            if not isinstance(body, Reader):
                self._send_head(answer)
                if body and request.method != b"HEAD":
                    self._out.hold(self._h11.send(h11.Data(data=body)) or b"")
                self._finish()
                return
            source = LoopReader(body, self._service.calls, first)
            if answer.held:
                try:
                    source.wait_whole(self._out.is_gone)
                except CacheError as error:
                    answer = failure(error)
                    self._send_head(answer)
                    self._finish()
                    return
            self._send_head(answer)
            send(source, self._out, sending)
            if not sending.problem:
                self._h11.send_with_data_passthrough(h11.Data(data=_Body(answer.length)))  # type: ignore[arg-type]
                self._finish()
        except ClientGone as error:
            sending.problem = str(error)
            raise
        finally:
            seconds = time.monotonic() - began
            self._service.calls.soon(self._note, line, answer, reader, sending, seconds)
        if sending.problem:
            self._h11.send_failed()

    def _note(
        self, line: tuple[str, str, str], answer: Answer, reader: Reader | None, sending: Sending, seconds: float
    ) -> None:
        """Release the reader, and report how the request ended. Called on the loop."""
        if reader is None:
            self._service.requests.answer(*line, answer.status, answer.cache)
            return
        reader.sent = sending.sent
        reader.close()
        self._service.requests.transfer(
            *line, answer.status, answer.cache, sent=sending.sent, seconds=seconds, problem=sending.problem
        )

    def _send_head(self, answer: Answer) -> None:
        """Hold the head back, to send it with the first bytes of the body."""
        fields = [*answer.headers, ("Cache-Status", str(answer.cache)), ("Content-Length", str(answer.length))]
        self._begin(answer.status, fields)

    def _begin(self, status: int, fields: Sequence[tuple[str, str]]) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        self._out.hold(self._h11.send(h11.Response(status_code=status, headers=headers)) or b"")

    def _finish(self) -> None:
        self._out.hold(self._h11.send(h11.EndOfMessage()) or b"")
        self._out.flush()

    def _refuse(self, request: h11.Request | None, status: int, message: str) -> bool:
        """Answer with the reason, and end the connection; no text on a route whose body a client would store."""
        _log.warning("%s", message)
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = message.encode() + b"\n"
            fields = [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), ("Connection", "close")]
            self._begin(status, fields)
            if request is None or request.method != b"HEAD":
                self._out.hold(self._h11.send(h11.Data(data=body)) or b"")
            self._out.flush()
        return False

    # --- what is not ours

    def _pass_on(self, request: h11.Request) -> None:
        target = request.target.decode("latin-1")
        cache = CacheStatus(Outcome.BYPASS)
        try:
            status = self._passing.exchange(self._h11, request)
        except PassThroughBroken as error:
            status = error.status
            _log.info("%s %s: %s", request.method.decode(), target.partition("?")[0], error)
            self._h11.send_failed()
        except CacheError as error:
            if self._h11.our_state is not h11.SEND_RESPONSE:
                raise ClientGone(str(error)) from None
            answer = failure(error)
            status, cache = answer.status, answer.cache
            self._begin(status, [("Cache-Status", str(cache)), ("Content-Length", "0")])
            self._finish()
        line = (self._client, request.method.decode("latin-1"), target, status, cache)
        self._service.calls.soon(self._service.requests.answer, *line)


def _has_body(request: h11.Request) -> bool:
    """Return whether something follows the head."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in request.headers
    )


def _name(authority: bytes) -> str:
    """Return the host of an authority, without user and port."""
    text = authority.decode("latin-1").rpartition("@")[2]
    try:
        return urlsplit(f"//{text}").hostname or text
    except ValueError:
        return text


def _discard(reply: tuple[Answer, FileSpan | None] | None) -> None:
    """Release an answer that the client did not wait for. Called on the loop."""
    if reply is not None and isinstance(reply[0].body, Reader):
        reply[0].body.close()
