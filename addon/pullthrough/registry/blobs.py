"""Answer requests for a repository's blobs: whether there is one, how big it is, and where its bytes are.

Invariant: a caller learns of a blob, or is sent to its bytes, only if `Grants` allows it or upstream has said yes to
this very caller. A blob route answers with a status and no text, which a client would write into the model, with one
exception (`_hopeless`). Gives bytes itself only to clients that no redirect could lead to another host name.
"""

import asyncio
import logging
import time
from dataclasses import replace

from pullthrough.config.settings import Settings
from pullthrough.core import capability
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.digest import Digest
from pullthrough.core.errors import (
    NotTheRegistry,
    UnexpectedResponse,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pullthrough.core.routes import BlobRoute, ChunksumsRoute, canonical_path
from pullthrough.fleet.tier import Tier
from pullthrough.recording.pulls import Pulls
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.blob_content import OCTETS, BlobContent, wanted_from_start
from pullthrough.registry.freshness import DOWN_S, REVALIDATE_TIMEOUT_S
from pullthrough.registry.grants import Grant, Grants, attempts
from pullthrough.registry.manifests import Manifests
from pullthrough.registry.messages import Answer, Request
from pullthrough.registry.offload import Offload
from pullthrough.registry.redirects import Redirects
from pullthrough.runtime.clock import lasting
from pullthrough.store.store import Store
from pullthrough.upstream import chunksums
from pullthrough.upstream.client import DEADLINE_S, DENIED, Upstream
from pullthrough.upstream.impostors import HEAD_UNKNOWN, REDIRECTS
from pullthrough.upstream.response_checks import relayable

_log = logging.getLogger(__name__)


class Blobs:
    """The blobs of all repositories."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        upstream: Upstream,
        recorder: Recorder,
        grants: Grants,
        manifests: Manifests,
        content: BlobContent,
        redirects: Redirects,
        offload: Offload,
        pulls: Pulls,
        tier: Tier | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._recorder = recorder
        self._grants = grants
        self._manifests = manifests
        self._content = content
        self._redirects = redirects
        self._offload = offload
        self._pulls = pulls
        self._tier = tier

    async def answer(self, request: Request, route: BlobRoute) -> Answer:
        """Answer a GET or HEAD of a blob."""
        # client2 pulls `name@digest` by asking for the manifest as a blob.
        if manifest := self._manifests.stored(request, route.repository, route.digest):
            return manifest
        if request.method == "HEAD":
            return await self._head_blob(request, route)
        self._pulls.ask(request.client, (request.host, route.repository), route.digest)
        return await self._get_blob(request, route)

    async def _head_blob(self, request: Request, route: BlobRoute) -> Answer:
        # A push sends the same HEAD and skips the upload if the answer is 200: then only upstream's answer counts.
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
        except (UpstreamError, TimeoutError) as error:
            refused = isinstance(error, UpstreamRefused) and error.status_hint in DENIED
            if size is None or refused:
                raise
            if isinstance(error, UpstreamUnreachable | UpstreamTimeout | TimeoutError):
                self._upstream.mark_down(request.host, DOWN_S)
            return _head(route.digest, size, CacheStatus(Outcome.HIT, detail="upstream-failed"))
        return _head(route.digest, size, CacheStatus(Outcome.REQUEST if pushes else Outcome.MISS, forward_status=200))

    async def _ask_size(self, request: Request, route: BlobRoute) -> int:
        """Return the size from upstream's answer to HEAD, asking anonymously first. Raises UpstreamRefused if it
        refuses.
        """
        target = f"/v2/{route.repository}/blobs/{route.digest}"
        for authorization, headers in attempts(request):
            try:
                response = await self._upstream.ask("HEAD", request.host, target, headers, timeout_s=DEADLINE_S)
            except NotTheRegistry:
                return await self._open(request, route)
            if response.status == 200 and (length := response.headers.get("Content-Length", "")).isdecimal():
                # That a blob exists is no grant of its bytes: only a GET confirms the pair.
                return self._grants.told(request.host, route, int(length))
            if response.status == 200 or response.status in REDIRECTS | HEAD_UNKNOWN:
                # Some registries redirect HEAD too, do not support it, or omit the size: then the source itself tells.
                return await self._open(request, route)
            if response.status not in DENIED:
                break
            self._grants.refuse(request.host, route, authorization, response.status)
        if response.status < 400:
            raise UnexpectedResponse(f"expected 200 to HEAD, or a refusal, got {response.status}")
        raise UpstreamRefused(response.status, relayable(response.headers))

    async def _get_blob(self, request: Request, route: BlobRoute) -> Answer:
        size = await self._known_size(request, route)
        if size is None:
            cache = CacheStatus(Outcome.MISS, stored=True)
        elif self._store.held(route.digest) is not None:
            cache = CacheStatus(Outcome.HIT)
        else:
            cache = CacheStatus(Outcome.PARTIAL, collapsed=True)
        if request.may_bypass:
            if answer := await self._redirect(request, route, cache, held=size is not None):
                return answer
            size = size if size is not None else await self._known_size(request, route)
        if size is None:
            size = await self._open(request, route)
        if not request.inline:
            # What every client generation accepts: to another host name, which looks like the registry's own.
            offload = await self._offload.offers(request, route.digest)
            location = self._canonical_url(request, route.digest, size, offload=offload)
            return Answer(307, cache, (("Location", location),))
        # The next best: Ollama since v0.3.10 takes the bytes if a Location says where to ask for the parts; it sends no
        # token there.
        answer = await self._content.read(request, route.digest)
        return replace(answer, headers=(*answer.headers, ("Location", self._canonical_target(route.digest, size))))

    async def _redirect(self, request: Request, route: BlobRoute, cache: CacheStatus, *, held: bool) -> Answer | None:
        """Return a redirect to the registry's own address; None if ours must do."""
        place = (request.host, route.repository)
        near = self._tier is not None and self._grants.holds(request, route)
        try:
            # An address that the client did not use may no longer be valid.
            fresh = self._pulls.is_waiting(request.client, place, route.digest)
            location = await self._redirects.location(request, route, held=held or near, fresh=fresh)
        except (UpstreamUnreachable, UpstreamTimeout) as error:
            if not request.is_known_to_bypass:
                raise
            return _hopeless(request, str(error))
        if location is None:
            return _hopeless(request, "the registry gave none") if request.is_known_to_bypass else None
        bypasses = request.is_known_to_bypass
        self._pulls.redirect(request.client, place, route.digest, bypasses=bypasses, now=time.monotonic())
        detail = "client-bypasses-proxy" if bypasses else "registry-address"
        outcome = Outcome.BYPASS if bypasses else cache.outcome
        return Answer(307, replace(cache, outcome=outcome, stored=False, detail=detail), (("Location", location),))

    async def _known_size(self, request: Request, route: BlobRoute | ChunksumsRoute) -> int | None:
        """Return the size of a blob that is stored or being recorded, if this caller may have it; else None."""
        if not self._grants.holds(request, route):
            return None
        if (held := self._store.held(route.digest)) is not None:
            return held.size
        record = self._store.blob(route.digest)
        if record is not None and record.held:
            # The file is here but unverified: the recording verifies it without asking upstream.
            return await self._content.recording(route.digest).ready()
        recording = self._recorder.find(route.digest)
        return await recording.ready() if recording is not None else None

    async def _open(self, request: Request, route: BlobRoute) -> int:
        """Return the blob's size once upstream has granted it to this caller; if it is not stored, record it.

        Upstream is not asked about a public blob that a nearer source may have.
        """
        record = self._store.blob(route.digest)
        if self._tier is not None and record is not None and record.public and self._grants.holds(request, route):
            return await self._content.recording(route.digest).ready()
        # x/transfer asks for where a blob is and then, at once, for all of it.
        look = wanted_from_start(request) if request.is_transfer else 0
        return await self._content.record(route.digest, await self._grants.obtain(request, route), look=look)

    def _size(self, digest: Digest) -> int | None:
        record = self._store.blob(digest)
        if record is not None and record.size is not None:
            return record.size
        recording = self._recorder.find(digest)
        return recording.size if recording is not None else None

    def _canonical_url(self, request: Request, digest: Digest, size: int, *, offload: bool = False) -> str:
        """Return the canonical address with a capability; in the request's scheme, which decides the client's proxy."""
        origin = f"{request.scheme}://{self._settings.blob_host}" if request.blobs is None else request.blobs
        return origin + self._canonical_target(digest, size, offload=offload)

    def _canonical_target(self, digest: Digest, size: int, *, offload: bool = False) -> str:
        granted = capability.Capability(digest, size, int(lasting()) + capability.LIFETIME_S, offload)
        return f"{canonical_path(digest)}?{granted.to_query(self._store.secret)}"

    # --- chunk sums

    async def chunksums(self, request: Request, route: ChunksumsRoute) -> Answer:
        """Answer with upstream's list under our address; with a single chunk if upstream cannot be asked.

        The list is requested each time: it is small, and with many chunks a client can resume in the middle.
        """
        try:
            body, size, cache = await self._ask_chunksums(request, route)
        except (UpstreamUnreachable, UpstreamTimeout, UnexpectedResponse):
            size = await self._known_size(request, route) or 0
            if not size:
                raise
            body, cache = chunksums.whole(route.digest, size), CacheStatus(Outcome.HIT, detail="upstream-failed")
        location = self._canonical_url(request, route.digest, size)
        headers = (("Content-Type", "text/plain; charset=utf-8"), ("Content-Location", location))
        return Answer(200, cache, headers, body, len(body))

    async def _ask_chunksums(self, request: Request, route: ChunksumsRoute) -> tuple[bytes, int, CacheStatus]:
        """Return upstream's list and the size it covers; if the blob is not stored, record it.

        Raises UpstreamRefused if upstream refuses.
        """
        target = f"/v2/{route.repository}/chunksums/{route.digest}"
        for authorization, headers in attempts(request):
            since = self._grants.moment(request.host, route)
            response = await self._upstream.ask("GET", request.host, target, headers, timeout_s=DEADLINE_S)
            if response.status == 200 and (location := response.headers.get("Content-Location")):
                size = chunksums.check(response.body)
                source = self._upstream.source_at(request.host, target, location)
                source = self._grants.sums(request.host, route, authorization, source, size, since=since)
                await self._content.record(
                    route.digest, Grant(source, None, self._grants.again(request, route, authorization))
                )
                return response.body, size, CacheStatus(Outcome.REQUEST, forward_status=200)
            if response.status not in DENIED:
                break
            self._grants.refuse(request.host, route, authorization, response.status)
        if response.status == 200:
            raise UnexpectedResponse("expected a Content-Location with the chunk sums, got none")
        raise UpstreamRefused(response.status, relayable(response.headers))


def _head(digest: Digest, size: int, cache: CacheStatus) -> Answer:
    headers = (("Content-Type", OCTETS), ("Accept-Ranges", "bytes"), ("ETag", f'"{digest}"'))
    return Answer(200, cache, headers, b"", size)


def _hopeless(request: Request, why: str) -> Answer:
    """Tell an Ollama that downloads past every proxy why that cannot succeed: it shows the text and writes nothing.

    This is the one exception to the rule that a blob route answers without text.
    """
    version = ".".join(map(str, request.version or ()))
    message = (
        f"Ollama {version} downloads past every proxy, so this cache cannot serve it through HTTPS_PROXY, and there is "
        f"no address of the registry's to send it to: {why}. Use the cache as gateway, pull from its port 9200 "
        "(ollama pull --insecure http://CACHE:9200/NAMESPACE/MODEL), or upgrade Ollama."
    )
    _log.warning("client %s: %s", request.client, message)
    body = message.encode() + b"\n"
    cache = CacheStatus(Outcome.BYPASS, detail="client-bypasses-proxy")
    return Answer(403, cache, (("Content-Type", "text/plain; charset=utf-8"),), body, len(body))
