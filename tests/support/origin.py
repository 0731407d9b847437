"""A fake Ollama registry and its blob CDN on loopback, over TLS, with counters, gates and faults.

Invariant: nothing is answered that the real servers would not answer, except where a `Fault` in
`Origin.faults` says so; every request is counted before it is answered, every body byte after it is written.
Knows nothing of the proxy under test or of any client.
"""

import contextlib
import datetime
import fcntl
import gzip
import hashlib
import ipaddress
import json
import os
import re
import secrets
import select
import socket
import ssl
import struct
import termios
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from enum import StrEnum
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Protocol, Self
from urllib.parse import parse_qs, quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

REGISTRY_HOST: Final = "registry.ollama.ai"
R2_HOST: Final = "dd20bb891979d25aebc8bec07b2b3bbc.r2.cloudflarestorage.com"
REGISTRY_COM: Final = "registry.ollama.com"
"""The registry's second name."""
PUBLIC_ADDRESSES: Final = {
    REGISTRY_HOST: ("104.21.75.227",),
    REGISTRY_COM: ("104.21.75.227",),
    R2_HOST: ("172.64.66.1", "2606:4700::1"),
}
"""What the real DNS says, for clients that judge addresses; `Origin.resolve` leads from there to the origin."""
GOOD_TOKEN: Final = "good-token"

MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
LIST_TYPE: Final = "application/vnd.ollama.manifest.list.v2+json"
CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
MODEL_TYPE: Final = "application/vnd.ollama.image.model"
TEMPLATE_TYPE: Final = "application/vnd.ollama.image.template"
PARAMS_TYPE: Final = "application/vnd.ollama.image.params"
LICENSE_TYPE: Final = "application/vnd.ollama.image.license"

Listener = Literal["registry", "cdn"]

_MIB: Final = 1 << 20
_PIECE: Final = 256 * 1024
"""Bytes per write without a rate limit: large enough that Python is not the limit."""
_LIMITED_PIECE: Final = 64 * 1024
SEND_BUFFER: Final = 256 * 1024
"""SO_SNDBUF: without it the kernel grows the buffer to megabytes, and bytes nobody reads count as written."""
TRICKLE_RATE: Final = 16_000
"""Bytes a second."""
_CREDIT_S: Final = 0.05
"""How much lateness of a wake-up a token bucket makes up for; more would be a burst."""
_ANY_PORT: Final = ("127.0.0.1", 0)
_WAIT_S: Final = 20.0
_URL_LIFETIME_S: Final = 86_400


# --- content


class Source(Protocol):
    """Bytes of a known size that can be read anywhere."""

    @property
    def size(self) -> int:
        """The complete length."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of the half-open interval."""

    def sha256(self) -> str:
        """The digest of all bytes, as hex."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes held in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """The complete length."""
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of the half-open interval."""
        return self.data[start:stop]

    def sha256(self) -> str:
        """The digest of all bytes, as hex."""
        return hashlib.sha256(self.data).hexdigest()


@lru_cache(maxsize=8)
def _base_block(seed: int) -> bytes:
    """One pseudo-random MiB twice in a row, so that every rotation of it is one slice."""
    block = hashlib.shake_256(f"synthetic-{seed}".encode()).digest(_MIB)
    return block + block


@lru_cache(maxsize=64)
def _streamed_sha256(source: "Synthetic | Sparse") -> str:
    digest = hashlib.sha256()
    for start in range(0, source.size, 4 * _MIB):
        digest.update(source.read(start, min(start + 4 * _MIB, source.size)))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Incompressible bytes computed on demand: block i is the seed's random MiB, rotated by its own distance.

    Every block of the first TiB differs from every other, so a misplaced one changes the digest.
    """

    size: int
    seed: int = 0

    _STRIDE = 611_953
    """Odd, hence prime to the block size: the rotations of 2**20 consecutive blocks are all different."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of the half-open interval."""
        base = memoryview(_base_block(self.seed))
        stop = min(stop, self.size)
        pieces: list[memoryview] = []
        while start < stop:
            index, within = divmod(start, _MIB)
            length = min(_MIB - within, stop - start)
            offset = index * self._STRIDE % _MIB + within
            pieces.append(base[offset : offset + length])
            start += length
        return b"".join(pieces)

    def sha256(self) -> str:
        """The digest of all bytes, as hex."""
        return _streamed_sha256(self)


@dataclass(frozen=True, slots=True)
class Sparse:
    """Zero bytes."""

    size: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of the half-open interval."""
        return bytes(max(0, min(stop, self.size) - start))

    def sha256(self) -> str:
        """The digest of all bytes, as hex."""
        return _streamed_sha256(self)


# --- what a test steers


class Gate:
    """Holds whoever arrives until it is opened; countable, so that a test waits for arrivals.

    A pipe and not a threading.Event: the holder also has to see its client go away, which takes a poll.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        weakref.finalize(self, os.close, self._reader)
        weakref.finalize(self, os.close, self._writer)
        self._condition = threading.Condition()
        self._open = False
        self._held = 0

    def open(self) -> None:
        """Let everyone pass, now and later."""
        with self._condition:
            if not self._open:
                self._open = True
                os.write(self._writer, b"!")

    def set(self) -> None:
        """As threading.Event."""
        self.open()

    def is_set(self) -> bool:
        """As threading.Event: the gate is open."""
        return self._open

    @property
    def held(self) -> int:
        """How many requests wait here now."""
        return self._held

    def wait_held(self, count: int = 1, *, timeout_s: float = _WAIT_S) -> None:
        """Return when at least `count` requests wait here together."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._held >= count, timeout_s):
                raise TimeoutError(f"expected {count} held requests within {timeout_s} s, got {self._held}")

    def wait_empty(self, *, timeout_s: float = _WAIT_S) -> None:
        """Return when no request waits here: all were let through, or their clients left."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._held == 0, timeout_s):
                raise TimeoutError(f"expected no held request within {timeout_s} s, got {self._held}")

    def fileno(self) -> int:
        """Readable once the gate is open."""
        return self._reader

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Count the caller as held."""
        with self._condition:
            self._held += 1
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._held -= 1
                self._condition.notify_all()


class Mode(StrEnum):
    """What a fault does."""

    DROP = "drop"
    """RST instead of a response."""
    HANG = "hang"
    """No byte of the response until the fault's gate is opened."""
    STATUS = "status"
    """Answer `status` with `headers` and `body` instead."""
    RESET = "reset"
    """RST after `after` body bytes, all of which the peer has received."""
    TRUNCATE = "truncate"
    """close_notify and FIN after `after` body bytes."""
    STALL = "stall"
    """A pause after `after` body bytes, until the fault's gate is opened."""
    TRICKLE = "trickle"
    """The body goes on at TRICKLE_RATE after `after` bytes."""
    FLIP = "flip"
    """The lowest bit of the blob's byte at offset `after` is inverted."""
    SHORT_LENGTH = "short-length"
    """Content-Length and body are `after` bytes; the rest of the head is as if nothing were missing."""
    CONTENT_RANGE = "content-range"
    """A 206 whose Content-Range is the text `value`, by default the true one moved by a byte."""
    IGNORE_RANGE = "ignore-range"
    """200 with the whole blob in answer to a Range."""
    ETAG = "etag"
    """The entity tag is `value`, by default another one than usual."""
    GZIP = "gzip"
    """Content-Encoding: gzip on a blob, asked for or not."""
    NO_LENGTH = "no-length"
    """No Content-Length: a chunked body, or a HEAD without the header."""
    REDIRECT = "redirect"
    """Registry: the blob redirect has the status `status`; with `headers` its Location can be replaced."""
    DIRECT = "direct"
    """Registry: the blob itself (200, or 206 for a Range) plus `headers` instead of the redirect."""


_REGISTRY_MODES: Final = frozenset({Mode.REDIRECT, Mode.DIRECT})


class Fault:
    """One misbehaviour, spent `times` times (None: for ever) on the requests it matches.

    It matches requests on listener `where` whose path contains `path` and the hex of `digest`, and whose
    method is `method` if given. (A redirect or a direct answer is always the registry's.)
    A response too short for `after` does not spend it.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        after: int = 0,
        times: int | None = 1,
        where: Listener = "cdn",
        digest: str = "",
        path: str = "",
        method: str = "",
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        value: str | None = None,
    ) -> None:
        self.mode = mode
        self.after = after
        self.where: Listener = "registry" if mode in _REGISTRY_MODES else where
        self.digest = digest
        self.path = path
        self.method = method
        self.status = status
        self.headers = dict(headers or {})
        self.body = body
        self.value = value
        self.gate = Gate()
        """Opened by the test to end a HANG or a STALL."""
        self._lock = threading.Lock()
        self._left = times
        self._hits = 0

    @property
    def hits(self) -> int:
        """How often it has happened."""
        return self._hits

    def matches(self, listener: Listener, request: "Request") -> bool:
        """This fault is about such a request; whether any of it is left is another question."""
        return (
            self.where == listener
            and self.path in request.path
            and self.digest.removeprefix("sha256:") in request.path
            and self.method in ("", request.method)
        )

    def take(self) -> bool:
        """Spend one; False when none is left."""
        with self._lock:
            if self._left is not None:
                if self._left <= 0:
                    return False
                self._left -= 1
            self._hits += 1
            return True


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it arrived."""

    listener: Listener
    method: str
    path: str
    query: str
    fields: tuple[tuple[str, str], ...]
    """Header names and values as on the wire, in order."""

    @property
    def target(self) -> str:
        """Path and query as on the wire."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def headers(self) -> dict[str, str]:
        """Values by lower-case name."""
        return {name.lower(): value for name, value in self.fields}


@dataclass(frozen=True, slots=True)
class Upload:
    """The body of one upload request."""

    request: Request
    size: int
    sha256: str


class Counters:
    """What the origin saw and sent; every property is a consistent copy."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._open = 0
        self._zero()

    def _zero(self) -> None:
        self._registry_requests: Counter[tuple[str, str]] = Counter()
        self._cdn_requests = 0
        self._bytes: dict[Listener, int] = {"registry": 0, "cdn": 0}
        self._by_digest: Counter[str] = Counter()
        self._peak = self._open
        self._total = 0
        self._upload_bytes = 0
        self._requests: list[Request] = []
        self._uploads: list[Upload] = []

    @property
    def registry_requests(self) -> Counter[tuple[str, str]]:
        """Registry requests by (method, kind); kind is manifest, blob, chunksums, upload, token or other."""
        with self._changed:
            return Counter(self._registry_requests)

    @property
    def manifest_requests(self) -> Counter[tuple[str, bool]]:
        """Manifest requests by (method, whether Accept has the list type)."""
        return Counter(
            (request.method, _takes_lists(request)) for request in self.requests if _kind(request) == "manifest"
        )

    @property
    def cdn_requests(self) -> int:
        """CDN requests of any outcome."""
        with self._changed:
            return self._cdn_requests

    @property
    def cdn_bytes(self) -> int:
        """Body bytes of blobs written by the CDN."""
        with self._changed:
            return self._bytes["cdn"]

    @property
    def cdn_bytes_by_digest(self) -> Counter[str]:
        """`cdn_bytes` by digest (`sha256:<hex>`)."""
        with self._changed:
            return Counter(self._by_digest)

    @property
    def registry_bytes(self) -> int:
        """Body bytes of blobs written by the registry itself (Mode.DIRECT)."""
        with self._changed:
            return self._bytes["registry"]

    @property
    def cdn_connections_open(self) -> int:
        """Connections to the CDN now."""
        with self._changed:
            return self._open

    @property
    def cdn_connections_peak(self) -> int:
        """The most connections to the CDN at one time."""
        with self._changed:
            return self._peak

    @property
    def cdn_connections_total(self) -> int:
        """Connections the CDN accepted."""
        with self._changed:
            return self._total

    @property
    def upload_bytes(self) -> int:
        """Body bytes received by the upload endpoints."""
        with self._changed:
            return self._upload_bytes

    @property
    def requests(self) -> list[Request]:
        """All requests in the order of arrival."""
        with self._changed:
            return list(self._requests)

    @property
    def uploads(self) -> list[Upload]:
        """The upload requests whose body has arrived whole."""
        with self._changed:
            return list(self._uploads)

    @property
    def tokens(self) -> list[Request]:
        """The requests to /token, byte for byte."""
        return [request for request in self.requests if _kind(request) == "token"]

    def wait_for(self, claim: Callable[["Counters"], bool], *, timeout_s: float = _WAIT_S) -> None:
        """Return when `claim` holds; it is asked at every change."""
        with self._changed:
            if not self._changed.wait_for(lambda: claim(self), timeout_s):
                raise TimeoutError(f"counters did not get there within {timeout_s} s: {self}")

    def __repr__(self) -> str:
        with self._changed:
            return (
                f"registry {dict(self._registry_requests)}, "
                f"cdn {self._cdn_requests} requests {self._bytes['cdn']} bytes, "
                f"connections {self._open} open {self._peak} peak {self._total} total"
            )

    def _record(self, request: Request) -> None:
        with self._changed:
            self._requests.append(request)
            if request.listener == "cdn":
                self._cdn_requests += 1
            else:
                self._registry_requests[request.method, _kind(request)] += 1
            self._changed.notify_all()

    def _sent(self, listener: Listener, digest: str, count: int) -> None:
        with self._changed:
            self._bytes[listener] += count
            if listener == "cdn":
                self._by_digest[digest] += count
            self._changed.notify_all()

    def _connected(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._peak = max(self._peak, self._open)
            self._total += change > 0
            self._changed.notify_all()

    def _received(self, count: int) -> None:
        with self._changed:
            self._upload_bytes += count
            self._changed.notify_all()

    def _uploaded(self, upload: Upload) -> None:
        with self._changed:
            self._uploads.append(upload)
            self._changed.notify_all()


# --- one connection


class _Gone(Exception):
    """The peer closed, or the origin is being stopped: this connection is over."""


class _Bucket:
    """A token bucket without burst: says how long the taker has to wait before sending."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0

    def take(self, count: int, rate: int) -> float:
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now - _CREDIT_S)
            self._next = at + count / rate
            return max(0.0, at - now)


class _Connection:
    """One accepted TLS connection, used by one thread."""

    def __init__(self, sock: ssl.SSLSocket, listener: Listener, stopping: Gate) -> None:
        self.sock = sock
        self.listener: Listener = listener
        self.bucket = _Bucket()
        self._stopping = stopping
        self._buffer = bytearray()
        self._body: Iterator[bytes] = iter(())

    def wait(self, timeout_s: float | None, gate: Gate | None = None) -> None:
        """Return when the time is over or the gate open; raise _Gone when the peer leaves first."""
        poller = select.poll()
        poller.register(self._stopping, select.POLLIN)
        if gate is not None:
            poller.register(gate, select.POLLIN)
        # Bytes that came early (the body of an upload) must not make this spin.
        if not self._buffer:
            poller.register(self.sock, select.POLLIN)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = {fd for fd, _event in poller.poll(None if left is None else left * 1000)}
            if self._stopping.fileno() in ready:
                raise _Gone
            if gate is not None and gate.fileno() in ready:
                return
            if self.sock.fileno() in ready:
                self._look()
                if self._buffer:
                    poller.unregister(self.sock)
            if deadline is not None and time.monotonic() >= deadline:
                return

    def _look(self) -> None:
        """Read what is there: a close (with or without close_notify) or the start of something."""
        self.sock.settimeout(0.0)
        try:
            data = self.sock.recv(65536)
        except ssl.SSLWantReadError:
            return
        finally:
            self.sock.settimeout(None)
        if not data:
            raise _Gone
        self._buffer += data

    def _fill(self) -> bool:
        data = self.sock.recv(65536)
        self._buffer += data
        return bool(data)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if not self._fill():
                raise _Gone
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def read_request(self) -> Request | None:
        """The next request, or None when the peer is done."""
        if not self._buffer and not self._fill():
            return None
        method, target, version = self._line().decode("latin-1").split(" ")
        if version != "HTTP/1.1":
            raise _Gone
        fields: list[tuple[str, str]] = []
        while line := self._line().decode("latin-1"):
            name, _colon, value = line.partition(":")
            fields.append((name, value.strip()))
        path, _mark, query = target.partition("?")
        request = Request(self.listener, method, path, query, tuple(fields))
        self._body = self._pieces(request.headers)
        return request

    def read_body(self) -> Iterator[bytes]:
        """The pieces of the request body that have not been read yet."""
        return self._body

    def _pieces(self, headers: Mapping[str, str]) -> Iterator[bytes]:
        if headers.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self._line().partition(b";")[0], 16):
                yield from self._exactly(size)
                self._line()
            while self._line():
                pass
        else:
            yield from self._exactly(int(headers.get("content-length", "0")))

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            if not self._buffer and not self._fill():
                raise _Gone
            piece = bytes(self._buffer[:size])
            del self._buffer[:size]
            size -= len(piece)
            yield piece

    def wake(self) -> None:
        """From another thread: end whatever the connection's thread waits for."""
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown: that drops the TLS object under the feet of the reading thread.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """close_notify, then FIN."""
        with contextlib.suppress(OSError, ValueError):
            # unwrap() also waits for the peer's close_notify, which may never come; with the receiving side
            # shut that wait ends at once.
            socket.socket.shutdown(self.sock, socket.SHUT_RD)
            self.sock.unwrap()
        self.sock.close()

    def reset(self) -> None:
        """RST, after the peer has received everything written so far."""
        # A reset throws away what the kernel has not sent yet, and nothing announces that the queue is empty.
        with contextlib.suppress(OSError, _Gone):
            while _unsent(self.sock):
                self.wait(0.001)
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def _unsent(sock: socket.socket) -> int:
    """Bytes the peer has not acknowledged."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


# --- the servers


@dataclass(slots=True)
class _Response:
    status: int
    headers: list[tuple[str, str]]
    source: Source = field(default_factory=lambda: Stored(b""))
    start: int = 0
    stop: int = 0
    chunked: bool = False
    digest: str = ""
    """Set when the body is a blob: its bytes are counted and rate-limited."""
    early: bool = False
    """Sent before the body of the request has been read."""


@dataclass(frozen=True, slots=True)
class _Model:
    manifest: bytes
    requires: tuple[int, ...]
    listed: bytes | None = None
    """What those get who take lists."""


@dataclass(frozen=True, slots=True)
class _Signed:
    """What an address of the CDN is good for."""

    digest: str
    method: str
    expires: float
    """In seconds since the epoch."""


_MANIFEST_PATH: Final = re.compile(r"/v2/(?P<name>.+)/manifests/(?P<reference>[^/]+)")
_UPLOAD_PATH: Final = re.compile(r"/v2/(?P<name>.+)/blobs/uploads/(?P<session>[^/]*)")
_BLOB_PATH: Final = re.compile(r"/v2/(?P<name>.+)/blobs/(?P<digest>sha256[:-][0-9a-fA-F]{64})")
_CHUNKSUMS_PATH: Final = re.compile(r"/v2/(?P<name>.+)/chunksums/(?P<digest>sha256[:-][0-9a-fA-F]{64})")
_CDN_PATH: Final = re.compile(r"/ollama/docker/registry/v2/blobs/sha256/(?P<two>..)/(?P<hex>(?P=two).{62})/data")
_SINGLE_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")


def _takes_lists(request: Request) -> bool:
    accepted = request.headers.get("accept", "").split(",")
    return any(each.partition(";")[0].strip().lower() == LIST_TYPE for each in accepted)


def _kind(request: Request) -> str:
    if request.path == "/token":
        return "token"
    if _UPLOAD_PATH.fullmatch(request.path):
        return "upload"
    if _MANIFEST_PATH.fullmatch(request.path):
        return "manifest"
    if _CHUNKSUMS_PATH.fullmatch(request.path):
        return "chunksums"
    return "blob" if _BLOB_PATH.fullmatch(request.path) else "other"


class Origin:
    """The two servers.

    A thread per connection: only with a blocking TLS socket do "these bytes, then a reset" and "written, as
    far as the client lets us" mean what they say.
    """

    def __init__(
        self, directory: Path, *, registry: tuple[str, int] = _ANY_PORT, cdn: tuple[str, int] = _ANY_PORT
    ) -> None:
        """The files of its CA go to `directory`; `registry` and `cdn` are where it listens."""
        self.counters = Counters()
        self.faults: list[Fault] = []
        self.rate_per_connection: int | None = None
        """Bytes per second for blob bodies on one connection."""
        self.rate_total: int | None = None
        """Bytes per second for all blob bodies together."""
        self.gzip_manifests = False
        """Whether a client that accepts gzip gets a manifest so encoded."""
        self.redirects_head = False
        """Whether HEAD of a blob is redirected to the CDN like GET, as until the middle of 2024."""
        self.chunk_size = 8 * _MIB
        """Bytes of each chunk that /chunksums/ lists; nothing is known of the real sizes."""
        self.token = GOOD_TOKEN
        """What /token grants."""
        self.accepted = {GOOD_TOKEN}
        """The tokens that private repositories are open to."""
        self.redirects_uploads = False
        """Whether a client that offers to (X-Redirect-Uploads) sends its bytes to the CDN."""
        self.url_lifetime_s = _URL_LIFETIME_S
        """How long an address on the CDN is good (X-Amz-Expires)."""
        self.clock_skew_s = 0.0
        """How far the clocks of registry and CDN are ahead; a test that adds to it lets time pass there."""

        self._lock = threading.Lock()
        self._blobs: dict[str, Source] = {}
        self._models: dict[tuple[str, str], _Model] = {}
        self._members: dict[str, set[str]] = {}
        self._private: set[str] = set()
        self._signed: dict[str, _Signed] = {}
        """By the request target that was given out, byte for byte."""
        self._gates: list[tuple[str, str, Gate]] = []
        self._total_bucket = _Bucket()

        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file = directory / "origin-ca.pem"
        self._context = server_context(directory, self.ca_file, PUBLIC_ADDRESSES)
        self._stopping = Gate()
        self._listening: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._connections: set[_Connection] = set()
        # A bound socket that never listens keeps each port ours while the servers are stopped.
        self._reserved: dict[Listener, socket.socket] = {"registry": _bind(registry), "cdn": _bind(cdn)}
        self.registry_port = int(self._reserved["registry"].getsockname()[1])
        self.cdn_port = int(self._reserved["cdn"].getsockname()[1])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for sock in self._reserved.values():
            sock.close()

    # --- life

    def start(self) -> None:
        """Listen, on the same ports as ever."""
        self._stopping = Gate()
        for listener, reserved in self._reserved.items():
            sock = _bind(reserved.getsockname())
            sock.listen(256)
            self._listening.append(sock)
            self._spawn(self._accept, sock, listener, self._stopping)

    def stop(self) -> None:
        """Refuse connections and end the present ones."""
        self._stopping.open()
        self.disconnect()
        with self._lock:
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(_WAIT_S)
        for sock in self._listening:
            sock.close()
        self._listening.clear()

    @property
    def is_running(self) -> bool:
        """Whether it listens."""
        return bool(self._listening)

    def restore(self) -> None:
        """Listening as at first, without faults, gates, limits and counts; blobs and models stay."""
        with self._lock:
            gates, self._gates = self._gates, []
        for _, _, gate in gates:
            gate.open()
        self.faults.clear()
        self.rate_per_connection = self.rate_total = None
        self.gzip_manifests = self.redirects_head = False
        self.chunk_size = 8 * _MIB
        self.token, self.accepted = GOOD_TOKEN, {GOOD_TOKEN}
        self.redirects_uploads = False
        self.url_lifetime_s, self.clock_skew_s = _URL_LIFETIME_S, 0.0
        if not self.is_running:
            self.start()
        self.reset_counters()

    def disconnect(self) -> None:
        """End all present connections, as a restart of the servers would."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.wake()

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name=f"origin-{work.__name__}", daemon=True)
        with self._lock:
            self._threads = [other for other in self._threads if other.is_alive()]
            thread.start()
            self._threads.append(thread)

    def _accept(self, listening: socket.socket, listener: Listener, stopping: Gate) -> None:
        poller = select.poll()
        poller.register(listening, select.POLLIN)
        poller.register(stopping, select.POLLIN)
        while True:
            poller.poll()
            if stopping.is_set():
                return
            sock, _address = listening.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            wrapped = self._context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
            )
            connection = _Connection(wrapped, listener, stopping)
            with self._lock:
                self._connections.add(connection)
            if stopping.is_set():
                connection.wake()
            self._spawn(self._converse, connection)

    def _converse(self, connection: _Connection) -> None:
        is_cdn = connection.listener == "cdn"
        if is_cdn:
            self.counters._connected(1)
        try:
            connection.sock.do_handshake()
            while request := connection.read_request():
                self.counters._record(request)
                if not self._answer(connection, request):
                    break
            connection.close()
        except (_Gone, OSError, ValueError):
            pass
        finally:
            connection.sock.close()
            with self._lock:
                self._connections.discard(connection)
            if is_cdn:
                self.counters._connected(-1)

    # --- content

    def add_blob(self, data: bytes | Source) -> str:
        """Put a blob on the CDN; a repository lists it once a model of that repository does."""
        source: Source = Stored(data) if isinstance(data, bytes) else data
        digest = f"sha256:{source.sha256()}"
        self._blobs[digest] = source
        return digest

    def blob(self, digest: str) -> Source:
        """The content of a blob."""
        return self._blobs[digest]

    def add_model(
        self,
        name: str,
        reference: str,
        *,
        layers: Sequence[tuple[str, str]],
        config: str,
        private: bool = False,
        requires: str = "",
    ) -> bytes:
        """Publish (or move) a tag and return the manifest's bytes.

        `private` makes the whole repository need a token. `requires` is the oldest client version served.
        """

        manifest = self.manifest_of(layers, config)
        self.put_manifest(name, reference, manifest, requires=requires)
        self.add_member(name, config, *(digest for _media_type, digest in layers))
        self.set_private(name, private=private)
        return manifest

    def manifest_of(self, layers: Sequence[tuple[str, str]], config: str, **fields: str) -> bytes:
        """A manifest of blobs that are here; `fields` are further ones, as `runner` and `format`."""

        def descriptor(media_type: str, digest: str) -> dict[str, object]:
            return {"mediaType": media_type, "digest": digest, "size": self._blobs[digest].size}

        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, config),
            "layers": [descriptor(media_type, digest) for media_type, digest in layers],
            **fields,
        }
        return _spaced(document)

    def put_list(
        self, name: str, reference: str, children: Sequence[bytes | Mapping[str, object]], *, plain: bytes | None = None
    ) -> bytes:
        """Publish (or move) a tag as a manifest list and return the list's bytes.

        A child is a manifest with `runner` and `format`, which becomes a blob that the list refers to, or an entry
        that is put in place as it is. What the manifests refer to becomes the repository's. Who does not take lists
        gets `plain`, by default the first child.
        """
        entries: list[Mapping[str, object]] = []
        for child in children:
            if isinstance(child, bytes):
                parsed = json.loads(child)
                digest = self.add_blob(child)
                self.add_member(name, digest)
                about = {field: parsed[field] for field in ("runner", "format") if field in parsed}
                entries.append({"mediaType": MANIFEST_TYPE, "digest": digest, **about})
            else:
                entries.append(parsed := child)
            descriptors = [*parsed.get("layers", []), parsed.get("config", {})]
            self.add_member(name, *(each["digest"] for each in descriptors if "digest" in each))
        listed = _spaced({"schemaVersion": 2, "mediaType": LIST_TYPE, "manifests": entries})
        if plain is None:
            plain = next(child for child in children if isinstance(child, bytes))
        with self._lock:
            self._models[name, reference] = _Model(plain, (), listed)
        return listed

    def put_manifest(self, name: str, reference: str, manifest: bytes, *, requires: str = "") -> None:
        """Publish any bytes as a manifest."""
        version = tuple(int(part) for part in requires.split(".")) if requires else ()
        with self._lock:
            self._models[name, reference] = _Model(manifest, version)

    def add_member(self, name: str, *digests: str) -> None:
        """Make a repository list blobs."""
        with self._lock:
            self._members.setdefault(name, set()).update(digests)

    def remove_model(self, name: str, reference: str) -> None:
        """Withdraw a tag; the repository keeps listing the blobs."""
        with self._lock:
            del self._models[name, reference]

    def set_private(self, name: str, *, private: bool) -> None:
        """Make a repository need a token, or not."""
        with self._lock:
            if private:
                self._private.add(name)
            else:
                self._private.discard(name)

    def signed_url(self, digest: str, method: str = "GET") -> str:
        """A new address of a blob on the CDN, as a redirect names it; good for one method, and byte for byte."""
        hexadecimal = digest.removeprefix("sha256:")
        now = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).replace(microsecond=0)
        credential = quote(f"66040c77ac1b787c3af820529859349a/{now:%Y%m%d}/auto/s3/aws4_request", safe="")
        target = (
            f"/ollama/docker/registry/v2/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"
            f"?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={credential}&X-Amz-Date={now:%Y%m%dT%H%M%SZ}"
            f"&X-Amz-Expires={self.url_lifetime_s}&X-Amz-SignedHeaders=host&X-Amz-Signature={secrets.token_hex(32)}"
        )
        with self._lock:
            self._signed[target] = _Signed(digest, method, now.timestamp() + self.url_lifetime_s)
        return f"https://{R2_HOST}{target}"

    @property
    def signatures(self) -> list[str]:
        """All that were given out."""
        with self._lock:
            return [target.rpartition("=")[2] for target in self._signed]

    def _now(self) -> float:
        return time.time() + self.clock_skew_s

    # --- steering

    def gate(self, path_substring: str, *, method: str = "") -> Gate:
        """Hold matching requests on both listeners, from when they are counted until the gate is opened."""
        gate = Gate()
        with self._lock:
            self._gates.append((path_substring, method, gate))
        return gate

    def expire_signatures(self, digest: str = "") -> None:
        """Every address given out so far, of one blob or of all, answers 403 from now on."""
        name = digest.removeprefix("sha256:")
        with self._lock:
            for target, signed in self._signed.items():
                if name in target:
                    self._signed[target] = replace(signed, expires=0.0)

    def reset_counters(self) -> None:
        """Start counting anew; the connections that are open stay counted as open."""
        with self.counters._changed:
            self.counters._zero()

    @property
    def upstream_option(self) -> str:
        """The value of the product's `upstream` option that leads here."""
        return f"{REGISTRY_HOST}=https://localhost:{self.registry_port},{R2_HOST}=https://localhost:{self.cdn_port}"

    @property
    def resolve(self) -> dict[tuple[str, int], tuple[str, int]]:
        """Where the real names, and their addresses, are found, for a client without a proxy."""
        found: dict[tuple[str, int], tuple[str, int]] = {}
        for name, addresses in PUBLIC_ADDRESSES.items():
            port = self.cdn_port if name == R2_HOST else self.registry_port
            found |= {(where, 443): ("127.0.0.1", port) for where in (name, *addresses)}
        return found

    # --- answering

    def _fault(
        self,
        connection: _Connection,
        request: Request,
        mode: Mode,
        applies: Callable[[Fault], bool] | None = None,
    ) -> Fault | None:
        for fault in list(self.faults):
            if (
                fault.mode is mode
                and fault.matches(connection.listener, request)
                and (applies is None or applies(fault))
                and fault.take()
            ):
                return fault
        return None

    def _answer(self, connection: _Connection, request: Request) -> bool:
        """Answer one request; False ends the connection cleanly."""
        with self._lock:
            gates = [
                gate for path, method, gate in self._gates if path in request.path and method in ("", request.method)
            ]
        for gate in gates:
            if not gate.is_set():
                with gate.holding():
                    connection.wait(None, gate)
        if self._fault(connection, request, Mode.DROP):
            connection.reset()
            raise _Gone
        if fault := self._fault(connection, request, Mode.HANG):
            with fault.gate.holding():
                connection.wait(None, fault.gate)
        if fault := self._fault(connection, request, Mode.STATUS):
            response = _faulty_status(connection.listener, fault)
        elif connection.listener == "cdn":
            response = self._cdn(connection, request)
        else:
            response = self._registry(connection, request)
        stays = response.early and self._transmit(connection, request, response)
        for _piece in connection.read_body():
            pass
        stays = stays or self._transmit(connection, request, response)
        return stays and request.headers.get("connection", "") != "close"

    def _registry(self, connection: _Connection, request: Request) -> _Response:
        if request.path == "/token":
            return _json(200, {"token": self.token})
        if match := _UPLOAD_PATH.fullmatch(request.path):
            return self._upload(connection, request, match["name"], match["session"])
        if match := _MANIFEST_PATH.fullmatch(request.path):
            return self._denied(match["name"], request) or self._manifest(
                connection, request, match["name"], match["reference"]
            )
        if match := _BLOB_PATH.fullmatch(request.path):
            digest = match["digest"].replace("-", ":").lower()
            return self._denied(match["name"], request) or self._blob(connection, request, match["name"], digest)
        if match := _CHUNKSUMS_PATH.fullmatch(request.path):
            digest = match["digest"].replace("-", ":").lower()
            return self._denied(match["name"], request) or self._chunksums(request, match["name"], digest)
        return _plain(404, "404 page not found\n")

    def _denied(self, name: str, request: Request) -> _Response | None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if name not in self._private or (kind == "Bearer" and token in self.accepted):
            return None
        response = _json(
            401, {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required", "detail": {}}]}
        )
        # Clients take a token from the name that they asked only.
        host = REGISTRY_COM if request.headers.get("host") == REGISTRY_COM else REGISTRY_HOST
        challenge = f'Bearer realm="https://{host}/token",service="registry",scope="repository:{name}:pull"'
        response.headers.append(("WWW-Authenticate", challenge))
        return response

    def _manifest(self, connection: _Connection, request: Request, name: str, reference: str) -> _Response:
        if request.method == "PUT":
            body = b"".join(connection.read_body())
            self.put_manifest(name, reference, body)
            return _Response(201, [("Location", request.path), ("Content-Length", "0")])
        with self._lock:
            model = self._models.get((name, reference))
        if model is None:
            return _registry_error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        if request.method not in ("GET", "HEAD"):
            return _registry_error(405, "UNSUPPORTED", "The operation is unsupported.")
        if model.requires and (version := _client_version(request)) != (0, 0, 0) and version < model.requires:
            return _plain(412, "\nThe model you are attempting to pull requires a newer version of Ollama.\n")
        is_list = model.listed is not None and _takes_lists(request)
        body = model.listed if is_list and model.listed is not None else model.manifest
        if request.method == "HEAD":
            return _Response(
                200,
                [
                    ("Content-Type", LIST_TYPE if is_list else "text/plain; charset=utf-8"),
                    ("Content-Length", str(len(body))),
                    ("Vary", "Accept"),
                    ("ollama-content-digest", hashlib.sha256(body).hexdigest()),
                    ("ollama-push-time", "1790000000"),
                ],
            )
        headers = [("Content-Type", LIST_TYPE if is_list else "text/plain"), ("Vary", "Accept")]
        if self.gzip_manifests and "gzip" in request.headers.get("accept-encoding", ""):
            headers.append(("Content-Encoding", "gzip"))
            body = gzip.compress(body)
        return _Response(200, headers, Stored(body), 0, len(body), chunked=True)

    def _blob(self, connection: _Connection, request: Request, name: str, digest: str) -> _Response:
        source = self._blobs.get(digest)
        if source is None or digest not in self._members.get(name, ()):
            return _registry_error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if request.method == "HEAD" and not self.redirects_head:
            headers = [("Content-Type", "application/octet-stream"), ("Docker-Content-Digest", digest)]
            if not self._fault(connection, request, Mode.NO_LENGTH):
                headers.append(("Content-Length", str(source.size)))
            return _Response(200, headers)
        if request.method not in ("GET", "HEAD"):
            return _registry_error(405, "UNSUPPORTED", "The operation is unsupported.")
        if fault := self._fault(connection, request, Mode.DIRECT):
            response = self._content(connection, request, digest)
            response.headers.extend(fault.headers.items())
            return response
        location, status = self.signed_url(digest, request.method), 307
        if fault := self._fault(connection, request, Mode.REDIRECT):
            location, status = fault.headers.get("Location", location), fault.status
        headers = [("Content-Length", "0")]
        return _Response(status, [("Location", location), *headers] if location else headers)

    def _chunksums(self, request: Request, name: str, digest: str) -> _Response:
        source = self._blobs.get(digest)
        if source is None or digest not in self._members.get(name, ()):
            return _registry_error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if request.method != "GET":
            return _registry_error(405, "UNSUPPORTED", "The operation is unsupported.")
        lines = []
        for start in range(0, source.size, self.chunk_size):
            stop = min(start + self.chunk_size, source.size)
            lines.append(f"sha256:{hashlib.sha256(source.read(start, stop)).hexdigest()} {start}-{stop - 1}\n")
        response = _plain(200, "".join(lines))
        response.headers.append(("Content-Location", self.signed_url(digest)))
        return response

    def _upload(self, connection: _Connection, request: Request, name: str, session: str) -> _Response:
        location = f"https://{REGISTRY_HOST}/v2/{name}/blobs/uploads/{session or secrets.token_hex(16)}"
        headers = [("Location", location), ("Docker-Upload-Location", location), ("Content-Length", "0")]
        offered = request.headers.get("x-redirect-uploads", "") if self.redirects_uploads else ""
        asked = parse_qs(request.query).get("digest", [f"sha256:{'0' * 64}"])[0]
        if request.method == "PATCH" and offered == "1":
            headers[0] = ("Location", self.signed_url(asked, "PUT"))
            return _Response(307, headers, early=True)
        self._take_in(connection, request)
        if request.method == "POST" and offered == "2":
            headers.append(("X-Direct-Upload-URL", self.signed_url(asked, "PUT")))
            headers.append(("X-Signed-Header-X-Amz-Checksum-Sha256", asked))
        return _Response(201 if request.method == "PUT" else 202, headers)

    def _take_in(self, connection: _Connection, request: Request) -> None:
        """Read and count the body of an upload."""
        digest, size = hashlib.sha256(), 0
        for piece in connection.read_body():
            digest.update(piece)
            size += len(piece)
            self.counters._received(len(piece))
        self.counters._uploaded(Upload(request, size, digest.hexdigest()))

    def _cdn(self, connection: _Connection, request: Request) -> _Response:
        match = _CDN_PATH.fullmatch(request.path)
        digest = f"sha256:{match['hex']}" if match else ""
        if "X-Amz-Signature" not in parse_qs(request.query):
            return _xml(403, "AccessDenied", "Access Denied")
        with self._lock:
            signed = self._signed.get(request.target)
        # The method is part of what is signed: a GET address is no good for a HEAD. So is the whole query: nothing
        # may be added to it or encoded anew.
        # So is Host; a proxy under test is told to find R2 at localhost.
        host = request.headers.get("host")
        is_ours = host in (R2_HOST, f"localhost:{self.cdn_port}")
        if signed is None or signed.method != request.method or not is_ours:
            return _xml(403, "SignatureDoesNotMatch", "The request signature we calculated does not match.")
        if self._now() >= signed.expires:
            return _xml(403, "AccessDenied", "Request has expired")
        if request.method == "PUT":
            self._take_in(connection, request)
            return _Response(200, [("ETag", '"0"'), ("Content-Length", "0")])
        if digest not in self._blobs:
            return _xml(404, "NoSuchKey", "The specified key does not exist.")
        return self._content(connection, request, digest)

    def _content(self, connection: _Connection, request: Request, digest: str) -> _Response:
        """A blob or a range of it, as an object store answers (RFC 9110 sections 13 and 14)."""

        def fault(mode: Mode, applies: Callable[[Fault], bool] | None = None) -> Fault | None:
            return self._fault(connection, request, mode, applies)

        source, asked = self._blobs[digest], request.headers
        tag = f'"{hashlib.md5(digest.encode(), usedforsecurity=False).hexdigest()}-16"'
        if changed := fault(Mode.ETAG):
            tag = changed.value or '"00000000000000000000000000000000-1"'
        if asked.get("if-match", tag) not in (tag, "*"):
            return _xml(412, "PreconditionFailed", "At least one of the preconditions you specified did not hold.")
        interval = _interval(asked.get("range", ""), source.size)
        if asked.get("if-range", tag) != tag or (interval and fault(Mode.IGNORE_RANGE)):
            interval = None
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("ETag", tag),
            ("Accept-Ranges", "bytes"),
            ("Last-Modified", "Mon, 01 Jun 2026 12:00:00 GMT"),
        ]
        if interval and interval[0] >= interval[1]:
            refused = _xml(416, "InvalidRange", "The requested range is not satisfiable")
            refused.headers.append(("Content-Range", f"bytes */{source.size}"))
            return refused
        start, stop = interval or (0, source.size)
        if interval:
            content_range = f"bytes {start}-{stop - 1}/{source.size}"
            if wrong := fault(Mode.CONTENT_RANGE):
                content_range = wrong.value or f"bytes {start + 1}-{stop}/{source.size + 1}"
            headers.append(("Content-Range", content_range))
        status = 206 if interval else 200
        if fault(Mode.GZIP):
            source = Stored(gzip.compress(source.read(start, stop), 1))
            start, stop = 0, source.size
            headers.append(("Content-Encoding", "gzip"))
        if short := fault(Mode.SHORT_LENGTH, lambda fault: fault.after < stop - start):
            stop = start + short.after
        chunked = fault(Mode.NO_LENGTH) is not None
        if not chunked:
            headers.append(("Content-Length", str(stop - start)))
        return _Response(status, headers, source, start, stop, chunked=chunked, digest=digest)

    def _transmit(self, connection: _Connection, request: Request, response: _Response) -> bool:
        """Write a response; False when the connection has to end after it."""

        def fault(mode: Mode, applies: Callable[[Fault], bool]) -> Fault | None:
            return self._fault(connection, request, mode, applies)

        head = [f"HTTP/1.1 {response.status} {_phrase(response.status)}"]
        if not any(name == "Date" for name, _ in response.headers):
            head.append(f"Date: {formatdate(usegmt=True)}")
        head += [f"{name}: {value}" for name, value in response.headers]
        if response.chunked:
            head.append("Transfer-Encoding: chunked")
        connection.sock.sendall(("\r\n".join(head) + "\r\n\r\n").encode("latin-1"))
        if request.method == "HEAD":
            return True

        start, stop = response.start, response.stop

        def within(fault: Fault) -> bool:
            return fault.after < stop - start

        flip = fault(Mode.FLIP, lambda fault: start <= fault.after < stop)
        stall, truncate, reset, trickle = (
            fault(mode, within) for mode in (Mode.STALL, Mode.TRUNCATE, Mode.RESET, Mode.TRICKLE)
        )
        ends = [start + cut.after for cut in (truncate, reset) if cut]
        end = min(ends, default=stop)
        pauses = [start + stall.after] if stall and start + stall.after <= end else []
        position = start
        for mark in (*pauses, end):
            while position < mark:
                is_slow = trickle is not None and position >= start + trickle.after
                position += self._write_piece(connection, response, position, mark, flip, is_slow=is_slow)
            if stall and mark in pauses:
                with stall.gate.holding():
                    connection.wait(None, stall.gate)
        if ends:
            if reset and end == start + reset.after:
                connection.reset()
                raise _Gone
            return False
        if response.chunked:
            connection.sock.sendall(b"0\r\n\r\n")
        return True

    def _write_piece(
        self,
        connection: _Connection,
        response: _Response,
        start: int,
        stop: int,
        flip: Fault | None,
        *,
        is_slow: bool = False,
    ) -> int:
        """Write some of the body, as much as the rate limits let pass at once."""
        length = min(stop - start, _PIECE)
        delay = 0.0
        if response.digest:
            # A piece lasts a fiftieth of a second, so that a slow rate is a trickle and not a pulse.
            rates = [
                (rate, bucket)
                for rate, bucket in (
                    (TRICKLE_RATE if is_slow else self.rate_per_connection, connection.bucket),
                    (self.rate_total, self._total_bucket),
                )
                if rate is not None
            ]
            for rate, _bucket in rates:
                length = min(length, _LIMITED_PIECE, max(1024, rate // 50))
            delay = max((bucket.take(length, rate) for rate, bucket in rates), default=0.0)
        connection.wait(delay)
        data = response.source.read(start, start + length)
        if flip and start <= flip.after < start + length:
            wrong = bytearray(data)
            wrong[flip.after - start] ^= 1
            data = bytes(wrong)
        if response.chunked:
            connection.sock.sendall(b"%x\r\n%b\r\n" % (length, data))
        else:
            connection.sock.sendall(data)
        if response.digest:
            self.counters._sent(connection.listener, response.digest, length)
        return length


def _bind(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    return sock


def _interval(value: str, size: int) -> tuple[int, int] | None:
    """The half-open interval of a single byte range: empty when unsatisfiable, None when there is none."""
    match = _SINGLE_RANGE.fullmatch(value)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


def _client_version(request: Request) -> tuple[int, ...]:
    match = re.match(r"ollama/(\d+)\.(\d+)\.(\d+)", request.headers.get("user-agent", ""))
    return tuple(int(part) for part in match.groups()) if match else (0, 0, 0)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _spaced(document: Mapping[str, object]) -> bytes:
    """JSON with spacing that no library writes by itself: re-serialised it is not taken for this one."""
    return json.dumps(document, indent=3, separators=(" ,", ":  ")).encode() + b"\n \n"


def _whole(status: int, content_type: str, body: bytes) -> _Response:
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
    return _Response(status, headers, Stored(body), 0, len(body))


def _plain(status: int, text: str) -> _Response:
    return _whole(status, "text/plain; charset=utf-8", text.encode())


def _json(status: int, document: Mapping[str, object]) -> _Response:
    return _whole(status, "application/json", json.dumps(document).encode())


def _registry_error(status: int, code: str, message: str) -> _Response:
    return _json(status, {"errors": [{"code": code, "message": message, "detail": {}}]})


def _xml(status: int, code: str, message: str) -> _Response:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    text = f'<?xml version="1.0" encoding="UTF-8"?>{error}'
    return _whole(status, "application/xml", text.encode())


def _faulty_status(listener: Listener, fault: Fault) -> _Response:
    if fault.body is not None:
        response = _whole(fault.status, "text/plain", fault.body)
    elif listener == "cdn":
        response = _xml(fault.status, "InternalError", "We encountered an internal error. Please try again.")
    else:
        response = _registry_error(fault.status, "UNKNOWN", "unknown error")
    response.headers.extend(fault.headers.items())
    return response


# --- certificates


def server_context(directory: Path, ca_file: Path, hosts: Iterable[str]) -> ssl.SSLContext:
    """A context with a leaf for `hosts` and loopback, signed by a CA made now and written to `ca_file`."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake origin CA")])

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    usage = {
        "digital_signature": True,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    ca = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**usage, "key_cert_sign": True, "crl_sign": True}), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names: Iterable[x509.GeneralName] = [
        *(x509.DNSName(host) for host in ("localhost", *hosts)),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    leaf = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake origin")]), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    ca_file.write_bytes(ca.public_bytes(pem))
    chain = directory / "origin-leaf.pem"
    chain.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) + leaf.public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    context.set_alpn_protocols(["http/1.1"])
    # A client that closes with an unread session ticket in its buffer resets the connection.
    context.num_tickets = 0
    return context
