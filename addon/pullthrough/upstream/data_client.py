"""Requests to other servers, from threads: HTTP/1.1 over connections that are kept for the next request.

Invariant: a connection is used again only after exactly one whole response was read from it; heads are bounded. No
message quotes the request or the response.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import h11
from multidict import CIMultiDict

from pullthrough.config.settings import Endpoint
from pullthrough.core.errors import UnexpectedResponse, UpstreamError, UpstreamUnreachable
from pullthrough.runtime.executors import Crew
from pullthrough.upstream.dialer import Caller, Dialed, Dialer, translated

_log = logging.getLogger(__name__)

MOST: Final = 128
"""Threads for all hosts together: so many that fetch blobs, and so many that ask registries."""

KEPT_S: Final = 30.0
"""How long an idle connection is kept."""
PIECE: Final = 1 << 20
"""The most bytes handed on at once, when they come fast."""
GATHER_S: Final = 0.01
"""A slow connection delivers 16 KiB TLS records: waiting this long for more saves most writes."""
HELD_S: Final = 0.1
"""The longest that received bytes are held back: readers wait for them."""

PROXY_AUTHENTICATION_REQUIRED: Final = 407
"""Never a registry's own answer, which comes through a tunnel (RFC 9110 section 15.5.8)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request without a body, which may be sent again."""

    endpoint: Endpoint
    target: str
    """Path and query, as they go over the wire."""
    headers: Mapping[str, str]
    silent_s: float
    """How long the server may send nothing."""
    method: str = "GET"

    @property
    def host(self) -> str:
        """The Host field, without the scheme's default port (RFC 9110 section 4.2.3)."""
        here = self.endpoint
        is_usual = here.port == {"https": 443, "http": 80}.get(here.scheme)
        return here.authority.removesuffix(f":{here.port}") if is_usual else here.authority


class DataResponse:
    """A response whose body has yet to be read. `close` it."""

    def __init__(
        self, keep: "DataClient", ask: Ask, line: Dialed, caller: Caller, head: h11.Response, connection: h11.Connection
    ) -> None:
        """`connection` has read the head, and holds the part of the body that came with it."""
        self.status = head.status_code
        self.headers = CIMultiDict((name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers)
        self._keep = keep
        self._ask = ask
        self._line: Dialed | None = line
        self._caller = caller
        self._connection = connection
        self._body = memoryview(connection.trailing_data[0])
        tokens = self.headers.get("Connection", "").lower().split(",")
        self._persists = head.http_version == b"1.1" and "close" not in (token.strip() for token in tokens)

    @property
    def silent_s(self) -> float:
        """How long the server may send nothing."""
        return self._ask.silent_s

    def stop(self) -> None:
        """Unblock the thread that reads the response, from another thread."""
        self._caller.stop()

    def pause(self, seconds: float) -> None:
        """Sleep. Raises UpstreamUnreachable once stopped."""
        self._caller.pause(seconds)

    def take(self, buffer: memoryview) -> int | None:
        """Read what has come; 0 at the end of the connection, None if nothing has come. Raises OSError if it fails."""
        if self._body:
            count = min(len(self._body), len(buffer))
            buffer[:count] = self._body[:count]
            self._body = self._body[count:]
            return count
        assert self._line is not None
        return self._line.take(buffer)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `take` may have more. Return False if nothing comes within `timeout_s`, by default `silent_s`."""
        assert self._line is not None
        return self._line.wait(self._ask.silent_s if timeout_s is None else timeout_s)

    def text(self, limit: int) -> bytes | None:
        """Return the body, however framed, of a response without a blob; None if it is longer than `limit`.

        Raises UpstreamError if the body breaks off.
        """
        assert self._line is not None
        found, buffer = bytearray(), memoryview(bytearray(16 << 10))
        with translated():
            while len(found) <= limit:
                match self._connection.next_event():
                    case h11.NEED_DATA:
                        count = self._line.read_into(buffer, self._ask.silent_s)
                        self._connection.receive_data(bytes(buffer[:count]))
                    case h11.Data() as event:
                        found += event.data
                    case _:
                        self._end()
                        return bytes(found)
        return None

    def skip(self) -> None:
        """Discard the body: keep the connection if the whole body came with the head, else close it."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while isinstance(event := self._connection.next_event(), h11.Data):
                pass
            if isinstance(event, h11.EndOfMessage):
                self._end()
        self.close()

    def _end(self) -> None:
        """Finish once the parser has seen the end of the body."""
        self._persists = self._persists and not self._connection.trailing_data[0]
        self._body = memoryview(b"")
        self.finish()

    def finish(self) -> None:
        """Keep the connection after the whole body was read. Raises UnexpectedResponse if more than the body came."""
        if self._body:
            self.close()
            raise UnexpectedResponse("expected the end of the body, got more")
        line, self._line = self._line, None
        if line is not None:
            self._caller.watch(None)
            if self._persists:
                self._keep.put(self._ask.endpoint, line)
            else:
                line.close()

    def close(self) -> None:
        """Close the connection, unless it is kept."""
        line, self._line = self._line, None
        if line is not None:
            line.close()


class DataClient:
    """The connections that wait for the next request."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._lock = threading.Lock()
        self._kept: defaultdict[Endpoint, deque[Dialed]] = defaultdict(deque)
        self._closed = False

    def get(self, ask: Ask, caller: Caller) -> DataResponse:
        """Return the response's head, on a kept connection or a new one. Blocks until it comes or `caller` is stopped.

        Raises UpstreamUnreachable, UpstreamTimeout, UnexpectedResponse or AddressRefused.
        """
        while (line := self._take(ask.endpoint)) is not None:
            # If the server has just closed it, it fails before any byte comes, and a new one is opened.
            if (response := self._exchange(ask, line, caller, is_kept=True)) is not None:
                return response
        line = self._dialer.dial(ask.endpoint, caller)
        response = self._exchange(ask, line, caller, is_kept=False)
        assert response is not None
        return response

    def _exchange(self, ask: Ask, line: Dialed, caller: Caller, *, is_kept: bool) -> DataResponse | None:
        """Send the request and read the response's head; None if a kept connection ended before any answer."""
        has_come = False
        try:
            caller.watch(line.sock)
            with translated():
                connection = h11.Connection(h11.CLIENT)
                line.write(_request(connection, ask, line))
                buffer = memoryview(bytearray(16 << 10))
                while True:
                    event = connection.next_event()
                    if isinstance(event, h11.Response):
                        break
                    if event is h11.NEED_DATA:
                        count = line.read_into(buffer, ask.silent_s)
                        if not count:
                            raise UpstreamUnreachable("expected a response, got the end of the connection")
                        has_come = True
                        connection.receive_data(bytes(buffer[:count]))
            if event.status_code == PROXY_AUTHENTICATION_REQUIRED and line.proxy is not None:
                raise UpstreamUnreachable(f"parent proxy {line.proxy.origin} answered {event.status_code}")
            response = DataResponse(self, ask, line, caller, event, connection)
            if {"Transfer-Encoding", "Content-Length"} <= response.headers.keys():
                # RFC 9112 section 6.3: a message with both can be read in two ways.
                raise UpstreamUnreachable("expected one length of the body, got two")
            return response
        except UpstreamUnreachable:
            line.close()
            if is_kept and not has_come and not caller.stopped:
                return None
            raise
        except BaseException:
            line.close()
            raise

    def _take(self, endpoint: Endpoint) -> Dialed | None:
        self.expire()
        while True:
            with self._lock:
                if not self._kept[endpoint]:
                    return None
                line = self._kept[endpoint].pop()
            if line.is_idle:
                return line
            line.close()

    def put(self, endpoint: Endpoint, line: Dialed) -> None:
        """Keep a connection for the next request."""
        line.used = time.monotonic()
        with self._lock:
            if not self._closed:
                self._kept[endpoint].append(line)
                return
        line.close()

    def expire(self, *, everything: bool = False) -> None:
        """Close the connections that have been idle for KEPT_S, or all of them."""
        before = time.monotonic() - KEPT_S
        old: list[Dialed] = []
        with self._lock:
            for endpoint, lines in list(self._kept.items()):
                while lines and (everything or lines[0].used < before):
                    old.append(lines.popleft())
                if not lines:
                    del self._kept[endpoint]
        for line in old:
            line.close()

    def close(self) -> None:
        """Close the kept connections, and keep no more."""
        with self._lock:
            self._closed = True
        self.expire(everything=True)


class Getting:
    """The threads' client, as the event loop sees it. `open` it inside the running loop, `close` it at the end."""

    def __init__(self, dialer: Dialer) -> None:
        self.crew = Crew(MOST)
        self._dialer = dialer
        self._client = DataClient(dialer)
        self._sweep: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Begin to close idle connections from time to time."""
        self._client.expire()
        self._sweep = asyncio.get_running_loop().call_later(KEPT_S / 3, self.open)

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._client.close()

    async def get(self, ask: Ask) -> DataResponse:
        """Do what the client's `get` does; a caller that is cancelled need not wait."""
        caller = Caller()
        return await self.crew.run_or_leave(lambda: self._client.get(ask, caller), caller.stop, DataResponse.close)

    async def knock(self, endpoint: Endpoint) -> None:
        """Connect, and hang up. Raises UpstreamUnreachable, UpstreamTimeout or AddressRefused."""
        caller = Caller()
        line = await self.crew.run_or_leave(lambda: self._dialer.dial(endpoint, caller), caller.stop, Dialed.close)
        line.close()

    async def text(self, response: DataResponse, limit: int) -> bytes | None:
        """Return what the response's `text` returns."""
        return await self.crew.run(lambda: response.text(limit), response.stop)

    async def refusal(self, response: DataResponse, limit: int) -> bytes:
        """Return the body that tells who sent a response of 400 or above, and close the response; b"" if the body is
        longer than `limit` or does not end in time.
        """
        try:
            async with asyncio.timeout(response.silent_s):
                return await self.text(response, limit) or b""
        except (UpstreamError, TimeoutError) as error:
            # A missing body proves nothing.
            _log.debug("a refusal broke off: %s", error)
            return b""
        finally:
            response.close()


def _request(connection: h11.Connection, ask: Ask, line: Dialed) -> bytes:
    """Return the request's head. Raises UnexpectedResponse if the target cannot be put into a request."""
    target = ask.target if line.proxy is None else f"{ask.endpoint.scheme}://{ask.host}{ask.target}"
    fields = {"Host": ask.host, **ask.headers, **(line.proxy.fields if line.proxy is not None else {})}
    try:
        # The client's bytes as they were: they need not be ASCII.
        headers = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in fields.items()]
        head = connection.send(h11.Request(method=ask.method, target=target, headers=headers)) or b""
    except (h11.LocalProtocolError, UnicodeError) as error:
        raise UnexpectedResponse(
            f"expected an address that can be used, got one that cannot ({type(error).__name__})"
        ) from None
    return head + (connection.send(h11.EndOfMessage()) or b"")
