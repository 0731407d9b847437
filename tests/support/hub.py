"""Registries that are not Ollama's, on loopback: Hugging Face with its two hops, and a plain OCI registry.

Invariant: each answers as its model does: hf.co redirects every blob request, HEAD too, to huggingface.co with a
signature (seen in 2026), which redirects to a CDN whose path does not name the digest; the plain registry answers with
the bytes. A request with an Authorization that the host is not meant to see is refused with 400.
Knows nothing of what asks.
"""

import contextlib
import hashlib
import json
import re
import secrets
import socket
import ssl
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from tests.support.origin import MANIFEST_TYPE, MODEL_TYPE, R2_HOST, SEND_BUFFER, Source, Stored, server_context

HF: Final = "hf.co"
HUGGING_FACE: Final = "huggingface.co"
CDN: Final = "us.aws.cdn.hf.co"
OCI: Final = "oci.example.com"
TOKEN: Final = "letmein"

_PIECE: Final = 64 << 10
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")
_V2: Final = re.compile(r"/v2/(.+)/(manifests|blobs)/([^/]+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    host: str
    method: str
    target: str
    headers: dict[str, str]
    """By lower-case name."""


@dataclass
class Repository:
    """What a registry knows under one name."""

    manifest: bytes = b""
    blobs: set[str] = field(default_factory=set)
    gated: bool = False
    """Only who has the token gets anything."""
    gated_behind: bool = False
    """The first hop lets everybody pass, the second asks for the token."""


class Hub:
    """All hosts, each with a TLS port of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file = directory / "hub-ca.pem"
        self.asked: list[Asked] = []
        self.sent: Counter[str] = Counter()
        """Body bytes of blobs, by digest."""
        self.uses: int | None = None
        """How many requests an address is good for; None: any number."""
        self.ranges = True
        """Whether the plain registry knows Range."""
        self.repositories: dict[str, Repository] = {}
        self.cdn_origin = ""
        """Where huggingface.co redirects to."""
        self._blobs: dict[str, Source] = {}
        self._left: dict[str, int | None] = {}
        self._lock = threading.Lock()
        context = server_context(directory, self.ca_file, (HF, HUGGING_FACE, CDN, OCI))
        answers = {HF: self._hf, HUGGING_FACE: self._hugging_face, CDN: self._cdn, OCI: self._oci}
        self._servers = {host: _Server(self, host, answer, context) for host, answer in answers.items()}
        self.cdn_origin = f"https://localhost:{self.port(CDN)}"

    def __enter__(self) -> Self:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    # --- what a test steers

    def port(self, host: str) -> int:
        """Where the host listens on 127.0.0.1."""
        return int(self._servers[host].server_address[1])

    @property
    def upstream_option(self) -> str:
        """The value of the product's `upstream` option; the CDN is where the blob host would be."""
        hosts = {HF: HF, HUGGING_FACE: HUGGING_FACE, OCI: OCI, R2_HOST: CDN}
        return ",".join(f"{name}=https://localhost:{self.port(host)}" for name, host in hosts.items())

    def add_model(self, name: str, *layers: Source | bytes, **options: bool) -> Repository:
        """Publish a repository with these layers, under all hosts."""
        sources = [Stored(layer) if isinstance(layer, bytes) else layer for layer in (*layers, b"{}" + name.encode())]
        digests = [f"sha256:{source.sha256()}" for source in sources]
        self._blobs |= dict(zip(digests, sources, strict=True))
        described = [
            {"mediaType": MODEL_TYPE, "digest": digest, "size": source.size}
            for digest, source in zip(digests, sources, strict=True)
        ]
        document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": described[-1], "layers": described[:-1]}
        manifest = json.dumps(document, indent=1).encode()
        self.repositories[name] = Repository(manifest, set(digests), **options)
        return self.repositories[name]

    def expire(self) -> None:
        """Every address given out so far is no longer good."""
        with self._lock:
            self._left = dict.fromkeys(self._left, 0)

    def restore(self) -> None:
        """Forget counts and steering; repositories stay."""
        self.uses, self.ranges = None, True
        with self._lock:
            self.asked.clear()
            self.sent.clear()

    def to(self, host: str) -> list[Asked]:
        """What one host was asked."""
        with self._lock:
            return [asked for asked in self.asked if asked.host == host]

    # --- signatures

    def _sign(self, what: str) -> str:
        signature = secrets.token_urlsafe(24)
        with self._lock:
            self._left[f"{what} {signature}"] = self.uses
        return signature

    def _is_good(self, what: str, signature: str) -> bool:
        with self._lock:
            left = self._left.get(f"{what} {signature}", 0)
            if left:
                self._left[f"{what} {signature}"] = left - 1
            return left is None or left > 0

    # --- hosts

    def _hf(self, handler: "_Handler") -> None:
        match = _V2.fullmatch(handler.path)
        repository = self.repositories.get(match[1]) if match else None
        authorized = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or match is None or (repository.gated and not authorized):
            # It does not tell who may not know from what is not there.
            challenge = f'Bearer realm="https://{HF}/token",service="{HF}",scope="repository:x:pull"'
            handler.say(401, b"", ("WWW-Authenticate", challenge))
        elif match[2] == "manifests":
            handler.say(200, repository.manifest, ("Content-Type", MANIFEST_TYPE))
        elif match[3] not in repository.blobs:
            handler.say(404)
        else:
            sign = self._sign(match[3])
            location = f"https://{HUGGING_FACE}{handler.path}?__sign={sign}"
            handler.say(307, b"elsewhere", ("Location", location), ("X-Linked-ETag", f'"{match[3][7:]}"'))

    def _hugging_face(self, handler: "_Handler") -> None:
        if handler.headers.get("Authorization"):
            handler.say(400, b"a token that is not for this host")
            return
        split = urlsplit(handler.path)
        match = _V2.fullmatch(split.path)
        repository = self.repositories.get(match[1]) if match else None
        sign = parse_qs(split.query).get("__sign", [""])[0]
        if match is None or repository is None or not self._is_good(match[3], sign):
            handler.say(403, b"expired")
        elif repository.gated_behind:
            handler.say(401, b'{"error":"Invalid credentials"}', ("Content-Type", "application/json"))
        else:
            # By a hash of its own, which has as many digits as a digest.
            where = hashlib.sha256(b"xet" + match[3].encode()).hexdigest()
            query = f"Expires=1&Policy=eyJ~_-&Signature={self._sign(where)}&Key-Pair-Id=K1"
            handler.say(302, b"", ("Location", f"{self.cdn_origin}/xet-bridge-us/65e1/{where}?{query}"))

    def _cdn(self, handler: "_Handler") -> None:
        if handler.headers.get("Authorization"):
            handler.say(400, b"a token that is not for this host")
            return
        split = urlsplit(handler.path)
        where = split.path.rpartition("/")[2]
        found = [digest for digest in self._blobs if hashlib.sha256(b"xet" + digest.encode()).hexdigest() == where]
        if not found or not self._is_good(where, parse_qs(split.query).get("Signature", [""])[0]):
            handler.say(403, b"<Error>expired</Error>")
        else:
            self._content(handler, found[0], ranges=True)

    def _oci(self, handler: "_Handler") -> None:
        split = urlsplit(handler.path)
        if split.path == "/token":
            handler.say(200, json.dumps({"token": TOKEN}).encode(), ("Content-Type", "application/json"))
            return
        match = _V2.fullmatch(handler.path)
        repository = self.repositories.get(match[1]) if match else None
        authorized = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        if match is not None and repository is not None and repository.gated and not authorized:
            challenge = f'Bearer realm="https://{OCI}/token",service="{OCI}",scope="repository:{match[1]}:pull"'
            error = b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}'
            handler.say(401, error, ("WWW-Authenticate", challenge))
        elif match is None or repository is None or (match[2] == "blobs" and match[3] not in repository.blobs):
            handler.say(404, b'{"error":"Repository not found"}', ("Content-Type", "application/json"))
        elif match[2] == "manifests":
            handler.say(200, repository.manifest, ("Content-Type", MANIFEST_TYPE))
        else:
            self._content(handler, match[3], ranges=self.ranges)

    def _content(self, handler: "_Handler", digest: str, *, ranges: bool) -> None:
        source = self._blobs[digest]
        start, stop, status = 0, source.size, 200
        fields = [("ETag", f'"{digest[7:15]}"'), ("Content-Type", "application/octet-stream")]
        if ranges:
            fields.append(("Accept-Ranges", "bytes"))
            if match := _RANGE.fullmatch(handler.headers.get("Range", "")):
                start, status = int(match[1]), 206
                stop = min(stop, int(match[2]) + 1) if match[2] else stop
                fields.append(("Content-Range", f"bytes {start}-{stop - 1}/{source.size}"))
        handler.begin(status, stop - start, *fields)
        if handler.command == "HEAD":
            return
        for position in range(start, stop, _PIECE):
            piece = source.read(position, min(position + _PIECE, stop))
            handler.wfile.write(piece)
            with self._lock:
                self.sent[digest] += len(piece)


class _Server(ThreadingHTTPServer):
    """One host."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, name: str, answer: Any, context: ssl.SSLContext) -> None:
        self.hub = hub
        self.name = name
        self.answer = answer
        self._context = context
        super().__init__(("127.0.0.1", 0), _Handler)
        # Inherited by its connections: without it megabytes that nobody reads would count as sent.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread: a slow handshake is nobody else's business.
        with contextlib.suppress(OSError), self._context.wrap_socket(request, server_side=True) as sock:
            super().finish_request(sock, client_address)

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        fields = {name.lower(): value for name, value in self.headers.items()}
        with self.server.hub._lock:
            self.server.hub.asked.append(Asked(self.server.name, self.command, self.path, fields))
        self.server.answer(self)

    do_HEAD = do_GET

    def begin(self, status: int, length: int, *fields: tuple[str, str]) -> None:
        """The head of a response."""
        self.send_response(status)
        for name, value in fields:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def say(self, status: int, body: bytes = b"", *fields: tuple[str, str]) -> None:
        """A whole response."""
        self.begin(status, len(body), *fields)
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Tests look at what was asked."""
