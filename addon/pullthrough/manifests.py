"""Answer manifest requests: from the store while fresh, else from upstream, stale when upstream cannot answer.

Invariant: bytes are upstream's, untouched (a model's ID is their hash); only what an anonymous request got is
stored, and refusals (401, 403, 404, 412) never are. Knows no blobs.
"""

import asyncio
import json
import logging
import time
from dataclasses import replace
from typing import Final

from pullthrough import freshness
from pullthrough.cachestatus import CacheStatus, Outcome
from pullthrough.collapse import Collapser
from pullthrough.datacheck import relayable
from pullthrough.digest import Digest
from pullthrough.errors import UnexpectedResponse, UpstreamError, UpstreamTimeout
from pullthrough.exchange import Answer, Request
from pullthrough.freshness import Freshness
from pullthrough.records import ManifestRecord, Name, Version
from pullthrough.route import ManifestRoute
from pullthrough.settings import Settings
from pullthrough.store import Store
from pullthrough.upstream import DEADLINE_S, DENIED, PRIVATE, REDIRECTS, Response, Upstream

_log = logging.getLogger(__name__)

ACCEPT: Final = "application/vnd.docker.distribution.manifest.v2+json"
"""Always sent: without it the registry has answered 400 (ollama#769), and its answer varies on it."""


class Manifests:
    """The manifests of all registries."""

    def __init__(self, settings: Settings, store: Store, upstream: Upstream) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._fetches: Collapser[tuple[Name, str], Response] = Collapser()

    def stored(self, request: Request, repository: str, digest: Digest) -> Answer | None:
        """The stored manifest with these bytes, None if there is none: what a digest names does not change."""
        record = self._store.manifest_by_digest(request.host, repository, digest)
        return _manifest_answer(request, record, CacheStatus(Outcome.HIT)) if record else None

    async def answer(self, request: Request, route: ManifestRoute) -> Answer:
        """As the policy above says; `route.reference` may be a tag or a digest."""
        if route.digest is not None and (answer := self.stored(request, route.repository, route.digest)):
            return answer
        name = Name(request.host, route.repository, route.reference)
        record = self._public(name)
        verdict = freshness.decide(
            freshness.Stored(record.confirmed, record.oldest) if record else None,
            now=time.time(),
            lifetime_s=self._settings.manifest_lifetime_s,
            # The decision compares Unix seconds; upstream's clock is monotonic.
            down_until=time.time() + self._upstream.down_until - time.monotonic(),
            offline=self._settings.offline,
            version=request.version,
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
                response, collapsed = await self._fetch_manifest(request, name, route.digest, timeout_s)
        except (UpstreamError, TimeoutError) as error:
            cause = error if isinstance(error, UpstreamError) else UpstreamTimeout("no answer in time")
            # The anonymous request may have been refused before the one with credentials failed.
            record = self._public(name)
            if record is None:
                return _unavailable(name, cause)
            self._upstream.mark_down(freshness.DOWN_S)
            _log.warning("%s: upstream failed (%s); serving the stored manifest", name, cause)
            return _manifest_answer(request, record, CacheStatus(Outcome.STALE, detail="upstream-failed"))
        cache = CacheStatus(outcome, forward_status=response.status, collapsed=collapsed)
        record = self._public(name)
        if response.status == 200 and record is not None and record.body == response.body:
            return _manifest_answer(request, record, CacheStatus(outcome, True, collapsed, 200))
        portal = response.status == 200 and ManifestRecord.parse(response.body, "", now=0) is None
        if record is not None and (portal or response.status in (404, 429) or response.status >= 500):
            what = "with something else" if portal else str(response.status)
            _log.warning("%s: upstream answered %s; serving the stored manifest", name, what)
            return _manifest_answer(
                request, record, CacheStatus(outcome, forward_status=response.status, detail="stale")
            )
        return _relay(request, response, cache)

    async def _fetch_manifest(
        self, request: Request, name: Name, digest: Digest | None, timeout_s: float
    ) -> tuple[Response, bool]:
        """(upstream's answer, collapsed); stored if an anonymous request got it.

        Authorization does not make a model private (client2 sends it always), so the anonymous try comes first;
        only what it was denied is asked for in the caller's name, and never stored.
        """
        agent = request.headers.get("user-agent", "")
        response, collapsed = await self._fetches.join(
            (name, agent), lambda: self._fetch_public_manifest(request, name, digest, timeout_s)
        )
        if response.status in DENIED and request.authorization is not None:
            headers = {**request.forwarded, "Accept": ACCEPT, "Authorization": request.authorization}
            target = f"/v2/{name.repository}/manifests/{name.reference}"
            granted = await self._upstream.ask("GET", name.host, target, headers, timeout_s=timeout_s)
            if granted.status == 200:
                # A 404 to everybody else was no withdrawal.
                self._deny(name)
            return granted, False
        return response, collapsed

    async def _fetch_public_manifest(
        self, request: Request, name: Name, digest: Digest | None, timeout_s: float
    ) -> Response:
        target = f"/v2/{name.repository}/manifests/{name.reference}"
        headers = {**request.forwarded, "Accept": ACCEPT}
        response = await self._upstream.ask("GET", name.host, target, headers, timeout_s=timeout_s)
        if response.status == 200:
            content_type = response.headers.get("Content-Type", ACCEPT)
            record = ManifestRecord.parse(response.body, content_type, now=time.time())
            if record is None:
                _log.warning("%s: upstream's answer is no manifest; relayed, not stored", name)
            elif digest is not None and record.digest != digest.hex:
                raise UnexpectedResponse(f"{name}: expected a manifest with this digest, got sha256:{record.digest}")
            else:
                self._store.put_manifest(name, replace(record, oldest=self._oldest(name, record, request.version)))
        elif response.status in PRIVATE:
            self._deny(name)
        return response

    def _public(self, name: Name) -> ManifestRecord | None:
        """The stored manifest, unless upstream has refused it to an anonymous request."""
        record = self._store.manifest(name)
        return None if record is None or record.denied else record

    def _deny(self, name: Name) -> None:
        if self._store.deny(name.host, name.repository):
            _log.warning("%s: refused to an anonymous request; its repository is private from now on", name)

    def _oldest(self, name: Name, record: ManifestRecord, version: Version | None) -> Version | None:
        """The oldest version that has been granted these bytes, with the one that has them now."""
        stored = self._store.manifest(name)
        known = [stored.oldest] if stored is not None and stored.body == record.body else []
        return min((item for item in [*known, version] if item is not None), default=None)


def _manifest_answer(request: Request, record: ManifestRecord, cache: CacheStatus) -> Answer:
    headers = [("Content-Type", record.content_type)]
    if request.method == "HEAD":
        # As the registry does: bare hexadecimal, on HEAD only (seen 2026-09).
        headers.append(("ollama-content-digest", record.digest))
    body = record.body if request.method == "GET" else b""
    return Answer(200, cache, tuple(headers), body, len(record.body))


def _relay(request: Request, response: Response, cache: CacheStatus) -> Answer:
    body = response.body if request.method == "GET" else b""
    headers = relayable(response.headers)
    if response.status in REDIRECTS and (location := response.headers.get("Location")):
        headers.append(("Location", location))
    return Answer(response.status, cache, tuple(headers), body, len(response.body))


def _unavailable(name: Name, error: UpstreamError) -> Answer:
    """A manifest that cannot be had, in the registry's own error shape (OCI distribution-spec, "Error codes")."""
    message = f"{name} is not recorded and upstream cannot be asked: {error}"
    body = json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": message}]}).encode()
    _log.warning("%s", message)
    headers = (("Content-Type", "application/json"),)
    return Answer(504, CacheStatus(Outcome.MISS, detail="upstream-failed"), headers, body, len(body))
