"""Answer a request as the registry and its CDN would: status, headers, and bytes or a reader.

Invariant: what a client sees has the shape of the real registry (same hosts, a 307, the same bytes); a reader is
given out only where `access.decide` or a valid capability grants it; None means "not ours: pass it through". The one
place that maps errors to responses. Knows neither mitmproxy nor how bytes are sent.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from pullthrough import access, capability, freshness
from pullthrough.byterange import Unsatisfiable, if_range_matches, parse_range
from pullthrough.cachestatus import CacheStatus, Outcome
from pullthrough.collapse import Collapser
from pullthrough.digest import Digest
from pullthrough.errors import (
    CacheError,
    InvalidRequest,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pullthrough.freshness import Freshness
from pullthrough.reader import Reader
from pullthrough.recorder import Recorder
from pullthrough.recording import Recording
from pullthrough.route import (
    BlobRoute,
    ManifestRoute,
    canonical_path,
    parse_canonical_target,
    parse_registry_target,
)
from pullthrough.settings import Settings
from pullthrough.store import ManifestRecord, Name, Store
from pullthrough.upstream import DataStream, Response, Source, Upstream, relayable

_log = logging.getLogger(__name__)

DEADLINE_S: Final = 20.0
"""All work for one control-plane request, retries included: Ollama's probe gives up after 30 s."""

ACCEPT: Final = "application/vnd.docker.distribution.manifest.v2+json"
"""Always sent: without it the registry has answered 400 (ollama#769), and its answer varies on it."""

_DENIED: Final = frozenset({401, 403, 404})
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRANSFER_AGENT: Final = "ollama-transfer/"
_OCTETS: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Request:
    """What of a client's request decides the answer; header names in lower case."""

    method: str
    scheme: str
    host: str
    target: str
    headers: Mapping[str, str]

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def forwarded(self) -> dict[str, str]:
        """What upstream may know of the client: its version (some models are gated by it)."""
        agent = self.headers.get("user-agent")
        return {"User-Agent": agent} if agent else {}


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; `length` is its Content-Length, also where no body is sent."""

    status: int
    cache: CacheStatus
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Reader = b""
    length: int = 0
    digest: Digest | None = field(default=None)
    """The blob it is about, for the log."""


class Registry:
    """The core: requests in, answers out."""

    def __init__(self, settings: Settings, store: Store, upstream: Upstream, recorder: Recorder) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._recorder = recorder
        self._vouchers = access.Vouchers()
        self._manifests: Collapser[tuple[Name, str], Response] = Collapser()

    async def answer(self, request: Request) -> Answer | None:
        """The answer, or None where the request is to be passed through to upstream untouched."""
        if request.method not in ("GET", "HEAD"):
            return None
        try:
            if request.host == self._settings.blob_host:
                return await self._canonical(request)
            if request.host not in self._settings.registries:
                return None
            match parse_registry_target(request.target):
                case ManifestRoute() as route:
                    return await self._manifest(request, route)
                case BlobRoute() as route:
                    return await self._blob(request, route)
            return None
        except InvalidRequest as error:
            return _failure(error)

    # --- manifests

    async def _manifest(self, request: Request, route: ManifestRoute) -> Answer:
        name = Name(request.host, route.repository, route.reference)
        record = self._store.manifest(name)
        verdict = freshness.decide(
            freshness.Stored(record.confirmed) if record else None,
            now=time.time(),
            lifetime_s=self._settings.manifest_lifetime_s,
            # The decision compares Unix seconds; upstream's clock is monotonic.
            down_until=time.time() + self._upstream.down_until - time.monotonic(),
            offline=self._settings.offline,
        )
        match verdict, record:
            case (Freshness.SERVE, ManifestRecord()):
                return _manifest_answer(request, record, CacheStatus(Outcome.HIT))
            case (Freshness.SERVE_STALE, ManifestRecord()):
                return _manifest_answer(request, record, CacheStatus(Outcome.HIT, detail="stale"))
        timeout_s = freshness.REVALIDATE_TIMEOUT_S if record else DEADLINE_S
        outcome = Outcome.STALE if record else Outcome.MISS
        try:
            async with asyncio.timeout(DEADLINE_S):
                response, collapsed = await self._fetch_manifest(request, name, timeout_s)
        except (UpstreamError, TimeoutError) as error:
            cause = error if isinstance(error, UpstreamError) else UpstreamTimeout("no answer in time")
            if record is None:
                return _registry_failure(name, cause)
            self._upstream.mark_down(freshness.DOWN_S)
            _log.warning("%s: upstream failed (%s); serving the stored manifest", name, cause)
            return _manifest_answer(request, record, CacheStatus(Outcome.STALE, detail="upstream-failed"))
        cache = CacheStatus(outcome, forward_status=response.status, collapsed=collapsed)
        if response.status == 200:
            stored = self._store.manifest(name)
            if stored is not None and stored.body == response.body:
                return _manifest_answer(request, stored, CacheStatus(outcome, True, collapsed, 200))
        elif record is not None and (response.status in (404, 429) or response.status >= 500):
            _log.warning("%s: upstream answered %d; serving the stored manifest", name, response.status)
            return _manifest_answer(
                request, record, CacheStatus(outcome, forward_status=response.status, detail="stale")
            )
        return _relay(request, response, cache)

    async def _fetch_manifest(self, request: Request, name: Name, timeout_s: float) -> tuple[Response, bool]:
        """(upstream's answer, collapsed); stored if an anonymous request got it.

        Authorization does not make a model private (client2 sends it always), so the anonymous try comes first;
        only what it was denied is asked for in the caller's name, and never stored.
        """
        agent = request.headers.get("user-agent", "")
        response, collapsed = await self._manifests.join(
            (name, agent), lambda: self._fetch_public_manifest(request, name, timeout_s)
        )
        if response.status in _DENIED and request.authorization is not None:
            headers = {**request.forwarded, "Accept": ACCEPT, "Authorization": request.authorization}
            target = f"/v2/{name.repository}/manifests/{name.reference}"
            return await self._upstream.ask("GET", name.host, target, headers, timeout_s=timeout_s), False
        return response, collapsed

    async def _fetch_public_manifest(self, request: Request, name: Name, timeout_s: float) -> Response:
        target = f"/v2/{name.repository}/manifests/{name.reference}"
        headers = {**request.forwarded, "Accept": ACCEPT}
        response = await self._upstream.ask("GET", name.host, target, headers, timeout_s=timeout_s)
        if response.status == 200:
            content_type = response.headers.get("Content-Type", ACCEPT)
            record = read_manifest(response.body, content_type, now=time.time())
            if record is None:
                _log.warning("%s: upstream's answer is no manifest; relayed, not stored", name)
            else:
                self._store.put_manifest(name, record)
        return response

    # --- blobs, asked for by repository

    async def _blob(self, request: Request, route: BlobRoute) -> Answer:
        try:
            async with asyncio.timeout(DEADLINE_S):
                if request.method == "HEAD":
                    return await self._head_blob(request, route)
                return await self._get_blob(request, route)
        except CacheError as error:
            return _failure(error, route.digest)
        except TimeoutError:
            return _failure(UpstreamTimeout("no answer in time"), route.digest)

    async def _head_blob(self, request: Request, route: BlobRoute) -> Answer:
        # A push asks the same HEAD and skips the upload when the answer is 200: then only upstream's word counts.
        pushes = request.authorization is not None or request.headers.get("user-agent", "").startswith(_TRANSFER_AGENT)
        known = self._is_known(request, route)
        size = self._size(route.digest) if known else None
        if size is not None and not (pushes and not self._settings.offline):
            return _head(route.digest, size, CacheStatus(Outcome.HIT))
        try:
            size = await self._ask_size(request, route)
        except (UpstreamUnreachable, UpstreamTimeout):
            if size is None:
                raise
            return _head(route.digest, size, CacheStatus(Outcome.HIT, detail="upstream-failed"))
        return _head(route.digest, size, CacheStatus(Outcome.REQUEST if pushes else Outcome.MISS, forward_status=200))

    async def _ask_size(self, request: Request, route: BlobRoute) -> int:
        """The size as upstream's HEAD tells it, asked anonymously first. UpstreamRefused where upstream says no."""
        target = f"/v2/{route.repository}/blobs/{route.digest}"
        for authorization in _credentials(request):
            headers = request.forwarded | ({"Authorization": authorization} if authorization else {})
            response = await self._upstream.ask("HEAD", request.host, target, headers, timeout_s=DEADLINE_S)
            if response.status == 200 and (length := response.headers.get("Content-Length", "")).isdecimal():
                self._confirm(request.host, route, authorization, int(length))
                return int(length)
            if response.status == 200 or response.status in _REDIRECTS:
                # Registries that redirect HEAD too, or do not tell the size: the source itself tells.
                return await (await self._open(request, route)).ready()
            if response.status not in _DENIED:
                break
        raise UpstreamRefused(response.status, [])

    async def _get_blob(self, request: Request, route: BlobRoute) -> Answer:
        if self._is_known(request, route):
            held = self._store.held(route.digest)
            if held is not None:
                return self._redirect(request, route.digest, held.size, CacheStatus(Outcome.HIT))
            recording = self._recorder.find(route.digest)
            if recording is not None:
                size = await recording.ready()
                return self._redirect(request, route.digest, size, CacheStatus(Outcome.PARTIAL, collapsed=True))
        recording = await self._open(request, route)
        size = await recording.ready()
        return self._redirect(request, route.digest, size, CacheStatus(Outcome.MISS, stored=True))

    async def _open(self, request: Request, route: BlobRoute) -> Recording:
        """The recording of the blob, once upstream has granted it to this caller."""
        source, stream = await self._obtain(request, route)
        return self._recorder.open(
            route.digest, obtain=lambda: self.source(route.digest), source=source, stream=stream
        )

    async def _obtain(self, request: Request, route: BlobRoute) -> tuple[Source, DataStream | None]:
        refusal: UpstreamRefused | None = None
        for authorization in _credentials(request):
            headers = request.forwarded | ({"Authorization": authorization} if authorization else {})
            try:
                granted = await self._upstream.obtain(
                    request.host, route.repository, route.digest, headers, timeout_s=DEADLINE_S
                )
            except UpstreamRefused as error:
                if error.status_hint not in _DENIED:
                    raise
                refusal = error
                continue
            self._confirm(request.host, route, authorization, None)
            return granted
        assert refusal is not None
        raise refusal

    async def source(self, digest: Digest) -> Source:
        """A source for a public blob, from any repository that has it. UpstreamError if none gives one."""
        problem: UpstreamError = UpstreamUnreachable(f"no repository is known that holds {digest.short} in public")
        for host, repository in self._store.repositories(digest):
            try:
                source, stream = await self._upstream.obtain(host, repository, digest, {}, timeout_s=DEADLINE_S)
            except UpstreamError as error:
                problem = error
                continue
            if stream is not None:
                stream.close()
            return source
        raise problem

    def _is_known(self, request: Request, route: BlobRoute) -> bool:
        record = self._store.blob(route.digest)
        evidence = access.Evidence(
            public=record is not None and record.public,
            listed=self._store.is_member(request.host, route.repository, route.digest),
            vouched=self._vouchers.holds(
                access.credential_key(request.authorization),
                request.host,
                route.repository,
                route.digest,
                now=time.monotonic(),
            ),
        )
        return access.decide(evidence) is access.Decision.GRANT

    def _confirm(self, host: str, route: BlobRoute, authorization: str | None, size: int | None) -> None:
        """Upstream has granted the pair to the holder of `authorization`."""
        self._vouchers.add(
            access.credential_key(authorization), host, route.repository, route.digest, now=time.monotonic()
        )
        if authorization is None:
            self._store.confirm_public(host, route.repository, route.digest, size)

    def _size(self, digest: Digest) -> int | None:
        record = self._store.blob(digest)
        return record.size if record is not None else None

    def _redirect(self, request: Request, digest: Digest, size: int, cache: CacheStatus) -> Answer:
        """The 307 that every client generation accepts: to another host name, which looks like the registry's own."""
        granted = capability.Capability(digest, size, int(time.time()) + capability.LIFETIME_S)
        location = (
            f"{request.scheme}://{self._settings.blob_host}{canonical_path(digest)}"
            f"?{granted.to_query(self._store.secret)}"
        )
        return Answer(307, cache, (("Location", location),), digest=digest)

    # --- blobs, at their canonical address

    async def _canonical(self, request: Request) -> Answer | None:
        route = parse_canonical_target(request.target)
        if route is None:
            return None
        granted = capability.verify(route.query, route.digest, secret=self._store.secret, now=time.time())
        if granted is None:
            return None
        digest = route.digest
        try:
            file = self._store.open_blob(digest)
            if file is not None:
                try:
                    return self._bytes(
                        request, digest, file.size, lambda a, b: Reader(a, b, file=file.acquire()), hit=True
                    )
                finally:
                    file.release()
            async with asyncio.timeout(DEADLINE_S):
                recording = self._recorder.find(digest) or self._recorder.open(
                    digest, obtain=lambda: self.source(digest)
                )
                size = await recording.ready()
            return self._bytes(request, digest, size, lambda a, b: Reader(a, b, recording=recording), hit=False)
        except CacheError as error:
            return _failure(error, digest)
        except TimeoutError:
            return _failure(UpstreamTimeout("no answer in time"), digest)

    def _bytes(
        self, request: Request, digest: Digest, size: int, open_reader: Callable[[int, int], Reader], *, hit: bool
    ) -> Answer:
        entity_tag = f'"{digest}"'
        cache = CacheStatus(Outcome.HIT) if hit else CacheStatus(Outcome.PARTIAL, stored=True, collapsed=True)
        headers: list[tuple[str, str]] = [("Accept-Ranges", "bytes"), ("ETag", entity_tag)]
        selected = None
        if request.method == "GET" and if_range_matches(request.headers.get("if-range"), entity_tag):
            selected = parse_range(request.headers.get("range"), size)
        match selected:
            case Unsatisfiable():
                headers.append(("Content-Range", selected.content_range))
                return Answer(416, cache, tuple(headers), digest=digest)
            case None:
                status, start, stop = 200, 0, size
            case _:
                status, start, stop = 206, selected.start, selected.stop
                headers.append(("Content-Range", selected.content_range))
        headers.append(("Content-Type", _OCTETS))
        body = open_reader(start, stop) if request.method == "GET" and start < stop else b""
        return Answer(status, cache, tuple(headers), body, stop - start, digest)


def read_manifest(body: bytes, content_type: str, *, now: float) -> ManifestRecord | None:
    """The record of a manifest's bytes; None if they are none (a captive portal also answers 200)."""
    try:
        manifest = json.loads(body)
        descriptors = [*manifest["layers"], *([manifest["config"]] if manifest.get("config") else [])]
        sizes = {Digest.parse(item["digest"]): int(item["size"]) for item in descriptors}
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest):
        return None
    return ManifestRecord(body, content_type, now, frozenset(sizes), sizes)


def _credentials(request: Request) -> Iterator[str | None]:
    yield None
    if request.authorization is not None:
        yield request.authorization


def _manifest_answer(request: Request, record: ManifestRecord, cache: CacheStatus) -> Answer:
    headers = [("Content-Type", record.content_type)]
    if request.method == "HEAD":
        # As the registry does: bare hexadecimal, on HEAD only (seen 2026-09).
        headers.append(("ollama-content-digest", record.digest))
    body = record.body if request.method == "GET" else b""
    return Answer(200, cache, tuple(headers), body, len(record.body))


def _relay(request: Request, response: Response, cache: CacheStatus) -> Answer:
    body = response.body if request.method == "GET" else b""
    return Answer(response.status, cache, tuple(relayable(response.headers)), body, len(response.body))


def _head(digest: Digest, size: int, cache: CacheStatus) -> Answer:
    headers = (("Content-Type", _OCTETS), ("Accept-Ranges", "bytes"), ("ETag", f'"{digest}"'))
    return Answer(200, cache, headers, b"", size, digest)


def _failure(error: CacheError, digest: Digest | None = None) -> Answer:
    """A status and no body: an Ollama client writes whatever body comes into the model file."""
    headers = error.headers if isinstance(error, UpstreamRefused) else ()
    kept = tuple((name, value) for name, value in headers if name.lower() != "content-type")
    forwarded = error.status_hint if isinstance(error, UpstreamRefused) else None
    _log.info("%s: %s", digest.short if digest else "request", error)
    return Answer(error.status_hint, CacheStatus(Outcome.MISS, forward_status=forwarded), kept, digest=digest)


def _registry_failure(name: Name, error: UpstreamError) -> Answer:
    """A manifest that cannot be had, in the registry's own error shape (OCI distribution-spec, "Error codes")."""
    message = f"{name} is not recorded and upstream cannot be asked: {error}"
    body = json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": message}]}).encode()
    _log.warning("%s", message)
    headers = (("Content-Type", "application/json"),)
    return Answer(504, CacheStatus(Outcome.MISS, detail="upstream-failed"), headers, body, len(body))
