"""Answer a request as the registry and its CDN would: status, headers, and bytes or a reader.

Invariant: what a client sees has the shape of the real registry (same hosts, a 307, the same bytes); a reader is
given out only where `access.decide` or a valid capability grants it; None means "not ours: pass it through".
Knows neither mitmproxy nor how bytes are sent.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from pullthrough import capability, chunksums
from pullthrough.ahead import Ahead
from pullthrough.byterange import Unsatisfiable, if_range_matches, parse_range
from pullthrough.cachestatus import CacheStatus, Outcome
from pullthrough.clock import lasting
from pullthrough.conditional import Precondition, evaluate
from pullthrough.datacheck import relayable
from pullthrough.digest import Digest
from pullthrough.direct import Director
from pullthrough.errors import (
    CacheError,
    LoopDetected,
    UnexpectedResponse,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pullthrough.exchange import Answer, Request, explained, failure
from pullthrough.fleet import capability_secret
from pullthrough.freshness import DOWN_S, REVALIDATE_TIMEOUT_S
from pullthrough.grants import Grant, Grants, attempts
from pullthrough.manifests import Manifests
from pullthrough.prefetch import Prefetcher
from pullthrough.reader import Reader
from pullthrough.recorder import Recorder
from pullthrough.recording import Recording
from pullthrough.refresh import Refresher
from pullthrough.route import (
    BlobRoute,
    CanonicalRoute,
    ChunksumsRoute,
    ManifestRoute,
    Route,
    canonical_path,
    parse_canonical_target,
    parse_registry_target,
)
from pullthrough.settings import Settings
from pullthrough.store import Store
from pullthrough.tier import Tier
from pullthrough.upstream import DEADLINE_S, DENIED, REDIRECTS, Upstream
from pullthrough.warm import Warmer

_log = logging.getLogger(__name__)

_OCTETS: Final = "application/octet-stream"


class Registry:
    """The core: requests in, answers out."""

    def __init__(
        self, settings: Settings, store: Store, upstream: Upstream, recorder: Recorder, tier: Tier | None = None
    ) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._recorder = recorder
        self.director = Director(settings, store, tier)
        self._grants = Grants(settings, store, upstream)
        self._tier = tier
        self._manifests = Manifests(settings, store, upstream, tier)
        self._prefetcher = Prefetcher(store, recorder, self._grants.source)
        ahead = Ahead(store, recorder, self._grants.public_source)
        self._refresher = Refresher(settings, store, upstream, ahead, self._manifests)
        self.warmer = Warmer(settings, store, ahead, self._manifests)

    def open(self) -> None:
        """Begin what is done by itself."""
        self._refresher.open()

    async def close(self) -> None:
        """Start nothing more."""
        await self._refresher.close()
        await self._prefetcher.close()

    async def answer(self, request: Request) -> Answer | None:
        """The answer, or None where the request is to be passed through to upstream untouched."""
        if request.method not in ("GET", "HEAD") or request.host not in self._settings.intercepted:
            return None
        # Clients that reach the cache by a registry's name alone ask for canonical addresses under it too.
        route: Route | CanonicalRoute | None = parse_canonical_target(request.target)
        if route is None and request.host in self._settings.registries:
            route = parse_registry_target(request.target)
        if request.trail and self._upstream.loop.is_own(request.trail):
            return _looped(request, route)
        match route:
            case None:
                return None
            case ManifestRoute():
                return await self._manifests.answer(request, route)
        # x/transfer waits for a head as long as it takes, and gives up after six errors within a second.
        patience_s = None if request.is_transfer and request.method == "GET" else DEADLINE_S
        try:
            async with asyncio.timeout(patience_s):
                match route:
                    case CanonicalRoute():
                        return await self._canonical(request, route)
                    case ChunksumsRoute():
                        return await self._chunksums(request, route) if request.method == "GET" else None
                    case BlobRoute():
                        return await self._blob(request, route)
        except CacheError as error:
            return failure(error, route.digest)
        except TimeoutError:
            return failure(UpstreamTimeout("no answer in time"), route.digest)

    # --- blobs, asked for by repository

    async def _blob(self, request: Request, route: BlobRoute) -> Answer:
        # client2 pulls `name@digest` by asking for the manifest as a blob.
        if manifest := self._manifests.stored(request, route.repository, route.digest):
            return manifest
        if request.method == "HEAD":
            return await self._head_blob(request, route)
        answer = await self._get_blob(request, route)
        if self._settings.prefetch and not self._settings.offline:
            self._prefetcher.follow(request.host, route.repository, route.digest)
        return answer

    async def _head_blob(self, request: Request, route: BlobRoute) -> Answer:
        # A push asks the same HEAD and skips the upload when the answer is 200: then only upstream's word counts.
        pushes = request.authorization is not None or request.is_transfer
        known = self._grants.holds(request, route)
        size = self._size(route.digest) if known else None
        if size is not None and not (pushes and not self._settings.offline):
            return _head(route.digest, size, CacheStatus(Outcome.HIT))
        if size is not None and self._upstream.down_until(request.host) > time.monotonic():
            return _head(route.digest, size, CacheStatus(Outcome.HIT, detail="upstream-down"))
        try:
            async with asyncio.timeout(DEADLINE_S if size is None else REVALIDATE_TIMEOUT_S):
                size = await self._ask_size(request, route)
        except (UpstreamUnreachable, UpstreamTimeout, TimeoutError):
            if size is None:
                raise
            self._upstream.mark_down(request.host, DOWN_S)
            return _head(route.digest, size, CacheStatus(Outcome.HIT, detail="upstream-failed"))
        return _head(route.digest, size, CacheStatus(Outcome.REQUEST if pushes else Outcome.MISS, forward_status=200))

    async def _ask_size(self, request: Request, route: BlobRoute) -> int:
        """The size as upstream's HEAD tells it, asked anonymously first. UpstreamRefused where upstream says no."""
        target = f"/v2/{route.repository}/blobs/{route.digest}"
        for authorization, headers in attempts(request):
            response = await self._upstream.ask("HEAD", request.host, target, headers, timeout_s=DEADLINE_S)
            if response.status == 200 and (length := response.headers.get("Content-Length", "")).isdecimal():
                # That a blob exists is no grant of its bytes: only a GET confirms the pair.
                return int(length)
            if response.status == 200 or response.status in REDIRECTS:
                # Registries that redirect HEAD too, or do not tell the size: the source itself tells.
                return await self._open(request, route)
            if response.status not in DENIED:
                break
            self._grants.refuse(request.host, route, authorization, response.status)
        raise UpstreamRefused(response.status, relayable(response.headers))

    async def _get_blob(self, request: Request, route: BlobRoute) -> Answer:
        if (size := await self._known_size(request, route)) is not None:
            held = self._store.held(route.digest) is not None
            cache = CacheStatus(Outcome.HIT) if held else CacheStatus(Outcome.PARTIAL, collapsed=True)
        else:
            size = await self._open(request, route)
            cache = CacheStatus(Outcome.MISS, stored=True)
        await self.director.prepare(route.digest)
        if not request.inline:
            # What every client generation accepts: to another host name, which looks like the registry's own.
            return Answer(307, cache, (("Location", self._canonical_url(request, route.digest, size)),))
        # The next best: Ollama since v0.3.10 takes the bytes if a Location says where to ask for the parts, which it
        # does without its token.
        answer = await self._read(request, route.digest)
        return replace(answer, headers=(*answer.headers, ("Location", self._canonical_target(route.digest, size))))

    async def _known_size(self, request: Request, route: BlobRoute | ChunksumsRoute) -> int | None:
        """The size of a blob that this caller may have and that is here, or is being recorded; else None."""
        if not self._grants.holds(request, route):
            return None
        if (held := self._store.held(route.digest)) is not None:
            return held.size
        recording = self._recorder.find(route.digest)
        return await recording.ready() if recording is not None else None

    async def _open(self, request: Request, route: BlobRoute) -> int:
        """The blob's size, once upstream has granted it to this caller; it is being recorded if it is not here.

        What everybody may have upstream need not be asked for where it may be nearer.
        """
        record = self._store.blob(route.digest)
        if self._tier is not None and record is not None and record.public and self._grants.holds(request, route):
            return await self._recording(route.digest).ready()
        return await self._record(route.digest, await self._grants.obtain(request, route))

    async def _record(self, digest: Digest, grant: Grant) -> int:
        """The blob's size; it is being recorded if it is not here."""
        if (held := self._store.held(digest)) is not None and held.size is not None:
            if grant.stream is not None:
                grant.stream.close()
            return held.size
        recording = self._recorder.open(digest, obtain=grant.again, source=grant.source, stream=grant.stream)
        return await recording.ready()

    def _size(self, digest: Digest) -> int | None:
        record = self._store.blob(digest)
        if record is not None and record.size is not None:
            return record.size
        recording = self._recorder.find(digest)
        return recording.size if recording is not None else None

    def _canonical_url(self, request: Request, digest: Digest, size: int) -> str:
        """The canonical address with a capability; in the request's scheme, which decides the client's proxy."""
        origin = f"{request.scheme}://{self._settings.blob_host}" if request.blobs is None else request.blobs
        return origin + self._canonical_target(digest, size)

    def _canonical_target(self, digest: Digest, size: int) -> str:
        granted = capability.Capability(digest, size, int(lasting()) + capability.LIFETIME_S)
        return f"{canonical_path(digest)}?{granted.to_query(self._store.secret)}"

    # --- chunk sums

    async def _chunksums(self, request: Request, route: ChunksumsRoute) -> Answer:
        """Upstream's list with our address for its; one chunk of all where upstream cannot be asked.

        The list is asked for each time: it is small, and with many chunks a client resumes in the middle.
        """
        try:
            body, cache = await self._ask_chunksums(request, route)
            size = chunksums.check(body)
        except (UpstreamUnreachable, UpstreamTimeout):
            size = await self._known_size(request, route) or 0
            if not size:
                raise
            body, cache = chunksums.whole(route.digest, size), CacheStatus(Outcome.HIT, detail="upstream-failed")
        location = self._canonical_url(request, route.digest, size)
        headers = (("Content-Type", "text/plain; charset=utf-8"), ("Content-Location", location))
        return Answer(200, cache, headers, body, len(body))

    async def _ask_chunksums(self, request: Request, route: ChunksumsRoute) -> tuple[bytes, CacheStatus]:
        """Upstream's list; the blob is being recorded if it is not here. UpstreamRefused where upstream says no."""
        target = f"/v2/{route.repository}/chunksums/{route.digest}"
        for authorization, headers in attempts(request):
            denials = self._grants.denials(request.host, route)
            response = await self._upstream.ask("GET", request.host, target, headers, timeout_s=DEADLINE_S)
            if response.status == 200 and (location := response.headers.get("Content-Location")):
                self._grants.confirm(request.host, route, authorization, denials=denials)
                source = self._upstream.source_at(request.host, target, location)
                await self._record(route.digest, Grant(source, None, self._grants.again(request, route, authorization)))
                return response.body, CacheStatus(Outcome.REQUEST, forward_status=200)
            if response.status not in DENIED:
                break
            self._grants.refuse(request.host, route, authorization, response.status)
        if response.status == 200:
            raise UnexpectedResponse("expected a Content-Location with the chunk sums, got none")
        raise UpstreamRefused(response.status, relayable(response.headers))

    # --- the bytes of blobs

    async def _canonical(self, request: Request, route: CanonicalRoute) -> Answer | None:
        if not self._is_granted(route):
            if capability.is_claimed(route.query):
                # The blob host would refuse it as well, with a text, and would have been shown it.
                return Answer(403, CacheStatus(Outcome.BYPASS))
            return None
        self.director.arrived(request)
        return await self._read(request, route.digest)

    def _is_granted(self, route: CanonicalRoute) -> bool:
        """Whether the query is a capability of ours, or of our fleet's, which is good for what is public."""
        now = lasting()
        if capability.verify(route.query, route.digest, secret=self._store.secret, now=now) is not None:
            return True
        record = self._store.blob(route.digest)
        if self._tier is None or record is None or not record.public:
            return False
        secret = capability_secret(self._tier.secret)
        return capability.verify(route.query, route.digest, secret=secret, now=now) is not None

    async def _read(self, request: Request, digest: Digest) -> Answer:
        """The bytes that are asked for; whether this caller may have them was decided before."""
        file = self._store.open_blob(digest)
        if file is not None:
            try:
                return self._bytes(
                    request,
                    digest,
                    file.size,
                    lambda a, b: Reader(a, b, file=file.acquire(), on_unreadable=lambda: self._disown(digest)),
                    hit=True,
                )
            finally:
                file.release()
        recording = self._recording(digest)
        size = await recording.ready()
        return self._bytes(request, digest, size, lambda a, b: Reader(a, b, recording=recording), hit=False)

    def _recording(self, digest: Digest) -> Recording:
        """The recording of the blob: the one that runs, or one from any repository that has it in public."""
        found = self._recorder.find(digest)
        return found or self._recorder.open(digest, obtain=lambda: self._grants.source(digest))

    def _disown(self, digest: Digest) -> None:
        _log.error("%s: the stored file cannot be read; it will be recorded anew", digest.short)
        self._store.disown(digest)

    def _bytes(
        self, request: Request, digest: Digest, size: int, open_reader: Callable[[int, int], Reader], *, hit: bool
    ) -> Answer:
        entity_tag = f'"{digest}"'
        cache = CacheStatus(Outcome.HIT) if hit else CacheStatus(Outcome.PARTIAL, stored=True, collapsed=True)
        headers: list[tuple[str, str]] = [("Accept-Ranges", "bytes"), ("ETag", entity_tag)]
        match evaluate(request.headers.get("if-match"), request.headers.get("if-none-match"), entity_tag):
            case Precondition.FAILED:
                return Answer(412, cache, tuple(headers))
            case Precondition.NOT_MODIFIED:
                return Answer(304, cache, tuple(headers), length=size)
        selected = None
        if request.method == "GET" and if_range_matches(request.headers.get("if-range"), entity_tag):
            selected = parse_range(request.headers.get("range"), size)
        match selected:
            case Unsatisfiable():
                headers.append(("Content-Range", selected.content_range))
                return Answer(416, cache, tuple(headers))
            case None:
                status, start, stop = 200, 0, size
            case _:
                status, start, stop = 206, selected.start, selected.stop
                headers.append(("Content-Range", selected.content_range))
        if request.method == "GET" and (location := self.director.location(request, digest, start, stop)):
            return Answer(307, replace(cache, detail="direct"), (("Location", location),))
        headers.append(("Content-Type", _OCTETS))
        body = open_reader(start, stop) if request.method == "GET" and start < stop else b""
        # x/transfer compares a blob's speed with the median of the last ones, counted from the head: a blob that comes
        # as fast as the line would be too slow after a few hits (x/transfer/download.go, v0.14.0 to today).
        return Answer(status, cache, tuple(headers), body, stop - start, held=request.is_transfer and not hit)


def _looped(request: Request, route: Route | CanonicalRoute | None) -> Answer:
    error = LoopDetected(f"{request.host}: expected another way to the registry, got one that leads back here")
    if route is not None and not isinstance(route, ManifestRoute):
        return failure(error, route.digest)
    return explained(error.status_hint, "DENIED", str(error), CacheStatus(Outcome.BYPASS))


def _head(digest: Digest, size: int, cache: CacheStatus) -> Answer:
    headers = (("Content-Type", _OCTETS), ("Accept-Ranges", "bytes"), ("ETag", f'"{digest}"'))
    return Answer(200, cache, headers, b"", size)
