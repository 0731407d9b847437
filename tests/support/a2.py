"""A strict emulator of Ollama's pull client since v0.3.1: HEAD, un-ranged probe, ranged parts.

Invariant: it asks for nothing the real client would not ask for, forgives nothing the real one does not
forgive and, like it, never looks at the status or Content-Range of a part. Two departures beside those of
goclient: sizes and times scale, and a finished part does not wait for the watchdog's next one-second tick.
Knows nothing of what answers.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit

from tests.support.goclient import (
    GO_USER_AGENT,
    NETWORK,
    Aborted,
    Cancellation,
    Cancelled,
    Crashed,
    DigestMismatch,
    Exchange,
    FailedRequest,
    Fields,
    Group,
    Layer,
    MaxRetriesExceeded,
    ModelName,
    OutOfPatience,
    PullClient,
    PullError,
    PullReport,
    RedirectPolicy,
    Reply,
    UnexpectedEOF,
    follow,
    layers_of,
    same_family,
    same_host,
)
from tests.support.http1 import Resolve

__all__ = [
    "GENERATIONS",
    "A2Client",
    "Aborted",
    "DigestMismatch",
    "Exchange",
    "Generation",
    "LayerByLayer",
    "MaxRetriesExceeded",
    "ModelName",
    "PullError",
    "PullReport",
    "Release",
    "ServerClient",
]

MANIFEST_ACCEPT: Final = "application/vnd.docker.distribution.manifest.v2+json"
_COPY_BUFFER: Final = 256 * 1024
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')


class _Stalled(Exception):
    """errPartStalled."""


# --- the server package


@dataclass(frozen=True, slots=True)
class Release:
    """What a registry sees of server/images.go and server/auth.go."""

    number: str
    go: str = "go1.26.0"
    redirects: RedirectPolicy = same_family
    """Of registry calls but the probe: `follow`, `same_host` in v0.34.2, `same_family` since v0.34.3."""
    checks_realm: bool = True
    """The token is asked for on the registry's own host only; since v0.14.3."""
    tries: int = 2
    """Of one registry call that is answered 401."""
    idle_per_host: int = 2
    accept: str = MANIFEST_ACCEPT
    """Of the manifest."""

    @property
    def user_agent(self) -> str:
        """Of registry calls."""
        return f"ollama/{self.number} (amd64 linux) Go/{self.go}"


class ServerClient(PullClient):
    """PullModel of server/images.go: the manifest first and last, and the registry calls with their token."""

    def __init__(
        self,
        release: Release,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        patience_s: float,
        resolve: Resolve | None,
        abort_after: int | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        """As PullClient."""
        super().__init__(
            proxy_url,
            cafile,
            directory,
            patience_s=patience_s,
            resolve=resolve,
            abort_after=abort_after,
            on_progress=on_progress,
            idle_per_host=release.idle_per_host,
        )
        self._release = release
        self._token = ""

    def _pull(self, model: str) -> tuple[bytes, list[str]]:
        self._token = ""
        name = ModelName.parse(model, insecure=self.insecure)
        try:
            manifest = self._manifest(name)
            runnable, downloaded = self._runnable(name, manifest)
            layers = layers_of(runnable)
        except (PullError, ValueError) as error:
            raise PullError(f"pull model manifest: {error}") from error
        downloaded += self._fetch(name, layers)
        self._save_manifest(model, manifest)
        return manifest, downloaded

    def _runnable(self, name: ModelName, manifest: bytes) -> tuple[bytes, list[str]]:
        """The manifest that has the layers, and the digests of the blobs that were downloaded to get it."""
        return manifest, []

    @abstractmethod
    def _fetch(self, name: ModelName, layers: list[Layer]) -> list[str]:
        """Put the blobs at their paths, verified, and return the digests of those that were not there."""

    def _manifest(self, name: ModelName) -> bytes:
        with self._registry("GET", name.url("manifests", name.tag), [("Accept", self._release.accept)]) as reply:
            try:
                return reply.read()
            except NETWORK as error:
                raise FailedRequest(str(error)) from error

    def _registry(
        self,
        method: str,
        url: str,
        headers: Fields,
        *,
        redirects: RedirectPolicy | None = None,
        scope: Cancellation | None = None,
        deadline: float | None = None,
    ) -> Reply:
        """makeRequestWithRetry: one more try after a 401; >= 400 is an error with the body as its text."""
        for _try in range(self._release.tries):
            fields = [("User-Agent", self._release.user_agent), *headers]
            if self._token:
                fields.append(("Authorization", f"Bearer {self._token}"))
            policy = redirects or self._release.redirects
            reply = self._request(method, url, fields, redirects=policy, scope=scope, deadline=deadline)
            if reply.status < 400:
                return reply
            with reply:
                if reply.status == 404:
                    raise FailedRequest("file does not exist")
                if reply.status != 401:
                    raise FailedRequest(f"{reply.status}: {_text(reply)}")
                challenge = reply.header("WWW-Authenticate")
            self._token = self._authorize(challenge, urlsplit(url).netloc, scope=scope, deadline=deadline)
        raise FailedRequest("unauthorized: access denied")

    def _authorize(
        self, challenge: str, host: str, *, scope: Cancellation | None = None, deadline: float | None = None
    ) -> str:
        """getAuthorizationToken, with a key that nobody knows."""
        values = dict(_CHALLENGE.findall(challenge))
        realm = urlsplit(values.get("realm", ""))
        if self._release.checks_realm and realm.netloc != host:
            raise FailedRequest(f"realm host {realm.netloc!r} does not match original host {host!r}")
        query = [("service", values.get("service", ""))]
        query += [("scope", each) for each in values.get("scope", "").split()]
        query += [
            ("ts", str(int(time.time()))),
            ("nonce", base64.urlsafe_b64encode(secrets.token_bytes(16)).decode()),
        ]
        signed = ":".join(base64.b64encode(secrets.token_bytes(count)).decode() for count in (51, 64))
        with self._request(
            "GET",
            f"{values.get('realm', '')}?{urlencode(sorted(query))}",
            [("User-Agent", self._release.user_agent), ("Authorization", signed)],
            redirects=self._release.redirects,
            scope=scope,
            deadline=deadline,
        ) as reply:
            text = _text(reply)
            if reply.status >= 400:
                raise FailedRequest(f"{reply.status}: {text}")
        return str(json.loads(text)["token"])

    def _request(self, method: str, url: str, fields: Fields, **options: Any) -> Reply:
        """makeRequest."""
        try:
            return self._do(method, url, fields, **options)
        except TimeoutError:
            # The caller's deadline, and what it means is the caller's business.
            raise
        except NETWORK as error:
            raise FailedRequest(f'{method.title()} "{url}": {error}') from error


class LayerByLayer(ServerClient):
    """Blobs one after another, verified at the end."""

    def _fetch(self, name: ModelName, layers: list[Layer]) -> list[str]:
        downloaded: list[str] = []
        for layer in layers:
            path = self.blob_path(layer.digest)
            # Existence is all that counts: an old blob is not verified again.
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(name, layer.digest, path)
                downloaded.append(layer.digest)
        self._tally.transferred = time.monotonic()
        for digest in downloaded:
            with self.blob_path(digest).open("rb") as file:
                actual = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if actual != digest.replace("-", ":"):
                self.blob_path(digest).unlink()
                raise DigestMismatch(digest, actual)
        return downloaded

    @abstractmethod
    def _download(self, name: ModelName, digest: str, path: Path) -> None:
        """Put a blob at its path, whatever its digest."""


def _text(reply: Reply) -> str:
    try:
        return reply.read().decode("utf-8", "replace")
    except NETWORK as error:
        raise FailedRequest(f"{reply.status}: {error}") from error


# --- server/download.go


@dataclass(frozen=True, slots=True)
class Generation(Release):
    """What a server can tell of the releases of server/download.go."""

    accepts_200: bool = True
    """The probe may be answered 200 (with Location); since v0.3.10."""
    stall_s: float | None = 30.0
    """None: before v0.1.23 nothing was watched."""
    counts_first_byte: bool = True
    """The stall watchdog runs before the first byte; since v0.32.2."""
    parts: int = 16
    """numDownloadParts; 64 before v0.3.7."""
    min_part: int = 100_000_000
    """Bytes, as the next; 32 and 256 MB until v0.1.10."""
    max_part: int = 1_000_000_000
    max_retries: int = 6
    """Tries of a part; 3 until v0.1.10, and without a pause."""
    backs_off: bool = True
    copies_exactly: bool = True
    """A part takes as many bytes as it asked for and no more; since v0.1.39."""
    crashes_without_length: bool = False
    """A HEAD without Content-Length is an index out of range; until v0.5.7."""


_CURRENT: Final = Generation("0.34.3")
_HOST_ONLY: Final = replace(_CURRENT, number="0.34.2", redirects=same_host)
_LATE_WATCHDOG: Final = replace(_CURRENT, number="0.32.1", redirects=follow, counts_first_byte=False)
_SHORT_STALL: Final = replace(
    _LATE_WATCHDOG, number="0.5.7", go="go1.23.4", stall_s=5.0, checks_realm=False, crashes_without_length=True
)
_ONLY_307: Final = replace(_SHORT_STALL, number="0.3.9", go="go1.22.5", accepts_200=False)
_MANY_PARTS: Final = replace(_ONLY_307, number="0.3.6", parts=64)
GENERATIONS: Final = MappingProxyType(
    {each.number: each for each in (_CURRENT, _HOST_ONLY, _LATE_WATCHDOG, _SHORT_STALL, _ONLY_307, _MANY_PARTS)}
    | {"current": _CURRENT}
)
"""By the last release that behaves so; on the wire v0.3.10 differs from v0.5.7 by its number alone."""


@dataclass(slots=True)
class _Part:
    number: int
    offset: int
    size: int
    completed: int = 0

    def dump(self) -> str:
        document = {"N": self.number, "Offset": self.offset, "Size": self.size, "Completed": self.completed}
        return json.dumps(document, separators=(",", ":")) + "\n"


class A2Client(LayerByLayer):
    """One `ollama serve` with its model directory; `pull` may be called again, also after an abort."""

    generations: ClassVar[Mapping[str, Generation]] = GENERATIONS

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        min_part: int | None = None,
        max_part: int | None = None,
        parts: int | None = None,
        stall_s: float | None = None,
        max_retries: int | None = None,
        backoff_unit_s: float = 1.0,
        probe_deadline_s: float = 30.0,
        patience_s: float = 60.0,
        version: str = "current",
        resolve: Resolve | None = None,
        abort_after: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`parts` is both the divisor of a blob's size and the most requests in flight.

        What is None is as in the generation. After `abort_after` body bytes of one pull it is aborted.
        `on_progress` gets the body bytes so far, from the threads of the parts; its exceptions fail the pull.
        """
        self.generation = self.generations[version]
        super().__init__(
            self.generation,
            proxy_url,
            cafile,
            directory,
            patience_s=patience_s,
            resolve=resolve,
            abort_after=abort_after,
            on_progress=on_progress,
        )
        self.min_part = min_part or self.generation.min_part
        self.max_part = max_part or self.generation.max_part
        self.parts = parts or self.generation.parts
        self.stall_s = self.generation.stall_s if stall_s is None else stall_s
        self.max_retries = max_retries or self.generation.max_retries
        self.backoff_unit_s = backoff_unit_s if self.generation.backs_off else 0.0
        self.probe_deadline_s = probe_deadline_s

    def _download(self, name: ModelName, digest: str, path: Path) -> None:
        url = name.url("blobs", digest)
        partial = path.with_name(f"{path.name}-partial")
        # Lexical order, as filepath.Glob returns them.
        found = sorted(path.parent.glob(f"{path.name}-partial-*"))
        parts = [_load_part(file) for file in found] or self._new_parts(partial, self._head(url))
        fd = os.open(partial, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            os.ftruncate(fd, sum(part.size for part in parts))
            source = self._source(url)
            group = Group(self._context)
            group.run(
                [
                    functools.partial(self._part, group, fd, source, part, _part_path(partial, part.number))
                    for part in parts
                    if part.completed != part.size
                ],
                limit=self.parts,
            )
        finally:
            os.close(fd)
        for number in range(len(parts)):
            _part_path(partial, number).unlink()
        partial.rename(path)

    def _head(self, url: str) -> int:
        with self._registry("HEAD", url, []) as reply:
            # strconv.ParseInt with the error ignored: a missing length is 0, and 0 means an empty file.
            return reply.response.content_length or 0

    def _new_parts(self, partial: Path, total: int) -> list[_Part]:
        if not total and self.generation.crashes_without_length:
            raise Crashed("runtime error: index out of range [0] with length 0")
        size = min(max(total // self.parts, self.min_part), self.max_part)
        parts = [
            _Part(number, offset, min(size, total - offset)) for number, offset in enumerate(range(0, total, size))
        ]
        for part in parts:
            _part_path(partial, part.number).write_text(part.dump())
        return parts

    def _source(self, url: str) -> str:
        """The direct URL: the un-ranged GET that is only asked where the bytes are."""
        deadline = time.monotonic() + self.probe_deadline_s
        attempt = 0
        while True:
            # Each attempt works on a copy of the options: a token obtained here is not kept.
            token = self._token
            try:
                # The body is never read: a connection that has one is not kept.
                with self._registry("GET", url, [], redirects=_same_hostname, deadline=deadline) as reply:
                    return self._direct_url(reply)
            except (FailedRequest, TimeoutError) as error:
                problem = error
            finally:
                self._token = token
            attempt += 1
            delay = min(attempt * attempt * 0.01, 10.0) * random.uniform(0.5, 1.5)
            left = deadline - time.monotonic()
            self._context.wait(max(0.0, min(delay, left)))
            if delay >= left:
                raise PullError("context deadline exceeded") from problem

    def _direct_url(self, reply: Reply) -> str:
        if reply.status != 307 and not (reply.status == 200 and self.generation.accepts_200):
            raise PullError(f"unexpected status code {reply.status}")
        location = reply.header("Location")
        if not location:
            raise PullError("http: no Location header in response")
        return urljoin(reply.url, location)

    # --- parts

    def _part(self, group: Group, fd: int, url: str, part: _Part, path: Path) -> None:
        attempt = 0
        while attempt < self.max_retries:
            try:
                self._copy(group, fd, url, part, path)
                return
            except _Stalled:
                self._tally.stall()
            except (FailedRequest, *NETWORK) as error:
                problem = error
                group.wait(self.backoff_unit_s * 2**attempt)
                attempt += 1
                if attempt < self.max_retries:
                    self._tally.retry()
            group.check()
        raise MaxRetriesExceeded(f"max retries exceeded: {problem}") from problem

    def _copy(self, group: Group, fd: int, url: str, part: _Part, path: Path) -> None:
        """downloadChunk: one request, and exactly the remaining bytes of whatever body it brings."""
        start, stop = part.offset + part.completed, part.offset + part.size
        watchdog = _Watchdog(self.stall_s, self.patience_s, counts_first_byte=self.generation.counts_first_byte)
        sink = _Sink(fd, start)
        try:
            with contextlib.ExitStack() as stack:
                # Whatever ends the copy, what it received is in the file.
                stack.callback(sink.flush)
                stack.callback(lambda: self._tally.gap(watchdog.max_gap_s))
                reply = stack.enter_context(
                    self._open_part(url, [("Range", f"bytes={start}-{stop - 1}")], group, watchdog.deadline)
                )
                self._receive(reply, sink, stop - start if self.generation.copies_exactly else None, watchdog)
        except TimeoutError:
            if not watchdog.is_over():
                raise OutOfPatience(self.patience_s) from None
            problem: Exception | None = Cancelled() if group.is_cancelled else _Stalled()
        except (UnexpectedEOF, Cancelled) as error:
            problem = error
        else:
            problem = None
        # A cancelled copy, of a stall or of Ctrl-C, saves its progress like one that was cut cleanly.
        part.completed += sink.count
        path.write_text(part.dump())
        if problem is not None:
            raise problem

    def _open_part(self, url: str, fields: Fields, scope: Cancellation, deadline: float) -> Reply:
        return self._do("GET", url, [("User-Agent", GO_USER_AGENT), *fields], scope=scope, deadline=deadline)

    def _receive(self, reply: Reply, sink: "_Sink", wanted: int | None, watchdog: "_Watchdog") -> None:
        """io.CopyN, or io.Copy when nothing says how much is wanted."""
        while wanted is None or sink.count < wanted:
            reply.connection.set_deadline(watchdog.deadline)
            count = reply.readinto(sink.room(wanted))
            if not count:
                break
            watchdog.feed()
            sink.take(count)
            self._progress(count)
        if wanted is not None and sink.count < wanted:
            # A body that is complete but short (an error page, a chunked or close-delimited one) is io.EOF,
            # which is not in the list of errors that keep the progress.
            raise EOFError("EOF")


class _Sink:
    """Where the bytes of one copy go: a stretch of a file, behind a buffer."""

    def __init__(self, fd: int, start: int) -> None:
        self._fd = fd
        self._position = start
        self._buffer = memoryview(bytearray(_COPY_BUFFER))
        self._filled = 0
        self.count = 0
        """Bytes received."""

    def room(self, wanted: int | None) -> memoryview:
        """Space for the next bytes, of which there may be `wanted` in all."""
        left = len(self._buffer) if wanted is None else wanted - self.count
        return self._buffer[self._filled : self._filled + left]

    def take(self, count: int) -> None:
        """So many bytes are in the space."""
        self._filled += count
        self.count += count
        if self._filled == len(self._buffer):
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        os.pwrite(self._fd, self._buffer[: self._filled], self._position)
        self._position, self._filled = self._position + self._filled, 0


class _Watchdog:
    """The stall rule of one copy, and the longest gap it saw."""

    def __init__(self, stall_s: float | None, patience_s: float, *, counts_first_byte: bool) -> None:
        self._stall_s = stall_s
        self._patience_s = patience_s
        self._last = time.monotonic()
        self._is_armed = counts_first_byte
        self.max_gap_s = 0.0

    @property
    def deadline(self) -> float:
        """When the copy counts as stalled; where the real client has no limit, when patience ends."""
        return self._last + (self._patience_s if self._stall_s is None or not self._is_armed else self._stall_s)

    def is_over(self) -> bool:
        """The copy is stalled."""
        return self._stall_s is not None and self._is_armed and time.monotonic() >= self.deadline

    def feed(self) -> None:
        """Bytes came."""
        now = time.monotonic()
        self.max_gap_s = max(self.max_gap_s, now - self._last)
        self._last, self._is_armed = now, True


def _same_hostname(first: SplitResult, target: SplitResult, via: int) -> bool | str:
    """The probe's rule: the port does not matter."""
    if via > 10:
        return "maximum redirects exceeded (10) for directURL"
    return first.hostname == target.hostname


def _part_path(partial: Path, number: int) -> Path:
    """Where a part's progress is saved."""
    return partial.with_name(f"{partial.name}-{number}")


def _load_part(path: Path) -> _Part:
    document = json.loads(path.read_text())
    return _Part(document["N"], document["Offset"], document["Size"], document["Completed"])
