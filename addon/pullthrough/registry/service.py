"""Answer a request as the registry and its CDN would: status, headers, and bytes or a reader. Begin reading here.

Invariant: what a client sees has the shape of the real registry (same hosts, a 307, the same bytes); a reader is
returned only where `Grants`, a valid capability or a signed address that was handed out here allows it; None means "not
ours: pass it through".
"""

import asyncio
import logging
import time
from collections.abc import Collection

from pullthrough.config.settings import Settings
from pullthrough.core import capability
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.core.digest import Digest
from pullthrough.core.errors import (
    CacheError,
    LoopDetected,
    UpstreamTimeout,
)
from pullthrough.core.manifest_json import children_of, preferred
from pullthrough.core.records import ManifestRecord, Name, canonical
from pullthrough.core.routes import (
    BlobRoute,
    CanonicalRoute,
    ChunksumsRoute,
    ManifestRoute,
    Route,
    parse_canonical_target,
    parse_registry_target,
)
from pullthrough.net.client_table import ClientTable
from pullthrough.net.pull_history import Pull, PullHistory
from pullthrough.recording.pulls import Place
from pullthrough.registry.blob_content import BlobContent
from pullthrough.registry.blobs import Blobs
from pullthrough.registry.manifests import Manifests
from pullthrough.registry.messages import Answer, Request, explained, failure
from pullthrough.registry.pings import Pings
from pullthrough.registry.redirects import Redirects
from pullthrough.registry.signed_urls import HandedOut, SignedUrls
from pullthrough.runtime.clock import lasting
from pullthrough.store.store import Store
from pullthrough.upstream.client import DEADLINE_S

_log = logging.getLogger(__name__)


class Registry:
    """The core: requests in, answers out."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        loop: LoopGuard,
        *,
        addresses: SignedUrls,
        manifests: Manifests,
        pings: Pings,
        blobs: Blobs,
        content: BlobContent,
        redirects: Redirects,
        clients: ClientTable,
        history: PullHistory,
    ) -> None:
        self._settings = settings
        self._store = store
        self._loop = loop
        self._addresses = addresses
        self._manifests = manifests
        self._pings = pings
        self._blobs = blobs
        self._content = content
        self._redirects = redirects
        self._clients = clients
        self._history = history

    async def answer(self, request: Request) -> Answer | None:
        """Return the answer, or None where the request is to be passed through to upstream untouched."""
        if request.method not in ("GET", "HEAD") or request.host not in self._settings.intercepted:
            return None
        route = self._route(request)
        if request.trail and self._loop.is_own(request.trail):
            return _looped(request, route)
        match route:
            case None:
                return await self._pings.answer(request)
            case ManifestRoute():
                answer = await self._manifests.answer(request, route)
                self._note(request, route, answer)
                if answer.status == 200 and request.method == "GET" and request.may_bypass:
                    self._prepare_addresses(request, route)
                return answer
        # x/transfer waits for a head as long as it takes, and gives up after six errors within a second.
        patience_s = None if request.is_transfer and request.method == "GET" else DEADLINE_S
        try:
            async with asyncio.timeout(patience_s):
                match route:
                    case HandedOut() if request.method == "HEAD":
                        # The method is part of what is signed: the blob host would refuse it, too.
                        return Answer(403, CacheStatus(Outcome.BYPASS))
                    case HandedOut():
                        return await self._content.read(request, route.digest, handed_out=route)
                    case CanonicalRoute():
                        return await self._content.canonical(request, route)
                    case ChunksumsRoute():
                        return await self._blobs.chunksums(request, route) if request.method == "GET" else None
                    case BlobRoute():
                        return await self._blobs.answer(request, route)
        except CacheError as error:
            return failure(error, route.digest)
        except TimeoutError:
            return failure(UpstreamTimeout("no answer in time"), route.digest)

    def _route(self, request: Request) -> Route | CanonicalRoute | HandedOut | None:
        """Return the route of the request, if it may be answered here."""
        # Clients that reach the cache by a registry's name alone ask for canonical addresses under it too.
        canonical = parse_canonical_target(request.target)
        if canonical is not None and capability.is_claimed(canonical.query):
            return canonical
        if handed_out := self._addresses.recognise(request.host, request.target, now=lasting()):
            return handed_out
        if canonical is None and request.host in self._settings.registries:
            return parse_registry_target(request.target)
        return canonical

    def _note(self, request: Request, route: ManifestRoute, answer: Answer) -> None:
        """Remember who asked for a manifest, and what that client pulls."""
        client, now = request.client, time.time()
        self._clients.ask(client, request.way, request.version, bypasses=request.is_known_to_bypass, now=now)
        if request.method == "GET" and answer.status == 200:
            name = Name(canonical(request.host), route.repository, route.reference, request.takes_lists)
            self._clients.pull(client, name, now=now)
            self._history.ask(client, name, self._wanted(name, answer), now=now)

    def _wanted(self, name: Name, answer: Answer) -> list[Collection[Digest]]:
        """Return the blobs that a client will ask for after this manifest; for a list, those of each child."""
        record = self._store.manifest(name)
        if record is None or record.body != answer.body:
            # Of the other representation, or private.
            media_type = dict(answer.headers).get("Content-Type", "")
            body = answer.body if isinstance(answer.body, bytes) else b""
            record = ManifestRecord.parse(body, media_type, now=0.0)
        return [series.digests for series in record.series(self._store.children())] if record is not None else []

    def _prepare_addresses(self, request: Request, route: ManifestRoute) -> None:
        """Obtain the addresses of a model's blobs before a client that may bypass this proxy asks for each."""
        name = Name(canonical(request.host), route.repository, route.reference, request.takes_lists)
        record = self._store.manifest(name)
        if record is None or record.denied:
            return
        chosen = preferred(children_of(record.body)) if record.is_list else None
        for series in record.series(self._store.children()):
            # Of a list, the child that the client is about to choose.
            if not series.is_of_tensors and (
                chosen is None or chosen.digest is None or chosen.digest.hex == series.key
            ):
                self._redirects.prepare(request, route.repository, series.digests)


def log_lost(client: str, place: Place, bypasses: bool) -> None:
    """Log that a client never came for a blob that it was redirected to at the registry's own address."""
    model = f"{place[0]}/{place[1]}"
    if bypasses:
        _log.warning(
            "client %s pulled %s past the cache: Ollama 0.35.0 to 0.40.2 downloads past every proxy; use the cache as "
            "gateway, pull from its port 9200, or upgrade Ollama",
            client,
            model,
        )
    else:
        _log.info("client %s was sent to the registry's address of %s and was not seen again", client, model)


def log_pull(pull: Pull) -> None:
    fields = {
        "event": "pull",
        "client": pull.client,
        "model": str(pull.name),
        "size": pull.size,
        "from_cache": pull.from_cache,
        "from_upstream": pull.from_upstream,
        "seconds": round(pull.seconds, 3),
        "whole": pull.is_whole,
    }
    _log.info("%s", pull, extra={"fields": fields})


def _looped(request: Request, route: Route | CanonicalRoute | HandedOut | None) -> Answer:
    error = LoopDetected(f"{request.host}: expected another way to the registry, got one that leads back here")
    if route is not None and not isinstance(route, ManifestRoute):
        return failure(error, route.digest)
    return explained(error.status_hint, "DENIED", str(error), CacheStatus(Outcome.BYPASS))
