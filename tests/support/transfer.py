"""A strict emulator of transfer, which pulls models with tensor layers (v0.14.0 to today).

Invariant: it asks, accepts and refuses as transfer/download.go (x/transfer before v0.35.0, x/imagegen/transfer before
v0.30.0) and, since v0.34.2, redirect.go beside it do. Departures beside those of goclient: a stall or a slow body is
noticed without the watchdog's one-second tick; before v0.35.0 addresses are not judged once more at the dial; and
TransferClient pulls any model so, not only one with tensors.
Knows nothing of what answers.
"""

import contextlib
import functools
import hashlib
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import urljoin, urlsplit

from tests.support.a2 import Release, ServerClient
from tests.support.goclient import (
    NETWORK,
    Crashed,
    FailedRequest,
    Fields,
    Group,
    Layer,
    MaxRetriesExceeded,
    ModelName,
    OutOfPatience,
    Reply,
    Transport,
    follow,
    keep,
    same_host,
)
from tests.support.http1 import Resolve
from tests.support.redirects import Dns, NotAllowed, Redirects

TENSOR_TYPE: Final = "application/vnd.ollama.image.tensor"
"""The media type that makes the real daemon choose transfer."""
_USER_AGENT: Final = "ollama-transfer/1.0"
_MAX_RETRIES: Final = 6
_FREE_RETRIES: Final = 2
"""Of slow bodies, and since v0.35.0 of stalled ones."""
_SPEEDS: Final = 30
"""The median is of the last so many blobs."""
_FEW_SPEEDS: Final = 5
"""With fewer samples nothing is slow."""
_IDLE_PER_HOST: Final = 100
_DISCARD: Final = 256 * 1024


class _Stalled(Exception):
    """errStalled."""


class _Slow(Exception):
    """errSlow."""


@dataclass(frozen=True, slots=True)
class Era(Release):
    """What a server can tell of the releases of transfer."""

    drains: bool = True
    """The answer to the resolving GET is read to its end; since v0.20.5."""
    resumes: bool = True
    """A large blob goes on from what there is of it, and 206 is accepted; since v0.20.5."""
    streams: int = 4
    """OLLAMA_MAX_TRANSFER_STREAMS; since v0.30.0."""
    checks_target: bool = True
    """A redirect may lead only over https and to another host only if that is public; since v0.34.2."""
    interrupts: bool = False
    """A stall or a slow body ends the read, stalls count like slow bodies, each retry waits; since v0.35.0."""
    pins: bool = False
    """The addresses are judged once more when they are dialled."""
    takes_first: bool = False
    """A 200 or 206 to the resolving GET is the data, and the Range goes with that GET."""
    by_proxy: bool = False
    """The environment's proxy is asked, as for everything else."""


_CURRENT: Final = Era("0.34.3")
_HOST_ONLY: Final = replace(_CURRENT, number="0.34.2", redirects=same_host)
_ANY_TARGET: Final = replace(_CURRENT, number="0.33.0", redirects=follow, checks_target=False)
_MANY_STREAMS: Final = replace(_ANY_TARGET, number="0.20.5", go="go1.24.1", streams=64)
_WHOLE_ONLY: Final = replace(_MANY_STREAMS, number="0.14.0", checks_realm=False, drains=False, resumes=False)
_PAST_PROXIES: Final = replace(_CURRENT, number="0.40.2", go="go1.27", interrupts=True, pins=True)
_BY_PROXY: Final = replace(_PAST_PROXIES, number="0.40.3", takes_first=True, by_proxy=True)
_TWICE: Final = replace(_BY_PROXY, takes_first=False)
ERAS: Final = MappingProxyType(
    {
        each.number: each
        for each in (_BY_PROXY, _PAST_PROXIES, _CURRENT, _HOST_ONLY, _ANY_TARGET, _MANY_STREAMS, _WHOLE_ONLY)
    }
    | {"0.40.3 twice": _TWICE, "current": _CURRENT}
)
"""By a release that behaves so. 0.40.3 stands for the first that asks proxies; upstream has both forms of it."""


class Transfers(ServerClient):
    """A daemon that can transfer blobs: per blob a GET to learn the address, and a GET of the bytes.

    Blobs are dialled directly, proxy or not, unless the era asks proxies.
    """

    def _prepare(
        self,
        era: Era,
        dns: Dns | None,
        *,
        streams: int | None = None,
        resume_threshold: int = 64 << 20,
        speed_threshold: int = 100 << 10,
        stall_s: float = 10.0,
        slow_s: float = 5.0,
        backoff_unit_s: float = 0.01,
    ) -> None:
        """Set what TransferClient's constructor explains."""
        self.era = era
        self.dns: Dns = dns or {}
        self.streams = streams or era.streams
        self.resume_threshold = resume_threshold
        # Until v0.20.5 every blob counted.
        self.speed_threshold = speed_threshold if era.resumes else 0
        self.transfer_stall_s = stall_s
        self.slow_s = slow_s
        self.transfer_backoff_unit_s = backoff_unit_s
        self._token_lock = threading.Lock()
        self._speeds: deque[float] = deque(maxlen=_SPEEDS)
        """Bytes per second of the last blobs; an append is atomic."""

    def _transfer(self, name: ModelName, layers: list[Layer]) -> list[str]:
        """Download what is not there; the digests of that."""
        self._speeds.clear()
        base = f"{name.scheme}://{name.host}"
        # No http name is pulled without --insecure, which lifts the check of addresses.
        is_insecure = name.scheme == "http"
        self._redirects = Redirects(
            base,
            self.dns,
            own_host=urlsplit(base).hostname or "",
            allow_private=is_insecure,
            uses_proxy=self._transport.uses_proxy if self.era.by_proxy else None,
        )
        pin = self._redirects.pin if self.era.pins and not is_insecure else None
        self._blobs: Transport = self._new_transport(
            self._proxy_url if self.era.by_proxy else None, _IDLE_PER_HOST, pin
        )
        wanted = [layer for layer in layers if not self._is_there(layer)]
        group = Group(self._context)
        group.run((functools.partial(self._blob, group, name, layer) for layer in wanted), limit=self.streams)
        return [layer.digest for layer in wanted]

    def _is_there(self, layer: Layer) -> bool:
        path = self.blob_path(layer.digest)
        return path.exists() and path.stat().st_size == layer.size

    # --- one blob

    def _blob(self, group: Group, name: ModelName, layer: Layer) -> None:
        """downloader.download."""
        attempt = slow = stalled = tries = 0
        deadline = time.monotonic() + self.patience_s
        path = self.blob_path(layer.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp")
        while attempt < _MAX_RETRIES:
            if attempt:
                self._tally.retry()
            if pauses := tries if self.era.interrupts else attempt:
                delay = min(pauses * pauses * self.transfer_backoff_unit_s, 2.0 ** (pauses - 1))
                group.wait(delay * random.uniform(0.5, 1.5))
            started = time.monotonic()
            try:
                self._attempt(group, name, layer, partial)
            except (FailedRequest, _Slow, _Stalled, *NETWORK) as error:
                group.check()
                problem = error
                tries += 1
                if layer.size < self.resume_threshold or not self.era.resumes:
                    partial.unlink(missing_ok=True)
                if isinstance(error, _Stalled):
                    self._tally.stall()
                    stalled += 1
                    if time.monotonic() > deadline:
                        raise OutOfPatience(self.patience_s) from error
                    attempt += self.era.interrupts and stalled > _FREE_RETRIES
                    continue
                slow += isinstance(error, _Slow)
                if not isinstance(error, _Slow) or slow > _FREE_RETRIES:
                    attempt += 1
            else:
                partial.rename(path)
                if layer.size >= self.speed_threshold:
                    self._speeds.append(layer.size / (time.monotonic() - started))
                return
        raise MaxRetriesExceeded(f"max retries exceeded: {problem}") from problem

    def _attempt(self, group: Group, name: ModelName, layer: Layer, partial: Path) -> None:
        """downloadOnce and save: the whole blob is in the partial file, or one of the errors of an attempt."""
        first = name.url("blobs", layer.digest)
        have = 0
        if self.era.resumes and layer.size >= self.resume_threshold and partial.exists():
            # A file of the full size is no better than none.
            have = partial.stat().st_size if partial.stat().st_size < layer.size else 0
        wanted = [("Range", f"bytes={have}-")] if have else []
        found = self._resolve_blob(group, first, wanted if self.era.takes_first else [])
        if isinstance(found, str):
            fields: Fields = [("User-Agent", _USER_AGENT)]
            if urlsplit(found).netloc == urlsplit(first).netloc and self._token:
                fields.append(("Authorization", f"Bearer {self._token}"))
            found = self._ask(group, found, fields + wanted)
        with found as reply, contextlib.ExitStack() as stack:
            if self.era.drains:
                stack.callback(self._drain, reply)
            if reply.status == 200:
                have = 0
            elif not (reply.status == 206 and self.era.resumes):
                raise FailedRequest(f"status {reply.status}")
            try:
                self._save(reply, layer, partial, have)
            except (_Slow, _Stalled):
                if self.era.interrupts:
                    # The request's context is cancelled: there is nothing left to drain.
                    reply.connection.abort()
                raise

    def _save(self, reply: Reply, layer: Layer, partial: Path, have: int) -> None:
        sha256 = hashlib.sha256()
        with partial.open("r+b" if have else "w+b") as file:
            while file.tell() < have:
                sha256.update(file.read(min(1 << 20, have - file.tell())))
            began = last = time.monotonic()
            count = 0
            if self.era.interrupts:
                reply.connection.set_deadline(self._interruption(began, last, count))
            pieces = self._pieces(reply)
            while True:
                try:
                    piece = next(pieces, b"")
                except TimeoutError:
                    if self._is_slow(count, time.monotonic() - began):
                        raise _Slow("download too slow") from None
                    raise _Stalled("download stalled") from None
                if not piece:
                    break
                file.write(piece)
                sha256.update(piece)
                count += len(piece)
                now = time.monotonic()
                # Before v0.35.0 what the watchdog finds does not end a read; it is acted on before the next one, and
                # after the last byte there is none.
                if reply.response.ended is None and now - last > self.transfer_stall_s:
                    raise _Stalled("download stalled")
                if reply.response.ended is None and self._is_slow(count, now - began):
                    raise _Slow("download too slow")
                last = now
                if self.era.interrupts:
                    reply.connection.set_deadline(self._interruption(began, last, count))
        if f"sha256:{sha256.hexdigest()}" != layer.digest:
            partial.unlink()
            raise FailedRequest("digest mismatch")
        if have + count != layer.size:
            partial.unlink()
            raise FailedRequest("size mismatch")

    def _interruption(self, began: float, last: float, count: int) -> float:
        """When the watchdog ends a read that brings nothing more."""
        stalled = last + self.transfer_stall_s
        limit = self._slow_limit()
        return min(stalled, began + max(self.slow_s, count / limit)) if limit else stalled

    def _slow_limit(self) -> float:
        """Bytes per second below which a body is slow; 0 while nothing is known."""
        speeds = list(self._speeds)
        return 0.1 * statistics.median_high(speeds) if len(speeds) >= _FEW_SPEEDS else 0.0

    def _is_slow(self, count: int, seconds: float) -> bool:
        return seconds >= self.slow_s and count < self._slow_limit() * seconds

    def _drain(self, reply: Reply) -> None:
        """io.Copy to io.Discard, whose error nobody looks at."""
        buffer = memoryview(bytearray(_DISCARD))
        with contextlib.suppress(*NETWORK):
            while count := reply.readinto(buffer):
                reply.connection.set_deadline(time.monotonic() + self.patience_s)
                self._progress(count)

    # --- where the bytes are

    def _resolve_blob(self, group: Group, first: str, wanted: Fields) -> str | Reply:
        """downloader.resolve: where the bytes are, or the answer that is them; `wanted` is the Range."""
        url = first
        for _hop in range(10):
            token = self._token
            fields: Fields = [("User-Agent", _USER_AGENT)]
            if token:
                fields.append(("Authorization", f"Bearer {token}"))
            reply = self._ask(group, url, fields + wanted)
            if reply.status in (200, 206) and self.era.takes_first:
                return reply
            with reply:
                if self.era.drains:
                    self._drain(reply)
            if reply.status == 200:
                return url
            if reply.status == 401:
                self._refresh(token, reply.header("WWW-Authenticate"), urlsplit(first).netloc)
            elif reply.status in (301, 302, 307):
                location = reply.header("Location")
                if not location and not self.era.checks_target:
                    raise Crashed("runtime error: invalid memory address or nil pointer dereference")
                if not location:
                    raise NotAllowed("missing Location")
                target = urljoin(url, location)
                if self.era.checks_target:
                    self._redirects.check_scheme(target)
                if urlsplit(target).netloc != urlsplit(url).netloc:
                    if self.era.checks_target:
                        self._redirects.check_target(target)
                    return target
                url = target
            else:
                raise FailedRequest(f"status {reply.status}")
        raise FailedRequest("too many redirects")

    def _refresh(self, rejected: str, challenge: str, host: str) -> None:
        """refreshToken: only one of those who were rejected with the same token asks for another."""
        with self._token_lock:
            if self._token == rejected:
                self._token = self._authorize(challenge, host)

    def _ask(self, group: Group, url: str, fields: Fields) -> Reply:
        # A deadline of its own, so that a read can be interrupted; for the response it is that of patience.
        deadline = time.monotonic() + self.patience_s if self.era.interrupts else None
        try:
            return self._request(
                "GET", url, fields, redirects=keep, scope=group, transport=self._blobs, deadline=deadline
            )
        except TimeoutError as error:
            raise OutOfPatience(self.patience_s) from error


class TransferClient(Transfers):
    """One daemon that pulls a model of tensors.

    The manifest and the token are asked for as A2 asks, through the proxy.
    """

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        version: str = "current",
        dns: Dns | None = None,
        streams: int | None = None,
        resume_threshold: int = 64 << 20,
        speed_threshold: int = 100 << 10,
        stall_s: float = 10.0,
        slow_s: float = 5.0,
        backoff_unit_s: float = 0.01,
        patience_s: float = 60.0,
        resolve: Resolve | None = None,
        abort_after: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`resolve` is where connections really go; `dns` is which addresses a name has for the check of redirects.

        A name that is not in `dns` does not exist; before v0.34.2 nobody asks. Blobs of at least
        `resume_threshold` bytes are resumed; those of at least `speed_threshold` bytes count for the median, of
        which less than a tenth is slow after `slow_s`. A blob that stalls again and again is given up after
        `patience_s`. Others as A2Client.
        """
        super().__init__(
            ERAS[version],
            proxy_url,
            cafile,
            directory,
            patience_s=patience_s,
            resolve=resolve,
            abort_after=abort_after,
            on_progress=on_progress,
        )
        self._prepare(
            ERAS[version],
            dns,
            streams=streams,
            resume_threshold=resume_threshold,
            speed_threshold=speed_threshold,
            stall_s=stall_s,
            slow_s=slow_s,
            backoff_unit_s=backoff_unit_s,
        )

    def _fetch(self, name: ModelName, layers: list[Layer]) -> list[str]:
        downloaded = self._transfer(name, layers)
        self._tally.transferred = time.monotonic()
        return downloaded
