"""A strict emulator of Ollama's pull client since v0.3.1: HEAD, un-ranged probe, ranged parts.

Invariant: it asks for nothing the real client would not ask for, forgives nothing the real one does not
forgive and, like it, never looks at the status or Content-Range of a part. Speaks HTTP/1.1 only, as the real
client does to a server that selects no h2. Three departures: sizes and times scale, a finished part does not
wait for the watchdog's next one-second tick, and what has no time limit gets `patience_s`: a test ends.
Knows nothing of what answers.
"""

import base64
import builtins
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit

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
MANIFEST_ACCEPT: Final = "application/vnd.docker.distribution.manifest.v2+json"
GO_USER_AGENT: Final = "Go-http-client/1.1"
_FAMILY: Final = ("ollama.com", "ollama.ai", "hf.co", "huggingface.co")
"""Registry redirects between these names are followed since v0.34.3."""
_IDLE_PER_HOST: Final = 2
"""http.DefaultMaxIdleConnsPerHost."""
_SLURP: Final = 2048
"""maxBodySlurpSize of net/http."""
_COPY_BUFFER: Final = 256 * 1024
_CONNECT_TIMEOUT_S: Final = 30.0
"""The dial timeout of http.DefaultTransport."""
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')


class PullError(Exception):
    """The pull failed; the message is the real client's."""


class DigestMismatch(PullError):
    """A downloaded file does not hash to its name; it has been deleted."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"digest mismatch, file must be downloaded again: want {expected}, got {actual}")
        self.expected = expected
        self.actual = actual


class MaxRetriesExceeded(PullError):
    """A part failed as often as it is tried."""


class Aborted(PullError):
    """The pull was cancelled (Ctrl-C); what was saved is what the real client saves."""


class _Cancelled(Exception):
    """context.Canceled: this blob's download is being given up."""


class _Stalled(Exception):
    """errPartStalled."""


class _ProgressLost(Exception):
    """The progress of this copy is lost: a reset, or a body that was over too early without being cut."""


class _UnexpectedEOF(Exception):
    """io.ErrUnexpectedEOF: the progress of this copy is kept."""


_NETWORK: Final = (OSError, ClosedBeforeResponse, ConnectRefused)
"""What makes a request fail before it has a response. ssl.SSLError is an OSError."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What distinguishes the releases, as far as a server can tell."""

    number: str
    go: str = "go1.26.0"
    accepts_200: bool = True
    """The probe may be answered 200 (with Location); since v0.3.10."""
    stall_s: float = 30.0
    counts_first_byte: bool = True
    """The stall watchdog runs before the first byte; since v0.32.2."""
    restricts_redirects: bool = True
    """Registry redirects stay on the host or in the family; since v0.34.3."""


GENERATIONS: Final = MappingProxyType(
    {
        "current": Generation("0.34.3"),
        "0.32.1": Generation("0.32.1", counts_first_byte=False, restricts_redirects=False),
        "0.5.7": Generation("0.5.7", "go1.23.4", stall_s=5.0, counts_first_byte=False, restricts_redirects=False),
        "0.3.9": Generation(
            "0.3.9",
            "go1.22.5",
            accepts_200=False,
            stall_s=5.0,
            counts_first_byte=False,
            restricts_redirects=False,
        ),
    }
)


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
    """Body bytes of part requests, including what was thrown away."""
    retries: int
    """Part tries after the first one that were counted."""
    stalls: int
    max_gap_s: float
    """The longest time that any part waited for its next (or first) byte."""
    requests: tuple[Exchange, ...]
    transfer_s: float
    """Until the last blob was complete."""
    seconds: float
    """Until its digests were verified too, which each client does on its own machine."""
    manifest: builtins.bytes


@dataclass(slots=True)
class _Part:
    number: int
    offset: int
    size: int
    completed: int = 0

    def dump(self) -> str:
        document = {"N": self.number, "Offset": self.offset, "Size": self.size, "Completed": self.completed}
        return json.dumps(document, separators=(",", ":")) + "\n"


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model name with its defaults filled in."""

    scheme: str
    host: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """`[scheme://][host/][namespace/]model[:tag]`."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = "https", text
        *folders, last = rest.split("/")
        model, _colon, tag = last.partition(":")
        host = folders[0] if len(folders) == 2 else DEFAULT_HOST
        namespace = folders[-1] if folders else "library"
        return cls(scheme, host, f"{namespace}/{model}", tag or "latest")

    def url(self, kind: str, reference: str) -> str:
        """The address of a manifest or blob."""
        return f"{self.scheme}://{self.host}/v2/{self.repository}/{kind}/{reference}"


@dataclass(slots=True)
class _Tally:
    """What the threads of one pull count together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    bytes: int = 0
    retries: int = 0
    stalls: int = 0
    max_gap_s: float = 0.0
    requests: list[Exchange] = field(default_factory=list)
    transferred: float = 0.0


RedirectPolicy = Callable[[SplitResult, SplitResult], bool | str]
"""(first URL, target) -> follow, keep the 3xx response, or fail with this message."""


class A2Client:
    """One `ollama serve` with its model directory; `pull` may be called again, also after an abort."""

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        min_part: int = 100_000_000,
        max_part: int = 1_000_000_000,
        parts: int = 16,
        stall_s: float | None = None,
        max_retries: int = 6,
        backoff_unit_s: float = 1.0,
        probe_deadline_s: float = 30.0,
        patience_s: float = 60.0,
        version: str = "current",
        resolve: Resolve | None = None,
        abort_after: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`parts` is both the divisor of a blob's size and the most requests in flight.

        `stall_s` defaults to the generation's. After `abort_after` body bytes of one pull it is aborted.
        `on_progress` gets the body bytes so far, from the threads of the parts; its exceptions fail the pull.
        """
        self.directory = directory
        self.generation = GENERATIONS[version]
        self.min_part = min_part
        self.max_part = max_part
        self.parts = parts
        self.stall_s = self.generation.stall_s if stall_s is None else stall_s
        self.max_retries = max_retries
        self.backoff_unit_s = backoff_unit_s
        self.probe_deadline_s = probe_deadline_s
        self.patience_s = patience_s
        self.abort_after = abort_after
        self.on_progress = on_progress
        self._transport = _Transport(proxy_url, client_context(cafile), resolve)
        self._abort = threading.Event()
        self._run: _Run | None = None
        self._token = ""
        self._tally = _Tally()

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
        self._abort.set()
        if run := self._run:
            run.cancel()
        self._transport.abort_control()

    def pull(self, model: str) -> PullReport:
        """`ollama pull`."""
        self._abort.clear()
        self._tally = _Tally()
        self._token = ""
        started = time.monotonic()
        try:
            manifest, downloaded = self._pull(ModelName.parse(model), self.manifest_path(model))
        except _Cancelled:
            raise Aborted("context canceled") from None
        except PullError:
            if self._abort.is_set():
                raise Aborted("context canceled") from None
            raise
        finally:
            self._transport.close()
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

    # --- the pull

    def _pull(self, name: ModelName, manifest_path: Path) -> tuple[bytes, list[str]]:
        try:
            manifest = self._registry_body(name, "GET", name.url("manifests", name.tag), [("Accept", MANIFEST_ACCEPT)])
            document = json.loads(manifest)
        except (PullError, ValueError) as error:
            raise PullError(f"pull model manifest: {error}") from error
        digests = [layer["digest"] for layer in document.get("layers") or []]
        if config := (document.get("config") or {}).get("digest"):
            digests.append(config)

        downloaded: list[str] = []
        for digest in digests:
            path = self.blob_path(digest)
            # Existence is all that counts: an old blob is not verified again.
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(name, digest, path)
                downloaded.append(digest)
        self._tally.transferred = time.monotonic()
        for digest in downloaded:
            with self.blob_path(digest).open("rb") as file:
                actual = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if actual != digest.replace("-", ":"):
                self.blob_path(digest).unlink()
                raise DigestMismatch(digest, actual)
        manifest_path.parent.mkdir(parents=True, exist_ok=True)
        manifest_path.write_bytes(manifest)
        return manifest, downloaded

    def _download(self, name: ModelName, digest: str, path: Path) -> None:
        url = name.url("blobs", digest)
        # Lexical order, as filepath.Glob returns them.
        found = sorted(path.parent.glob(f"{path.name}-partial-*"))
        parts = [_load_part(file) for file in found]
        if not parts:
            parts = self._new_parts(path, self._head(name, url))
        run = _Run(path.with_name(f"{path.name}-partial"), parts)
        self._run = run
        try:
            # An abort between the last check and the line above found no run to cancel.
            self._check_abort()
            fd = os.open(run.partial, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                os.ftruncate(fd, sum(part.size for part in parts))
                direct_url = self._probe(name, url)
                self._download_parts(run, fd, direct_url)
            finally:
                os.close(fd)
        finally:
            self._run = None
        for number in range(len(parts)):
            run.part_path(number).unlink()
        run.partial.rename(path)

    def _head(self, name: ModelName, url: str) -> int:
        connection, response = self._registry(name, "HEAD", url, [])
        self._transport.release(url, connection)
        # strconv.ParseInt with the error ignored: a missing length is 0, and 0 means an empty file.
        return response.content_length or 0

    def _new_parts(self, path: Path, total: int) -> list[_Part]:
        size = min(max(total // self.parts, self.min_part), self.max_part)
        parts = [
            _Part(number, offset, min(size, total - offset)) for number, offset in enumerate(range(0, total, size))
        ]
        for part in parts:
            path.with_name(f"{path.name}-partial-{part.number}").write_text(part.dump())
        return parts

    def _probe(self, name: ModelName, url: str) -> str:
        """The direct URL: the un-ranged GET that is only asked where the bytes are."""
        deadline = time.monotonic() + self.probe_deadline_s
        attempt = 0
        while True:
            # Each attempt works on a copy of the options: a token obtained here is not kept.
            token = self._token
            try:
                connection, response = self._registry(name, "GET", url, [], redirects=_same_hostname, deadline=deadline)
            except PullError as error:
                problem = error
            else:
                # The body is never read: a connection that has one cannot be kept.
                self._transport.release(url, connection)
                return self._direct_url(url, response)
            finally:
                self._token = token
            self._check_abort()
            attempt += 1
            delay = min(attempt * attempt * 0.01, 10.0) * random.uniform(0.5, 1.5)
            left = deadline - time.monotonic()
            self._abort.wait(max(0.0, min(delay, left)))
            self._check_abort()
            if delay >= left:
                raise PullError("context deadline exceeded") from problem

    def _direct_url(self, url: str, response: Response) -> str:
        if response.status != 307 and not (response.status == 200 and self.generation.accepts_200):
            raise PullError(f"unexpected status code {response.status}")
        location = response.header("Location")
        if not location:
            raise PullError("http: no Location header in response")
        return urljoin(url, location)

    # --- parts

    def _download_parts(self, run: "_Run", fd: int, url: str) -> None:
        wanted = [part for part in run.parts if part.completed != part.size]
        if not wanted:
            return
        with ThreadPoolExecutor(self.parts, thread_name_prefix="a2-part") as pool:
            futures = [pool.submit(self._part, run, fd, url, part) for part in wanted]
        errors = [error for future in futures if (error := future.exception()) is not None]
        self._check_abort()
        # As errgroup: the first error counts, the others are the cancellation that it caused.
        if errors:
            raise run.first_error or errors[0]

    def _part(self, run: "_Run", fd: int, url: str, part: _Part) -> None:
        try:
            self._part_with_retries(run, fd, url, part)
        except BaseException as error:
            run.fail(error)
            raise

    def _part_with_retries(self, run: "_Run", fd: int, url: str, part: _Part) -> None:
        attempt = 0
        while attempt < self.max_retries:
            try:
                self._copy(run, fd, url, part)
                return
            except _Stalled:
                with self._tally.lock:
                    self._tally.stalls += 1
            except (_ProgressLost, _UnexpectedEOF, *_NETWORK) as error:
                if run.cancelled.is_set():
                    raise _Cancelled from None
                problem = error
                run.cancelled.wait(self.backoff_unit_s * 2**attempt)
                attempt += 1
                if attempt < self.max_retries:
                    with self._tally.lock:
                        self._tally.retries += 1
            if run.cancelled.is_set():
                raise _Cancelled
        raise MaxRetriesExceeded(f"max retries exceeded: {problem}") from problem

    def _copy(self, run: "_Run", fd: int, url: str, part: _Part) -> None:
        """downloadChunk: one request, and exactly the remaining bytes of whatever body it brings."""
        start, stop = part.offset + part.completed, part.offset + part.size
        headers = [("User-Agent", GO_USER_AGENT), ("Range", f"bytes={start}-{stop - 1}")]
        watchdog = _Watchdog(self.stall_s, counts_first_byte=self.generation.counts_first_byte)
        outcome: Exception | None = None
        with run.exchange() as exchange:
            try:
                connection, response = self._send(
                    "GET", url, headers, redirects=_follow, deadline=watchdog.deadline, exchange=exchange
                )
                self._receive(fd, start, stop, connection, response, exchange, watchdog)
            except TimeoutError:
                if not watchdog.is_over():
                    raise PullError(f"no byte within the {self.patience_s} s this emulator waits") from None
                outcome = _Stalled()
            else:
                if exchange.received < stop - start:
                    outcome = _early_end(response)
            with self._tally.lock:
                self._tally.max_gap_s = max(self._tally.max_gap_s, watchdog.max_gap_s)
            if outcome is not None and run.cancelled.is_set():
                outcome = _Cancelled()
            if isinstance(outcome, _ProgressLost):
                raise outcome
            # A cancelled copy, of a stall or of Ctrl-C, saves its progress like one that was cut cleanly.
            part.completed += exchange.received
            run.part_path(part.number).write_text(part.dump())
            if outcome is not None:
                raise outcome
            exchange.connection = None
            self._transport.release(url, connection)

    def _receive(
        self,
        fd: int,
        start: int,
        stop: int,
        connection: Connection,
        response: Response,
        exchange: "_Exchange",
        watchdog: "_Watchdog",
    ) -> None:
        """Copy until `stop` or the end of the body; what was received is in the file whatever ends it."""
        buffer = memoryview(bytearray(min(_COPY_BUFFER, stop - start)))
        position, filled = start, 0
        try:
            while position + filled < stop:
                # Without a deadline that of the request still holds.
                if watchdog.deadline is not None:
                    connection.set_deadline(watchdog.deadline)
                count = response.readinto(buffer[filled : min(len(buffer), filled + stop - position - filled)])
                if not count:
                    break
                watchdog.feed()
                filled += count
                if filled == len(buffer):
                    os.pwrite(fd, buffer, position)
                    position, filled = position + filled, 0
                self._progress(count)
        finally:
            os.pwrite(fd, buffer[:filled], position)
            exchange.received = position + filled - start

    def _progress(self, count: int) -> None:
        with self._tally.lock:
            self._tally.bytes += count
            total = self._tally.bytes
        if self.abort_after is not None and total >= self.abort_after:
            self.abort_after = None
            self.abort()
        if self.on_progress is not None:
            self.on_progress(total)

    # --- requests

    def _check_abort(self) -> None:
        if self._abort.is_set():
            raise _Cancelled

    @property
    def _user_agent(self) -> str:
        return f"ollama/{self.generation.number} (amd64 linux) Go/{self.generation.go}"

    def _registry_body(self, name: ModelName, method: str, url: str, headers: list[tuple[str, str]]) -> bytes:
        connection, response = self._registry(name, method, url, headers)
        body = self._body(response)
        self._transport.release(url, connection)
        return body

    def _body(self, response: Response) -> bytes:
        try:
            body = response.read()
        except OSError as error:
            raise PullError(str(error)) from error
        if response.closed_short:
            raise PullError("unexpected EOF" if response.ended == "fin" else "connection reset by peer")
        # Go's transport undoes the gzip that it asked for itself.
        if (response.header("Content-Encoding") or "").lower() == "gzip":
            return gzip.decompress(body)
        return body

    def _registry(
        self,
        name: ModelName,
        method: str,
        url: str,
        headers: list[tuple[str, str]],
        *,
        redirects: RedirectPolicy | None = None,
        deadline: float | None = None,
    ) -> tuple[Connection, Response]:
        """makeRequestWithRetry: one more try after a 401; >= 400 is an error with the body as its text."""
        for _try in range(2):
            fields = [("User-Agent", self._user_agent), *headers]
            if self._token:
                fields.append(("Authorization", f"Bearer {self._token}"))
            if method == "GET":
                fields.append(("Accept-Encoding", "gzip"))
            try:
                connection, response = self._send(
                    method, url, fields, redirects=redirects or self._registry_redirect, deadline=deadline
                )
            except _NETWORK as error:
                self._check_abort()
                raise PullError(f'{method.title()} "{url}": {error}') from error
            if response.status < 400:
                return connection, response
            if response.status == 401:
                connection.close()
                self._token = self._authorize(name, response.header("WWW-Authenticate") or "", deadline)
            elif response.status == 404:
                connection.close()
                raise _Answered("file does not exist")
            else:
                text = self._body(response).decode("utf-8", "replace")
                connection.close()
                raise _Answered(f"{response.status}: {text}")
        raise _Answered("unauthorized: access denied")

    def _authorize(self, name: ModelName, challenge: str, deadline: float | None) -> str:
        values = dict(_CHALLENGE.findall(challenge))
        realm = urlsplit(values.get("realm", ""))
        if realm.netloc != name.host:
            raise PullError(f"realm host {realm.netloc!r} does not match original host {name.host!r}")
        query = [("service", values.get("service", ""))]
        query += [("scope", scope) for scope in values.get("scope", "").split()]
        query += [
            ("ts", str(int(time.time()))),
            ("nonce", base64.urlsafe_b64encode(secrets.token_bytes(16)).decode()),
        ]
        url = f"{values['realm']}?{urlencode(sorted(query))}"
        signed = (
            base64.b64encode(secrets.token_bytes(51)).decode(),
            base64.b64encode(secrets.token_bytes(64)).decode(),
        )
        fields = [
            ("User-Agent", self._user_agent),
            ("Authorization", ":".join(signed)),
            ("Accept-Encoding", "gzip"),
        ]
        try:
            connection, response = self._send("GET", url, fields, redirects=self._registry_redirect, deadline=deadline)
        except _NETWORK as error:
            raise PullError(f'Get "{url}": {error}') from error
        body = self._body(response)
        self._transport.release(url, connection)
        if response.status >= 400:
            raise _Answered(f"{response.status}: {body.decode('utf-8', 'replace')}")
        return str(json.loads(body)["token"])

    def _registry_redirect(self, first: SplitResult, target: SplitResult) -> bool | str:
        if not self.generation.restricts_redirects or first.netloc == target.netloc:
            return True
        if _is_family(first.hostname or "") and _is_family(target.hostname or ""):
            return True
        return f"blocked redirect to a different host: {target.netloc}"

    def _send(
        self,
        method: str,
        url: str,
        fields: list[tuple[str, str]],
        *,
        redirects: RedirectPolicy,
        deadline: float | None = None,
        exchange: "_Exchange | None" = None,
    ) -> tuple[Connection, Response]:
        """http.Client.Do: follow redirects as the policy allows. The returned connection is the caller's."""
        first = urlsplit(url)
        for hop in range(11):
            connection, response = self._exchange(method, url, fields, deadline, exchange)
            location = response.header("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return connection, response
            target = urljoin(url, location)
            verdict = redirects(first, urlsplit(target))
            if verdict is False:
                return connection, response
            # Go reads a short body away, so that the connection can be kept.
            if response.content_length is not None and response.content_length <= _SLURP:
                response.read()
            self._transport.release(url, connection)
            if isinstance(verdict, str):
                raise _Answered(f'{method.title()} "{target}": {verdict}')
            if hop == 10:
                break
            fields = [(key, value) for key, value in fields if key != "Referer"]
            own, other = first.hostname or "", urlsplit(target).hostname or ""
            if other != own and not other.endswith(f".{own}"):
                fields = [(key, value) for key, value in fields if key != "Authorization"]
            fields.append(("Referer", url))
            url = target
        raise _Answered(f'{method.title()} "{url}": stopped after 10 redirects')

    def _exchange(
        self,
        method: str,
        url: str,
        fields: list[tuple[str, str]],
        deadline: float | None,
        exchange: "_Exchange | None",
    ) -> tuple[Connection, Response]:
        split = urlsplit(url)
        if deadline is None:
            deadline = time.monotonic() + self.patience_s
        target = (split.path or "/") + (f"?{split.query}" if split.query else "")
        asked_range = dict(fields).get("Range")
        status = 0
        headers: tuple[tuple[str, str], ...] = ()
        try:
            while True:
                connection, is_fresh = self._transport.acquire(url, deadline)
                if exchange is not None:
                    exchange.attach(connection)
                else:
                    self._transport.control = connection
                try:
                    self._check_abort()
                    connection.set_deadline(deadline)
                    response = connection.request(method, target, fields)
                except (ClosedBeforeResponse, ConnectionError):
                    connection.close()
                    # Go asks again on another connection when a kept-alive one was closed under its hands.
                    if is_fresh:
                        raise
                except BaseException:
                    connection.close()
                    raise
                else:
                    status, headers = response.status, tuple(response.headers)
                    return connection, response
        finally:
            with self._tally.lock:
                self._tally.requests.append(Exchange(method, url, asked_range, status, headers))


class _Answered(PullError):
    """The registry answered, and the answer is an error."""


class _Watchdog:
    """The stall rule of one copy, and the longest gap it saw."""

    def __init__(self, stall_s: float, *, counts_first_byte: bool) -> None:
        self._stall_s = stall_s
        self._last = time.monotonic()
        self._armed = counts_first_byte
        self.max_gap_s = 0.0

    @property
    def deadline(self) -> float | None:
        """When the copy counts as stalled."""
        return self._last + self._stall_s if self._armed else None

    def is_over(self) -> bool:
        """The deadline has passed."""
        return self._armed and time.monotonic() >= self._last + self._stall_s

    def feed(self) -> None:
        """Bytes came."""
        now = time.monotonic()
        self.max_gap_s = max(self.max_gap_s, now - self._last)
        self._last, self._armed = now, True


class _Exchange:
    """The connection that a part uses now, so that a cancellation can end it."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self.connection: Connection | None = None
        self.received = 0

    def attach(self, connection: Connection) -> None:
        """Make the connection known, or end it at once when the run has been cancelled."""
        with self._run.lock:
            self.connection = connection
            if self._run.cancelled.is_set():
                connection.abort()


class _Run:
    """The download of one blob: its parts, and the cancellation they share."""

    def __init__(self, partial: Path, parts: Sequence[_Part]) -> None:
        self.partial = partial
        self.parts = parts
        self.lock = threading.Lock()
        self.cancelled = threading.Event()
        self.first_error: BaseException | None = None
        self._exchanges: set[_Exchange] = set()

    def part_path(self, number: int) -> Path:
        """Where a part's progress is saved."""
        return self.partial.with_name(f"{self.partial.name}-{number}")

    @contextlib.contextmanager
    def exchange(self) -> Iterator[_Exchange]:
        """A place for one part's connection; what is left in it is closed."""
        exchange = _Exchange(self)
        with self.lock:
            if self.cancelled.is_set():
                raise _Cancelled
            self._exchanges.add(exchange)
        try:
            yield exchange
        finally:
            with self.lock:
                self._exchanges.discard(exchange)
            if exchange.connection is not None:
                exchange.connection.close()

    def fail(self, error: BaseException) -> None:
        """Cancel the other parts because of an error."""
        with self.lock:
            if self.first_error is None:
                self.first_error = error
        self.cancel()

    def cancel(self) -> None:
        """End all parts."""
        with self.lock:
            self.cancelled.set()
            for exchange in self._exchanges:
                if exchange.connection is not None:
                    exchange.connection.abort()


class _Transport:
    """http.DefaultTransport: connections by host, at most two idle ones each."""

    def __init__(self, proxy_url: str | None, context: ssl.SSLContext, resolve: Resolve | None) -> None:
        self._proxy_url = proxy_url
        self._context = context
        self._resolve = resolve
        self._lock = threading.Lock()
        self._idle: dict[str, list[Connection]] = {}
        self.control: Connection | None = None
        """The connection of the manifest, HEAD, probe or token request under way."""

    def acquire(self, url: str, deadline: float) -> tuple[Connection, bool]:
        """A connection, and whether it is a fresh one."""
        split = urlsplit(url)
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
        dial_deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        try:
            connection = connect(
                self._proxy_url,
                split.hostname or "",
                split.port or (443 if is_tls else 80),
                None,
                context=self._context if is_tls else None,
                timeout_s=None,
                deadline=min(dial_deadline, deadline),
                resolve=self._resolve,
            )
        except TimeoutError:
            if time.monotonic() >= dial_deadline:
                raise ConnectionAbortedError("dial tcp: i/o timeout") from None
            raise
        return connection, True

    def release(self, url: str, connection: Connection) -> None:
        """Give a connection back whose response is over; it is kept if the response allows it."""
        netloc = urlsplit(url).netloc
        connection.set_deadline(None)
        with self._lock:
            idle = self._idle.setdefault(netloc, [])
            if connection.is_reusable and len(idle) < _IDLE_PER_HOST:
                idle.append(connection)
                return
        connection.close()

    def abort_control(self) -> None:
        """End the registry request under way, from any thread."""
        if connection := self.control:
            connection.abort()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            kept = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in kept:
            connection.close()


def _early_end(response: Response) -> Exception:
    """io.CopyN's error for a body that ended before N bytes."""
    if response.ended == "rst":
        return _ProgressLost("read: connection reset by peer")
    # A body that is complete but short (an error page, a chunked or close-delimited one) is io.EOF, not
    # io.ErrUnexpectedEOF, and io.EOF is not in the list of errors that keep the progress.
    return _UnexpectedEOF("unexpected EOF") if response.ended == "fin" else _ProgressLost("EOF")


def _same_hostname(first: SplitResult, target: SplitResult) -> bool:
    """The probe's rule: the port does not matter."""
    return first.hostname == target.hostname


def _follow(_first: SplitResult, _target: SplitResult) -> bool:
    return True


def _is_family(hostname: str) -> bool:
    return any(hostname == name or hostname.endswith(f".{name}") for name in _FAMILY)


def _load_part(path: Path) -> _Part:
    document = json.loads(path.read_text())
    return _Part(document["N"], document["Offset"], document["Size"], document["Completed"])
