"""A strict emulator of x/transfer, which pulls models with tensor layers (v0.14.0 to today).

Invariant: it asks, accepts and refuses as x/transfer/download.go (x/imagegen/transfer before v0.30.0) and, since
v0.34.2, x/transfer/redirect.go do. Departures beside those of goclient: a stall or a slow body is noticed at the
next read without the watchdog's one-second tick, and any model is pulled so, not only one with tensors.
Knows nothing of what answers.
"""

import contextlib
import functools
import hashlib
import ipaddress
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
    follow,
    keep,
    same_host,
)
from tests.support.http1 import Resolve

TENSOR_TYPE: Final = "application/vnd.ollama.image.tensor"
"""The media type that makes the real daemon choose x/transfer."""
_USER_AGENT: Final = "ollama-transfer/1.0"
_MAX_RETRIES: Final = 6
_FREE_SLOW_RETRIES: Final = 2
_SPEEDS: Final = 30
"""The median is of the last so many blobs."""
_FEW_SPEEDS: Final = 5
"""With fewer samples nothing is slow."""
_IDLE_PER_HOST: Final = 100
_DISCARD: Final = 256 * 1024
_NOT_PUBLIC: Final = [
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "100.64.0.0/10", "198.18.0.0/15")
]
"""What isPublicIP refuses beside loopback, link-local, multicast, broadcast and unspecified addresses."""


class _Stalled(Exception):
    """errStalled."""


class _Slow(Exception):
    """errSlow."""


@dataclass(frozen=True, slots=True)
class Era(Release):
    """What a server can tell of the releases of x/transfer."""

    drains: bool = True
    """The answer to the resolving GET is read to its end; since v0.20.5."""
    resumes: bool = True
    """A large blob goes on from what there is of it, and 206 is accepted; since v0.20.5."""
    streams: int = 4
    """OLLAMA_MAX_TRANSFER_STREAMS; since v0.30.0."""
    checks_target: bool = True
    """A redirect may lead only over https and to another host only if that is public; since v0.34.2."""


_CURRENT: Final = Era("0.34.3")
_HOST_ONLY: Final = replace(_CURRENT, number="0.34.2", redirects=same_host)
_ANY_TARGET: Final = replace(_CURRENT, number="0.33.0", redirects=follow, checks_target=False)
_MANY_STREAMS: Final = replace(_ANY_TARGET, number="0.20.5", go="go1.24.1", streams=64)
_WHOLE_ONLY: Final = replace(_MANY_STREAMS, number="0.14.0", checks_realm=False, drains=False, resumes=False)
ERAS: Final = MappingProxyType(
    {each.number: each for each in (_CURRENT, _HOST_ONLY, _ANY_TARGET, _MANY_STREAMS, _WHOLE_ONLY)}
    | {"current": _CURRENT}
)
"""By a release that behaves so."""


class TransferClient(ServerClient):
    """One daemon that pulls a model of tensors: per blob a GET to learn the address, and a GET of the bytes.

    The manifest and the token are asked for as A2 asks, through the proxy; blobs are dialled directly, proxy or not.
    """

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        version: str = "current",
        dns: Mapping[str, Sequence[str]] | None = None,
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
        self.generation = ERAS[version]
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
        self.dns = dns or {}
        self.streams = streams or self.generation.streams
        self.resume_threshold = resume_threshold
        # Until v0.20.5 every blob counted.
        self.speed_threshold = speed_threshold if self.generation.resumes else 0
        self.stall_s = stall_s
        self.slow_s = slow_s
        self.backoff_unit_s = backoff_unit_s
        self._direct = self._new_transport(None, _IDLE_PER_HOST)
        self._token_lock = threading.Lock()
        self._speeds: deque[float] = deque(maxlen=_SPEEDS)
        """Bytes per second of the last blobs; an append is atomic."""

    def _fetch(self, name: ModelName, layers: list[Layer]) -> list[str]:
        self._speeds.clear()
        wanted = [layer for layer in layers if not self._is_there(layer)]
        group = Group(self._context)
        group.run((functools.partial(self._blob, group, name, layer) for layer in wanted), limit=self.streams)
        self._tally.transferred = time.monotonic()
        return [layer.digest for layer in wanted]

    def _is_there(self, layer: Layer) -> bool:
        path = self.blob_path(layer.digest)
        return path.exists() and path.stat().st_size == layer.size

    # --- one blob

    def _blob(self, group: Group, name: ModelName, layer: Layer) -> None:
        """downloader.download."""
        attempt = slow = 0
        deadline = time.monotonic() + self.patience_s
        path = self.blob_path(layer.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp")
        while attempt < _MAX_RETRIES:
            if attempt:
                self._tally.retry()
                delay = min(attempt * attempt * self.backoff_unit_s, 2.0 ** (attempt - 1))
                group.wait(delay * random.uniform(0.5, 1.5))
            started = time.monotonic()
            try:
                self._attempt(group, name, layer, partial)
            except (FailedRequest, _Slow, _Stalled, *NETWORK) as error:
                group.check()
                problem = error
                if layer.size < self.resume_threshold or not self.generation.resumes:
                    partial.unlink(missing_ok=True)
                if isinstance(error, _Stalled):
                    self._tally.stall()
                    if time.monotonic() > deadline:
                        raise OutOfPatience(self.patience_s) from error
                    continue
                slow += isinstance(error, _Slow)
                if not isinstance(error, _Slow) or slow > _FREE_SLOW_RETRIES:
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
        url = self._resolve_blob(group, first)
        have = 0
        if self.generation.resumes and layer.size >= self.resume_threshold and partial.exists():
            # A file of the full size is no better than none.
            have = partial.stat().st_size if partial.stat().st_size < layer.size else 0
        fields: Fields = [("User-Agent", _USER_AGENT)]
        if urlsplit(url).netloc == urlsplit(first).netloc and self._token:
            fields.append(("Authorization", f"Bearer {self._token}"))
        if have:
            fields.append(("Range", f"bytes={have}-"))
        with self._ask(group, url, fields) as reply, contextlib.ExitStack() as stack:
            if self.generation.drains:
                stack.callback(self._drain, reply)
            if reply.status == 200:
                have = 0
            elif not (reply.status == 206 and self.generation.resumes):
                raise FailedRequest(f"status {reply.status}")
            self._save(reply, layer, partial, have)

    def _save(self, reply: Reply, layer: Layer, partial: Path, have: int) -> None:
        sha256 = hashlib.sha256()
        with partial.open("r+b" if have else "w+b") as file:
            while file.tell() < have:
                sha256.update(file.read(min(1 << 20, have - file.tell())))
            began = last = time.monotonic()
            count = 0
            for piece in self._pieces(reply):
                file.write(piece)
                sha256.update(piece)
                count += len(piece)
                now = time.monotonic()
                # What the watchdog finds does not end a read; it is acted on before the next one, and after the
                # last byte there is none.
                if reply.response.ended is None and now - last > self.stall_s:
                    raise _Stalled("download stalled")
                if reply.response.ended is None and now - began > self.slow_s and self._is_slow(count / (now - began)):
                    raise _Slow("download too slow")
                last = now
        if f"sha256:{sha256.hexdigest()}" != layer.digest:
            partial.unlink()
            raise FailedRequest("digest mismatch")
        if have + count != layer.size:
            partial.unlink()
            raise FailedRequest("size mismatch")

    def _is_slow(self, rate: float) -> bool:
        speeds = list(self._speeds)
        return len(speeds) >= _FEW_SPEEDS and rate < 0.1 * statistics.median_high(speeds)

    def _drain(self, reply: Reply) -> None:
        """io.Copy to io.Discard, whose error nobody looks at."""
        buffer = memoryview(bytearray(_DISCARD))
        with contextlib.suppress(*NETWORK):
            while count := reply.readinto(buffer):
                reply.connection.set_deadline(time.monotonic() + self.patience_s)
                self._progress(count)

    # --- where the bytes are

    def _resolve_blob(self, group: Group, first: str) -> str:
        """downloader.resolve."""
        url = first
        for _hop in range(10):
            token = self._token
            fields: Fields = [("User-Agent", _USER_AGENT)]
            if token:
                fields.append(("Authorization", f"Bearer {token}"))
            with self._ask(group, url, fields) as reply:
                if self.generation.drains:
                    self._drain(reply)
            if reply.status == 200:
                return url
            if reply.status == 401:
                self._refresh(token, reply.header("WWW-Authenticate"), urlsplit(first).netloc)
            elif reply.status in (301, 302, 307):
                location = reply.header("Location")
                target = urljoin(url, location)
                if self.generation.checks_target:
                    self._check_scheme(location, target, first)
                elif not location:
                    raise Crashed("runtime error: invalid memory address or nil pointer dereference")
                if urlsplit(target).netloc != urlsplit(url).netloc:
                    # No http name is pulled without --insecure, which lifts this check.
                    if self.generation.checks_target and first.startswith("https:"):
                        self._check_addresses(urlsplit(target).hostname or "")
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

    def _check_scheme(self, location: str, target: str, first: str) -> None:
        """validateRedirectScheme."""
        scheme = urlsplit(target).scheme
        if not location:
            raise FailedRequest("redirect target not allowed: missing Location")
        if scheme not in ("https", "http"):
            raise FailedRequest(f'redirect target not allowed: scheme "{scheme}"')
        if scheme == "http" and first.startswith("https:"):
            raise FailedRequest("redirect target not allowed: https registry redirecting to http")

    def _check_addresses(self, hostname: str) -> None:
        """validateRedirectTarget. The dialler checks again, and then uses an address that it has checked."""
        with contextlib.suppress(ValueError):
            if not is_public(ipaddress.ip_address(hostname)):
                raise FailedRequest(f"redirect target not allowed: {hostname} is not a public address")
            return
        if not self.dns.get(hostname):
            raise FailedRequest(f"redirect target not allowed: resolving {hostname}: no such host")
        for address in self.dns[hostname]:
            if not is_public(ipaddress.ip_address(address)):
                raise FailedRequest(f"redirect target not allowed: {hostname} resolves to non-public {address}")

    def _ask(self, group: Group, url: str, fields: Fields) -> Reply:
        return self._request("GET", url, fields, redirects=keep, scope=group, transport=self._direct)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """isPublicIP of x/transfer/redirect.go, which lets more pass than Python's is_global."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    is_special = address.is_unspecified or address.is_loopback or address.is_link_local or address.is_multicast
    is_broadcast = address == ipaddress.IPv4Address("255.255.255.255")
    return not (is_special or is_broadcast or any(address in network for network in _NOT_PUBLIC))
