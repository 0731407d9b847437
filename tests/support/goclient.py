"""Go's HTTP client as Ollama uses it, and the frame that every emulated pull runs in.

Invariant: a request carries the fields that net/http and the real client put on it and no others, redirects are
followed by the rules of net/http, and a body that ends early is an error of the class that Go gives it. Speaks
HTTP/1.1 only, as the real client does to a server that selects no h2. What has no time limit in the real client
gets `patience_s`, so that a test ends.
Knows no order of requests and no registry: that is the business of a2, legacy, client2 and transfer.
"""

import builtins
import contextlib
import json
import ssl
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import SplitResult, urljoin, urlsplit

from tests.support.http1 import (
    ClosedBeforeResponse,
    Connection,
    ConnectRefused,
    Resolve,
    Response,
    client_context,
    connect,
)

DEFAULT_HOST: Final = "registry.ollama.ai"
GO_USER_AGENT: Final = "Go-http-client/1.1"
_IDLE_PER_HOST: Final = 2
"""http.DefaultMaxIdleConnsPerHost."""
_SLURP: Final = 2048
"""maxBodySlurpSize of net/http, in bytes."""
_COPY_BUFFER: Final = 256 * 1024
"""Bytes; io.Copy takes 32 KiB, at which Python would be the limit."""
_CONNECT_TIMEOUT_S: Final = 30.0
"""The dial timeout of http.DefaultTransport."""
_FAMILY: Final = ("ollama.com", "ollama.ai", "hf.co", "huggingface.co")
"""allowedRedirectHosts of server/images.go since v0.34.3."""

Fields = list[tuple[str, str]]


# --- errors


class PullError(Exception):
    """The pull failed; the message is the real client's."""


class DigestMismatch(PullError):
    """A downloaded file does not hash to its name; it has been deleted."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"digest mismatch, file must be downloaded again: want {expected}, got {actual}")
        self.expected = expected
        self.actual = actual


class MaxRetriesExceeded(PullError):
    """Something failed as often as it is tried."""


class Aborted(PullError):
    """The pull was cancelled (Ctrl-C); what was saved is what the real client saves."""


class Crashed(PullError):
    """The real daemon panics here; the message is the panic's."""


class OutOfPatience(PullError):
    """The real client would wait on; an emulator does not."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(f"nothing within the {patience_s} s this emulator waits")


class FailedRequest(PullError):
    """One request failed: it got no response, or one that is an error."""


class Cancelled(Exception):
    """context.Canceled."""


class UnexpectedEOF(Exception):
    """io.ErrUnexpectedEOF: a body was cut. That it ended in good order but early is the builtin EOFError, io.EOF."""

    def __init__(self) -> None:
        super().__init__("unexpected EOF")


NETWORK: Final = (OSError, EOFError, UnexpectedEOF, ConnectRefused)
"""What a request or the copy of its body ends with when it fails. ssl.SSLError is an OSError."""


# --- what a pull is called, and how it went


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model name with its defaults filled in."""

    scheme: str
    host: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, text: str, *, insecure: bool = False) -> "ModelName":
        """`[scheme://][host/][namespace/]model[:tag]`; `insecure` makes it http (makeRequest of server/images.go)."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = "https", text
        if insecure:
            scheme = "http"
        *folders, last = rest.split("/")
        model, _colon, tag = last.partition(":")
        host = folders[0] if len(folders) == 2 else DEFAULT_HOST
        namespace = folders[-1] if folders else "library"
        return cls(scheme, host, f"{namespace}/{model}", tag or "latest")

    def url(self, kind: str, reference: str) -> str:
        """The address of a manifest, blob or list of chunksums."""
        return f"{self.scheme}://{self.host}/v2/{self.repository}/{kind}/{reference}"


@dataclass(frozen=True, slots=True)
class Layer:
    """A descriptor of a manifest."""

    digest: str
    size: int
    media_type: str = ""


def layers_of(manifest: bytes) -> list[Layer]:
    """The layers, and the config last. ValueError when the manifest is none."""
    document = json.loads(manifest)
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {manifest[:100]!r}")
    descriptors = [*(document.get("layers") or []), document.get("config") or {}]
    return [
        Layer(each["digest"], each.get("size", 0), each.get("mediaType", ""))
        for each in descriptors
        if each.get("digest")
    ]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request of a pull."""

    method: str
    url: str
    range: str | None
    status: int
    """0 when no response came."""
    headers: tuple[tuple[str, str], ...]
    """Of the response."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """How a pull went."""

    digests: tuple[str, ...]
    """Of the blobs this pull downloaded, in order; not those that were there."""
    bytes: int
    """Body bytes of blob requests, including what was thrown away."""
    retries: int
    """Tries after the first one that were counted."""
    stalls: int
    max_gap_s: float
    """The longest time that any body made its reader wait for the next (or first) byte."""
    requests: tuple[Exchange, ...]
    transfer_s: float
    """Until the last blob was complete."""
    seconds: float
    """Until its digests were verified too, which each client does on its own machine."""
    manifest: builtins.bytes


@dataclass(slots=True)
class Tally:
    """What the threads of one pull count together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    bytes: int = 0
    retries: int = 0
    stalls: int = 0
    max_gap_s: float = 0.0
    requests: list[Exchange] = field(default_factory=list)
    transferred: float = 0.0

    def retry(self) -> None:
        """Count a retry."""
        with self.lock:
            self.retries += 1

    def stall(self) -> None:
        """Count a stall."""
        with self.lock:
            self.stalls += 1

    def gap(self, seconds: float) -> None:
        """Note how long a reader waited."""
        with self.lock:
            self.max_gap_s = max(self.max_gap_s, seconds)


# --- redirects

RedirectPolicy = Callable[[SplitResult, SplitResult, int], bool | str]
"""http.Client.CheckRedirect: (first URL, target, requests so far) -> follow, keep the 3xx response, or fail with
this message."""


def follow(_first: SplitResult, _target: SplitResult, via: int) -> bool | str:
    """defaultCheckRedirect of net/http."""
    return "stopped after 10 redirects" if via >= 10 else True


def keep(_first: SplitResult, _target: SplitResult, _via: int) -> bool | str:
    """http.ErrUseLastResponse, always."""
    return False


def same_host(first: SplitResult, target: SplitResult, via: int) -> bool | str:
    """makeRequest of v0.34.2: host and port stay the same."""
    if via > 10:
        return "maximum redirects exceeded (10) for directURL"
    return first.netloc == target.netloc or "blocked redirect to a different host"


def same_family(first: SplitResult, target: SplitResult, via: int) -> bool | str:
    """makeRequest since v0.34.3: as `same_host`, and between names under Ollama's and Hugging Face's domains."""
    if via <= 10 and all(_is_family(end.hostname or "") for end in (first, target)):
        return True
    return same_host(first, target, via)


def _is_family(hostname: str) -> bool:
    return any(hostname == name or hostname.endswith(f".{name}") for name in _FAMILY)


def redirected_fields(fields: Fields, first: str, previous: str, target: str) -> Fields:
    """The fields of a request after a redirect (net/http/client.go, Go 1.20 to 1.27).

    All are repeated, Range too. Authorization goes only to the first host and its subdomains, whatever the port;
    once dropped it stays away, which Go older than 1.22.11 did not do. Referer is not told to http by https.
    """
    own, other = urlsplit(first).hostname or "", urlsplit(target).hostname or ""
    is_own = other == own or (other.endswith(f".{own}") and ":" not in other)
    dropped = {"referer"} if is_own else {"referer", "authorization"}
    fields = [(name, value) for name, value in fields if name.lower() not in dropped]
    if not (previous.startswith("https:") and target.startswith("http:")):
        fields.append(("Referer", previous))
    return fields


# --- cancellation


class Cancellation:
    """context.Context: to cancel it ends the connections in use below it, and those to come."""

    def __init__(self, parent: "Cancellation | None" = None) -> None:
        self._lock = threading.Lock()
        """A parent's is taken before a child's."""
        self._event = threading.Event()
        self._connections: set[Connection] = set()
        self._children: list[Cancellation] = []
        if parent is not None:
            with parent._lock:
                parent._children.append(self)
                if parent.is_cancelled:
                    self.cancel()

    @property
    def is_cancelled(self) -> bool:
        """It has been cancelled."""
        return self._event.is_set()

    def cancel(self) -> None:
        """From any thread."""
        with self._lock:
            self._event.set()
            for connection in self._connections:
                connection.abort()
            for child in self._children:
                child.cancel()

    def check(self) -> None:
        """Raise Cancelled when it is."""
        if self.is_cancelled:
            raise Cancelled

    def wait(self, seconds: float) -> None:
        """Sleep; Cancelled ends it."""
        if self._event.wait(seconds):
            raise Cancelled

    def attach(self, connection: Connection) -> None:
        """A connection is in use from now on."""
        with self._lock:
            self._connections.add(connection)
            if self.is_cancelled:
                connection.abort()

    def detach(self, connection: Connection) -> None:
        """A connection is no longer in use."""
        with self._lock:
            self._connections.discard(connection)


class Group(Cancellation):
    """errgroup.Group: jobs that run together; unless told otherwise the first to fail cancels the others."""

    def __init__(self, parent: Cancellation, *, cancels: bool = True) -> None:
        super().__init__(parent)
        self._cancels = cancels
        self._first: BaseException | None = None

    def run(self, jobs: Iterable[Callable[[], None]], *, limit: int) -> None:
        """Return when all are over, at most `limit` at a time; the first error is raised then."""
        with ThreadPoolExecutor(limit, thread_name_prefix="pull") as pool:
            try:
                for job in jobs:
                    pool.submit(self._run, job)
            except BaseException:
                self.cancel()
                raise
        if self._first is not None:
            raise self._first

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            with self._lock:
                self._first = self._first or error
            if self._cancels:
                self.cancel()


# --- connections and exchanges


class Transport:
    """http.Transport: connections by host, some of them idle."""

    def __init__(
        self,
        proxy_url: str | None,
        context: ssl.SSLContext,
        resolve: Resolve | None,
        idle_per_host: int,
        *,
        no_proxy: Sequence[str] = (),
        pin: Callable[[str], str] | None = None,
    ) -> None:
        """`no_proxy` names hosts (with all below them) that are asked directly.

        `pin` says which address of a name is dialled directly, or raises; it is looked up in `resolve` then.
        """
        self._proxy_url = proxy_url
        self._no_proxy = no_proxy
        self._pin = pin
        self._context = context
        self._resolve = resolve
        self._idle_per_host = idle_per_host
        self._lock = threading.Lock()
        self._idle: dict[str, list[Connection]] = {}

    def uses_proxy(self, url: str) -> bool:
        """ProxyFromEnvironment: there is a proxy for this address.

        This machine is never asked through one (golang.org/x/net/http/httpproxy, useProxy).
        """
        host = urlsplit(url).hostname or ""
        is_loopback = host == "localhost" or host == "::1" or host.startswith("127.")
        is_exempt = any(host == name or host.endswith(f".{name}") for name in self._no_proxy)
        return self._proxy_url is not None and not is_loopback and not is_exempt

    def acquire(self, url: str, deadline: float) -> tuple[Connection, bool]:
        """A connection, and whether it is a fresh one."""
        split = urlsplit(url)
        host = split.hostname or ""
        while True:
            with self._lock:
                idle = self._idle.get(split.netloc)
                kept = idle.pop() if idle else None
            if kept is None:
                break
            if kept.is_reusable:
                return kept, False
            kept.close()
        is_tls = split.scheme == "https"
        port = split.port or (443 if is_tls else 80)
        proxy_url = self._proxy_url if self.uses_proxy(url) else None
        resolve = self._resolve or {}
        if self._pin is not None and proxy_url is None:
            address = (self._pin(host), port)
            resolve = {(host, port): resolve.get(address, address)}
        dial_deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        try:
            connection = connect(
                proxy_url,
                host,
                port,
                None,
                context=self._context if is_tls else None,
                timeout_s=None,
                deadline=min(dial_deadline, deadline),
                resolve=resolve,
            )
        except TimeoutError:
            if time.monotonic() >= dial_deadline:
                raise ConnectionAbortedError("dial tcp: i/o timeout") from None
            raise
        except ClosedBeforeResponse as error:
            # By the proxy, in place of an answer to CONNECT.
            raise _go_error(error) from None
        return connection, True

    def release(self, url: str, connection: Connection) -> None:
        """Take a connection back; it is kept when its response is over and allows it, as Go's Body.Close does."""
        netloc = urlsplit(url).netloc
        connection.set_deadline(None)
        with self._lock:
            idle = self._idle.setdefault(netloc, [])
            if connection.is_reusable and len(idle) < self._idle_per_host:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            kept = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in kept:
            connection.close()


class Reply:
    """A response and the connection it arrives on, until `close`. Used by one thread."""

    def __init__(
        self,
        url: str,
        fields: Fields,
        response: Response,
        connection: Connection,
        transport: Transport,
        scope: Cancellation,
        asked: float,
        patience_s: float | None,
    ) -> None:
        self.url = url
        """Of the last request, after redirects."""
        self.fields = fields
        """Of the last request, but for those of the transport."""
        self.response = response
        self.connection = connection
        self.asked = asked
        """When (time.monotonic) the last request was sent."""
        self._transport = transport
        self._scope = scope
        self._patience_s = patience_s
        """None when the deadline is not that of patience."""

    @property
    def status(self) -> int:
        """The status code."""
        return self.response.status

    def header(self, name: str) -> str:
        """The value of a field, empty when absent."""
        return self.response.header(name) or ""

    def readinto(self, view: memoryview) -> int:
        """Some of the body as it is on the wire; 0 at its proper end, and else the error that Go has for the end."""
        # An aborted connection still gives what had already come.
        self._scope.check()
        try:
            count = self.response.readinto(view)
        except TimeoutError as error:
            if self._patience_s is None:
                raise
            raise OutOfPatience(self._patience_s) from error
        if not count and self.response.closed_short:
            self._scope.check()
            if self.response.ended == "rst":
                raise ConnectionResetError("read: connection reset by peer")
            raise UnexpectedEOF
        return count

    def pieces(self, limit: int | None = None) -> Iterator[bytes]:
        """The body, of which no more than `limit` bytes are read; gzip that the transport asked for is undone."""
        gunzip = None
        is_ranged = any(name == "Range" for name, _value in self.fields)
        if not is_ranged and self.header("Content-Encoding").lower() == "gzip":
            gunzip = zlib.decompressobj(wbits=31)
        buffer = memoryview(bytearray(_COPY_BUFFER))
        left = len(buffer) if limit is None else limit
        while left and (count := self.readinto(buffer[:left])):
            left -= count if limit is not None else 0
            yield gunzip.decompress(buffer[:count]) if gunzip else bytes(buffer[:count])
        if gunzip and not gunzip.eof:
            raise UnexpectedEOF

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self.pieces())

    def close(self) -> None:
        """Be done with it: the connection is kept only if the body has been read to its end."""
        self._scope.detach(self.connection)
        self._transport.release(self.url, self.connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- a client


class PullClient(ABC):
    """One daemon with its model directory; `pull` may be called again, also after an abort."""

    _no_proxy: Sequence[str] = ()
    """NO_PROXY."""

    insecure = False
    """--insecure of the next pulls. client2 does not look at it."""

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        patience_s: float,
        resolve: Resolve | None,
        abort_after: int | None,
        on_progress: Callable[[int], None] | None,
        idle_per_host: int = _IDLE_PER_HOST,
    ) -> None:
        """Without a proxy `resolve` says where a name is found. After `abort_after` body bytes a pull is aborted.

        `on_progress` gets the body bytes so far, from the threads of the bodies; its exceptions fail the pull.
        """
        self.directory = directory
        self.patience_s = patience_s
        self.abort_after = abort_after
        self.on_progress = on_progress
        self._tls = client_context(cafile)
        self._resolve = resolve
        self._proxy_url = proxy_url
        self._transports: list[Transport] = []
        self._transport = self._new_transport(proxy_url, idle_per_host)
        self._context = Cancellation()
        self._tally = Tally()

    # --- public

    def blob_path(self, digest: str) -> Path:
        """Where a blob is kept."""
        return self.directory / "blobs" / digest.replace(":", "-")

    def manifest_path(self, model: str) -> Path:
        """Where a manifest is kept."""
        name = ModelName.parse(model)
        return self.directory / "manifests" / name.host.replace(":", "_") / name.repository / name.tag

    def abort(self) -> None:
        """Ctrl-C, from any thread: the pull that is under way raises Aborted."""
        self._context.cancel()

    def pull(self, model: str) -> PullReport:
        """`ollama pull`. PullError when the real one fails."""
        self._context = Cancellation()
        self._tally = Tally()
        started = time.monotonic()
        try:
            manifest, downloaded = self._pull(model)
        except (Cancelled, PullError, *NETWORK) as error:
            if self._context.is_cancelled:
                raise Aborted("context canceled") from None
            if isinstance(error, PullError):
                raise
            raise PullError(str(error)) from error
        finally:
            for transport in self._transports:
                transport.close()
        tally = self._tally
        return PullReport(
            digests=tuple(downloaded),
            bytes=tally.bytes,
            retries=tally.retries,
            stalls=tally.stalls,
            max_gap_s=tally.max_gap_s,
            requests=tuple(tally.requests),
            transfer_s=tally.transferred - started,
            seconds=time.monotonic() - started,
            manifest=manifest,
        )

    @property
    def requests(self) -> list[Exchange]:
        """The requests of the present or last pull, also of one that failed."""
        with self._tally.lock:
            return list(self._tally.requests)

    # --- for the generations

    @abstractmethod
    def _pull(self, model: str) -> tuple[bytes, list[str]]:
        """The manifest, and the digests of the blobs that were not there."""

    def _save_manifest(self, model: str, manifest: bytes) -> None:
        path = self.manifest_path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(manifest)

    def _new_transport(
        self, proxy_url: str | None, idle_per_host: int, pin: Callable[[str], str] | None = None
    ) -> Transport:
        transport = Transport(proxy_url, self._tls, self._resolve, idle_per_host, no_proxy=self._no_proxy, pin=pin)
        self._transports.append(transport)
        return transport

    def _progress(self, count: int) -> None:
        """Body bytes of a blob have come."""
        with self._tally.lock:
            self._tally.bytes += count
            total = self._tally.bytes
        if self.abort_after is not None and total >= self.abort_after:
            self.abort_after = None
            self.abort()
        if self.on_progress is not None:
            self.on_progress(total)

    def _pieces(self, reply: Reply, limit: int | None = None, *, timeout_s: float | None = None) -> Iterator[bytes]:
        """`Reply.pieces` of a blob, counted and timed.

        `timeout_s` is for each read but the first, which has the deadline of its request; None is patience.
        """
        since = reply.asked
        for piece in reply.pieces(limit):
            now = time.monotonic()
            reply.connection.set_deadline(now + (self.patience_s if timeout_s is None else timeout_s))
            self._tally.gap(now - since)
            self._progress(len(piece))
            yield piece
            since = time.monotonic()

    def _do(
        self,
        method: str,
        url: str,
        fields: Fields,
        *,
        redirects: RedirectPolicy = follow,
        deadline: float | None = None,
        scope: Cancellation | None = None,
        transport: Transport | None = None,
    ) -> Reply:
        """http.Client.Do: one of NETWORK without a response, FailedRequest when the policy refuses a redirect.

        `deadline` (time.monotonic) is for the response and stays set on its connection; TimeoutError beyond.
        None is patience, which ends in OutOfPatience.
        """
        start, via = url, 1
        while True:
            reply = self._round_trip(
                method, url, fields, deadline, scope or self._context, transport or self._transport
            )
            location = reply.header("Location")
            if reply.status not in (301, 302, 303, 307, 308) or not location:
                return reply
            target = urljoin(url, location)
            verdict = redirects(urlsplit(start), urlsplit(target), via)
            if verdict is False:
                return reply
            with reply, contextlib.suppress(*NETWORK):
                # Go reads a short body away, so that the connection can be kept.
                if (reply.response.content_length or 0) <= _SLURP:
                    reply.response.read(_SLURP)
            if isinstance(verdict, str):
                raise FailedRequest(f'{method.title()} "{target}": {verdict}')
            fields = redirected_fields(fields, start, url, target)
            url, via = target, via + 1

    def _round_trip(
        self, method: str, url: str, fields: Fields, given: float | None, scope: Cancellation, transport: Transport
    ) -> Reply:
        split = urlsplit(url)
        target = (split.path or "/") + (f"?{split.query}" if split.query else "")
        asked_range = dict(fields).get("Range")
        # Transport.roundTrip adds it, so that a redirect does not inherit it.
        encoding = [("Accept-Encoding", "gzip")] if method == "GET" and asked_range is None else []
        deadline = time.monotonic() + self.patience_s if given is None else given
        patience_s = self.patience_s if given is None else None
        status = 0
        headers: tuple[tuple[str, str], ...] = ()
        try:
            while True:
                scope.check()
                connection, is_fresh = transport.acquire(url, deadline)
                scope.attach(connection)
                try:
                    scope.check()
                    connection.set_deadline(deadline)
                    asked = time.monotonic()
                    response = connection.request(method, target, [*fields, *encoding])
                except BaseException as error:
                    scope.detach(connection)
                    connection.close()
                    if not isinstance(error, ClosedBeforeResponse | ConnectionError):
                        raise
                    scope.check()
                    # Go asks again on another connection when a kept-alive one was closed under its hands.
                    if is_fresh:
                        raise _go_error(error) from None
                else:
                    status, headers = response.status, tuple(response.headers)
                    return Reply(url, fields, response, connection, transport, scope, asked, patience_s)
        except TimeoutError as error:
            if patience_s is None:
                raise
            raise OutOfPatience(patience_s) from error
        finally:
            with self._tally.lock:
                self._tally.requests.append(Exchange(method, url, asked_range, status, headers))


def _go_error(error: ClosedBeforeResponse | ConnectionError) -> Exception:
    if isinstance(error, ConnectionError):
        return error
    return EOFError("EOF") if error.ended == "fin" else ConnectionResetError("read: connection reset by peer")
