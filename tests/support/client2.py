"""A strict emulator of client2, the pull client behind OLLAMA_EXPERIMENT=client2 (v0.6.0 to v0.31.1).

Invariant: it asks, accepts and refuses as server/internal/client/ollama/registry.go does, in the two forms that
a server can tell apart: "0.6.0", and "chunksums" (v0.6.6 to v0.31.1). The real one retries a pull for ever; this
one for `patience_s`. Knows nothing of what answers.
"""

import base64
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from tests.support.goclient import (
    GO_USER_AGENT,
    NETWORK,
    Cancellation,
    FailedRequest,
    Fields,
    Group,
    Layer,
    ModelName,
    OutOfPatience,
    PullClient,
    PullError,
    Reply,
    UnexpectedEOF,
    layers_of,
)
from tests.support.http1 import Resolve


class RegistryError(FailedRequest):
    """An answer that is not 2xx."""

    def __init__(self, status: int, code: str, message: str) -> None:
        parts = (f"registry responded with status {status}", code and f"code {code}", message)
        super().__init__(": ".join(part for part in parts if part))
        self.status = status


class _DeadlineExceeded(Exception):
    """context.DeadlineExceeded: the read timeout of a chunk."""


class _ChunksumsFailed(Exception):
    """The list of chunksums ended early, or never began; the pull is only incomplete by that."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a server can tell of a release."""

    user_agent: str
    """Of registry calls with a signature."""
    threshold: int
    """DefaultChunkingThreshold, in bytes."""
    has_chunksums: bool


FORMS: Final = MappingProxyType(
    {
        "0.6.0": Form(GO_USER_AGENT, 128 << 20, has_chunksums=False),
        "chunksums": Form("ollama/v0.31.1 (amd64 linux) Go/go1.26.0", 64 << 20, has_chunksums=True),
    }
)


@dataclass(frozen=True, slots=True)
class _Chunk:
    url: str
    digest: str
    """Empty in the form that has none."""
    start: int
    stop: int

    @property
    def field(self) -> tuple[str, str]:
        return "Range", f"bytes={self.start}-{self.stop - 1}"

    @property
    def size(self) -> int:
        return self.stop - self.start


class Client2(PullClient):
    """One daemon with client2 enabled, asked for a streaming pull, as `ollama pull` asks.

    It accepts any 2xx for a body and verifies as it writes: each chunk in the form "chunksums", each blob in the
    form "0.6.0". In the form "chunksums" what is verified is remembered on disk, and a 5xx, a reset, an
    unreachable host or a read timeout of a chunk starts the pull anew, with back-off. All else is fatal: a body
    that is cut cleanly, and any failure of the list of chunksums itself. In the form "0.6.0" only a 5xx of a
    chunk is retried, by itself, and nothing survives a failure.

    As in the real one a blob counts as there when its file has its size, which a file does as soon as its last
    chunk is written.
    """

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        version: str = "chunksums",
        threshold: int | None = None,
        chunk: int = 8 << 20,
        streams: int = 4,
        read_timeout_s: float = 30.0,
        backoff_unit_s: float = 0.01,
        max_backoff_s: float = 3.0,
        patience_s: float = 60.0,
        resolve: Resolve | None = None,
        abort_after: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`threshold` is the layer size in bytes from which on there are chunks; None is as in the form.

        `chunk` is their size in the form "0.6.0". `streams` is GOMAXPROCS: the most requests in flight.
        `read_timeout_s` is for each read of a chunk, the time to its first byte included; "0.6.0" has none.
        After n tries it waits n * n * `backoff_unit_s`, give or take a half, at most `max_backoff_s`.
        `patience_s` is for what the real one has no limit for, the retries all together included.
        """
        super().__init__(
            proxy_url,
            cafile,
            directory,
            patience_s=patience_s,
            resolve=resolve,
            abort_after=abort_after,
            on_progress=on_progress,
        )
        self.form = FORMS[version]
        self.threshold = self.form.threshold if threshold is None else threshold
        self.chunk = chunk
        self.streams = streams
        self.read_timeout_s = read_timeout_s
        self.backoff_unit_s = backoff_unit_s
        self.max_backoff_s = max_backoff_s

    def manifest_path(self, model: str) -> Path:
        """Where a manifest is kept, also that of a `name@sha256:<digest>`."""
        return super().manifest_path(model.partition("@")[0])

    def _pull(self, model: str) -> tuple[bytes, list[str]]:
        plain, _at, digest = model.partition("@")
        name = ModelName.parse(plain)
        downloaded: dict[str, None] = {}
        fetch = self._fetch_verified if self.form.has_chunksums else self._fetch_whole

        def pull() -> bytes:
            manifest, layers = self._manifest(name, digest)
            wanted = [layer for layer in layers if not self._is_there(layer)]
            downloaded.update(dict.fromkeys(layer.digest for layer in wanted))
            for layer in wanted:
                self.blob_path(layer.digest).parent.mkdir(parents=True, exist_ok=True)
            fetch(name, wanted)
            return manifest

        manifest = self._until_settled(pull) if self.form.has_chunksums else pull()
        self._tally.transferred = time.monotonic()
        # The manifest is a blob too.
        self.blob_path(f"sha256:{hashlib.sha256(manifest).hexdigest()}").write_bytes(manifest)
        self._save_manifest(plain, manifest)
        return manifest, list(downloaded)

    def _manifest(self, name: ModelName, digest: str) -> tuple[bytes, list[Layer]]:
        url = name.url("blobs", digest) if digest else name.url("manifests", name.tag)
        with self._send(url, self._signed()) as reply:
            manifest = reply.read()
        try:
            layers = layers_of(manifest)
            has_layers = bool(json.loads(manifest).get("layers"))
        except ValueError as error:
            raise PullError(f"{name.repository}: invalid manifest: {error}") from error
        if not has_layers:
            raise PullError("invalid manifest: no layers")
        return manifest, layers

    def _is_there(self, layer: Layer) -> bool:
        path = self.blob_path(layer.digest)
        return path.exists() and path.stat().st_size == layer.size > 0

    # --- form "chunksums"

    def _fetch_verified(self, name: ModelName, layers: list[Layer]) -> None:
        expected = sum(layer.size for layer in layers)
        received = 0
        problem: _ChunksumsFailed | None = None
        with contextlib.ExitStack() as files:

            def jobs() -> Iterator[Callable[[], None]]:
                nonlocal received, problem
                for layer in layers:
                    fd = os.open(self.blob_path(layer.digest), os.O_CREAT | os.O_WRONLY, 0o644)
                    files.callback(os.close, fd)
                    try:
                        for chunk in self._chunksums(name, layer):
                            received += chunk.size
                            note = self._note(layer, chunk)
                            if not note[0].exists():
                                yield functools.partial(self._verified_chunk, fd, chunk, *note)
                    except _ChunksumsFailed as error:
                        problem = error

            # No chunk's failure ends the others.
            Group(self._context, cancels=False).run(jobs(), limit=self.streams)
        if received != expected:
            raise PullError(f"incomplete: received {received}/{expected} bytes") from problem

    def _chunksums(self, name: ModelName, layer: Layer) -> Iterator[_Chunk]:
        if layer.size < self.threshold:
            yield _Chunk(name.url("blobs", layer.digest), layer.digest, 0, layer.size)
            return
        try:
            with self._send(name.url("chunksums", layer.digest), self._signed()) as reply:
                if reply.status != 200:
                    raise _ChunksumsFailed(f"chunksums: unexpected status code {reply.status}")
                words = _words(reply)
                for digest in words:
                    yield _parse_chunk(reply.header("Content-Location"), digest, next(words, ""))
        except (FailedRequest, *NETWORK) as error:
            raise _ChunksumsFailed(str(error)) from error

    def _note(self, layer: Layer, chunk: _Chunk) -> tuple[Path, str]:
        """Where it is remembered that a chunk is complete, and in which words."""
        text = f"v1 pull chunksum {layer.digest} {chunk.digest} {chunk.start}-{chunk.stop - 1}"
        return self.blob_path(f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"), text

    def _verified_chunk(self, fd: int, chunk: _Chunk, note: Path, text: str) -> None:
        sha256 = hashlib.sha256()
        position = chunk.start
        fields = [("User-Agent", GO_USER_AGENT), chunk.field]
        try:
            with self._send(chunk.url, fields, deadline=time.monotonic() + self.read_timeout_s) as reply:
                for piece in self._pieces(reply, chunk.size, timeout_s=self.read_timeout_s):
                    sha256.update(piece)
                    is_last = position + len(piece) == chunk.stop
                    # The last write is held back until the digest is known to be right.
                    if is_last and f"sha256:{sha256.hexdigest()}" != chunk.digest:
                        raise PullError("file content changed underfoot")
                    os.pwrite(fd, piece, position)
                    position += len(piece)
        except TimeoutError as error:
            self._context.check()
            self._tally.stall()
            raise _DeadlineExceeded(f"context deadline exceeded: downloading {chunk.digest}") from error
        if position < chunk.stop:
            raise UnexpectedEOF
        note.write_text(text)

    def _until_settled(self, pull: Callable[[], bytes]) -> bytes:
        """handlePull of server/internal/registry/server.go."""
        for _attempt in self._attempts(self._context):
            try:
                return pull()
            except (PullError, _DeadlineExceeded, *NETWORK) as error:
                self._context.check()
                if not _is_temporary(error):
                    raise
                problem = error
        raise OutOfPatience(self.patience_s) from problem

    # --- form "0.6.0"

    def _fetch_whole(self, name: ModelName, layers: list[Layer]) -> None:
        group = Group(self._context)
        with contextlib.ExitStack() as files:

            def jobs() -> Iterator[Callable[[], None]]:
                for layer in layers:
                    url = name.url("blobs", layer.digest)
                    blob = files.enter_context(_Blob(self.blob_path(layer.digest), layer))
                    if layer.size <= self.threshold:
                        yield functools.partial(self._whole_blob, group, url, blob)
                        continue
                    # The final address is asked for before any chunk; the body is not read.
                    with self._send(url, [*self._signed(), ("Range", "bytes=0-0")], scope=group) as reply:
                        fields = [field for field in reply.fields if field[0] != "Range"]
                    for start in range(0, layer.size, self.chunk):
                        chunk = _Chunk(reply.url, "", start, min(start + self.chunk, layer.size))
                        yield functools.partial(self._plain_chunk, group, fields, chunk, blob)

            # One stream is the writer's.
            group.run(jobs(), limit=max(2, self.streams) - 1)

    def _whole_blob(self, group: Group, url: str, blob: "_Blob") -> None:
        position = 0
        with self._send(url, self._signed(), scope=group) as reply:
            for piece in self._pieces(reply):
                if position + len(piece) > blob.size:
                    raise PullError(f"content exceeds expected size: {position + len(piece)} > {blob.size}")
                blob.write(piece, position)
                position += len(piece)
        if position < blob.size:
            raise UnexpectedEOF

    def _plain_chunk(self, group: Group, fields: Fields, chunk: _Chunk, blob: "_Blob") -> None:
        for _attempt in self._attempts(group):
            try:
                with self._send(chunk.url, [*fields, chunk.field], scope=group) as reply:
                    position = chunk.start
                    for piece in self._pieces(reply, chunk.size):
                        blob.write(piece, position)
                        position += len(piece)
            except RegistryError as error:
                if error.status < 500:
                    raise
                problem = error
            else:
                if position < chunk.stop:
                    raise UnexpectedEOF
                return
        raise OutOfPatience(self.patience_s) from problem

    # --- requests

    def _signed(self) -> Fields:
        """newRequest: every registry call has a signature of the client's own making, asked for or not."""
        checked = base64.b64encode(f"https://ollama.com?ts={int(time.time())}".encode())
        key, signature = (base64.b64encode(secrets.token_bytes(count)) for count in (51, 64))
        token = b":".join((checked, key, signature)).decode()
        return [("User-Agent", self.form.user_agent), ("Authorization", f"Bearer {token}")]

    def _send(
        self, url: str, fields: Fields, *, scope: Cancellation | None = None, deadline: float | None = None
    ) -> Reply:
        """sendRequest: RegistryError unless 2xx."""
        if not url.startswith(("https:", "http:")):
            raise FailedRequest(f'Get "{url}": unsupported protocol scheme ""')
        reply = self._do("GET", url, fields, scope=scope, deadline=deadline)
        if 200 <= reply.status < 300:
            return reply
        with reply:
            raise _refusal(reply.status, reply.read())

    def _attempts(self, scope: Cancellation) -> Iterator[int]:
        """backoff.Loop: over when the next try would come after the end of patience."""
        deadline = time.monotonic() + self.patience_s
        for attempt in itertools.count(1):
            yield attempt
            delay = min(attempt * attempt * self.backoff_unit_s, self.max_backoff_s) * random.uniform(0.5, 1.5)
            if time.monotonic() + delay >= deadline:
                return
            scope.wait(delay)
            self._tally.retry()


class _Blob:
    """A file that takes its pieces in any order, each once, and ends up empty unless it hashes to its name."""

    def __init__(self, path: Path, layer: Layer) -> None:
        self.size = layer.size
        self._layer = layer
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        self._lock = threading.Lock()
        self._left = layer.size

    def write(self, piece: bytes, position: int) -> None:
        """Take a piece; PullError when it is the last one and the digest is another."""
        os.pwrite(self._fd, piece, position)
        with self._lock:
            self._left -= len(piece)
            if self._left:
                return
            with open(self._fd, "rb", closefd=False) as file:
                if f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" != self._layer.digest:
                    self._left = -1
                    raise PullError("file content changed underfoot")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left:
            os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _refusal(status: int, body: bytes) -> FailedRequest:
    """What Error.UnmarshalJSON makes of an answer."""
    code, message = "", body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        document = json.loads(body)
        if document.get("error"):
            code, message = document.get("code", ""), document["error"]
        else:
            first = document["errors"][0]
            code, message = first.get("code", ""), first.get("message", "")
    if code.upper() == "MANIFEST_UNKNOWN":
        return FailedRequest("model not found")
    return RegistryError(status, code, message)


def _is_temporary(error: Exception) -> bool:
    """canRetry of server/internal/registry/server.go; net's dial timeout is a DeadlineExceeded too."""
    if isinstance(error, RegistryError):
        return error.status >= 500
    is_unreachable = isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    return is_unreachable or isinstance(error, _DeadlineExceeded | ConnectionResetError | ConnectionAbortedError)


def _words(reply: Reply) -> Iterator[str]:
    """bufio.Scanner with ScanWords: what precedes a cut is a word, however much of it is missing."""
    rest = b""
    problem: Exception | None = None
    try:
        for piece in reply.pieces():
            *words, rest = re.split(rb"\s+", rest + piece)
            yield from (word.decode("latin-1") for word in words if word)
    except NETWORK as error:
        problem = error
    if rest:
        yield rest.decode("latin-1")
    if problem is not None:
        raise problem


def _parse_chunk(url: str, digest: str, interval: str) -> _Chunk:
    if not re.fullmatch("sha256[:-][0-9a-fA-F]{64}", digest):
        raise FailedRequest(f'invalid digest: "{digest}"')
    if not interval:
        raise FailedRequest(f"missing chunk range for digest {digest}")
    ends = re.fullmatch(r"(\d+)-(\d+)", interval)
    if ends is None or int(ends[1]) > int(ends[2]):
        raise FailedRequest(f'invalid chunk range for digest {digest}: "{interval}"')
    return _Chunk(url, digest.replace("-", ":").lower(), int(ends[1]), int(ends[2]) + 1)
