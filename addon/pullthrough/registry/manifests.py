"""Answer manifest requests: from the store while fresh, else from upstream, stale when upstream cannot answer.

Invariant: bytes are upstream's, untouched (a model's ID is their hash); only what an anonymous request got is stored,
and refusals (401, 403, 404, 412) never are. Clients that accept manifest lists (Ollama since 0.40) and clients that do
not each get upstream's answer to their kind; a list never goes to a client that does not accept it.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from multidict import CIMultiDict

from pullthrough.config.settings import Settings
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.cdn_loop import CDN_LOOP
from pullthrough.core.digest import Digest
from pullthrough.core.errors import NotTheRegistry, UnexpectedResponse, UpstreamError, UpstreamTimeout
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE, accept_of
from pullthrough.core.records import ManifestRecord, Name, canonical, version_of
from pullthrough.core.routes import ManifestRoute
from pullthrough.fleet.tier import Tier
from pullthrough.registry import freshness
from pullthrough.registry.freshness import Freshness, Heard, Verdict
from pullthrough.registry.messages import Answer, Request, explained
from pullthrough.runtime.clock import Moment
from pullthrough.runtime.singleflight import SingleFlight
from pullthrough.store.store import Store
from pullthrough.upstream.client import DEADLINE_S, Upstream
from pullthrough.upstream.impostors import REDIRECTS, Response
from pullthrough.upstream.refusals import described
from pullthrough.upstream.response_checks import relayable

_log = logging.getLogger(__name__)

HEAD_TIMEOUT_S: Final = 1.5
"""How long a HEAD waits for upstream while a stored copy could be served: Ollama's check for a list ends after 2 s, and
it takes a failure for a no."""

ABSURD: Final = (2, 0, 0)
"""No Ollama is this new (0.40 in 2026-11): the cache does not ask with the User-Agent of a client that claims to be."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What upstream said to one request for a manifest."""

    heard: Heard
    response: Response
    record: ManifestRecord | None = None
    """Of Heard.MANIFEST."""
    cause: UpstreamError | None = None
    """Of Heard.NOTHING."""


class Manifests:
    """The manifests of all registries."""

    def __init__(self, settings: Settings, store: Store, upstream: Upstream, tier: Tier | None = None) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._tier = tier
        self._adoptions: SingleFlight[Name, None] = SingleFlight()
        self._fetches: SingleFlight[tuple[Name, str, str, str], Reply] = SingleFlight()
        self._newest = ""

    @property
    def newest_agent(self) -> str:
        """The User-Agent of the newest Ollama that has asked: the cache's own requests use it."""
        known = (record.oldest for record in self._store.manifests().values())
        version = max((item for item in known if item is not None and item < ABSURD), default=None)
        stored = f"ollama/{'.'.join(map(str, version))}" if version else ""
        return max(self._newest, stored, key=_rank)

    def stored(self, request: Request, repository: str, digest: Digest) -> Answer | None:
        """Return the stored manifest with this digest, None if there is none: what a digest names does not change."""
        record = self._store.manifest_by_digest(request.host, repository, digest)
        if record is None or (record.is_list and not request.takes_lists):
            return None
        for name, other in self._store.manifests_of(request.host, repository).items():
            if other.digest == record.digest:
                self._store.touch(name, time.time())
        return _manifest_answer(request, record, CacheStatus(Outcome.HIT))

    async def answer(self, request: Request, route: ManifestRoute) -> Answer:
        """Answer as the policy above says; `route.reference` may be a tag or a digest."""
        if route.digest is not None and (answer := self.stored(request, route.repository, route.digest)):
            return answer
        self._newest = max(self._newest, request.agent, key=_rank)
        name = Name(canonical(request.host), route.repository, route.reference, request.takes_lists)
        answer = await self._answer(request, name)
        if request.method == "HEAD":
            return replace(answer, body=b"")
        if answer.status == 200:
            self._store.touch(name, time.time())
        return answer

    async def _answer(self, request: Request, name: Name) -> Answer:
        if self._tier is not None and self._copy(name) is None:
            await self._adoptions.join(name.model, lambda: self._adopt(name.model))
        now = time.time()
        record = self._copy(name)
        plan = freshness.decide(
            freshness.Stored(record.confirmed, record.oldest) if record else None,
            now=now,
            lifetime_s=self._settings.manifest_lifetime.of(name),
            # The decision compares Unix seconds; upstream's clock is monotonic.
            down_until=now + self._upstream.down_until(request.host) - time.monotonic(),
            offline=self._settings.offline,
            version=request.version,
        )
        match plan, record:
            case (Freshness.SERVE, ManifestRecord()):
                return _manifest_answer(request, record, CacheStatus(Outcome.HIT))
            case (Freshness.SERVE_STALE, ManifestRecord()):
                return _manifest_answer(request, record, CacheStatus(Outcome.HIT, detail="stale"))
        outcome = Outcome.STALE if record else Outcome.MISS
        hurried = request.method == "HEAD" and record is not None
        cut = False
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_S if hurried else DEADLINE_S):
                reply, collapsed, adopted = await self._fetch(
                    request,
                    name,
                    # A copy from the other kind of client is checked by one GET: a HEAD would be one round trip more.
                    record if plan is Freshness.REVALIDATE and record is self._store.manifest(name) else None,
                    has_copy=record is not None,
                )
        except TimeoutError:
            reply, collapsed, adopted = _nothing(UpstreamTimeout("no answer in time")), False, False
            cut = hurried  # which does not mean that upstream is down
        # It may have become private meanwhile.
        record = self._copy(name)
        status = reply.response.status or None
        cache = CacheStatus(outcome, forward_status=status, collapsed=collapsed)
        match freshness.conclude(reply.heard, stored=record is not None, withdrawn=self._settings.withdrawn):
            case Verdict.ADOPT if adopted and reply.record is not None:
                return _manifest_answer(request, reply.record, replace(cache, stored=True))
            case Verdict.SERVE_STALE if record is not None:
                if reply.cause is not None and not cut:
                    self._upstream.mark_down(request.host, freshness.DOWN_S)
                _log.warning("%s: %s; serving the stored manifest", name, _told(reply))
                detail = "upstream-failed" if reply.heard is Heard.NOTHING else "stale"
                return _manifest_answer(request, record, replace(cache, detail=detail))
            case Verdict.FAIL:
                assert reply.cause is not None
                return _unavailable(name, reply.cause)
        if request.method == "HEAD" and reply.record is not None:
            return _manifest_answer(request, reply.record, cache)
        return _relay(request, name, reply.response, cache)

    def _copy(self, name: Name) -> ManifestRecord | None:
        """Return what is stored for this kind of client, unless upstream has refused it to an anonymous request.

        A plain manifest that the other kind of client got will do, but is never fresh; a list will not.
        """
        record, other = self._store.manifest(name), self._store.manifest(name.twin)
        if record is not None and not record.denied:
            return record
        if record is not None or other is None or other.denied or other.is_list:
            return None
        return other._replace(confirmed=-math.inf)

    async def _adopt(self, name: Name) -> None:
        """Adopt what another cache of the fleet has recorded, unless the repository is known to be private."""
        assert self._tier is not None
        asked = self._store.moment(name.host, name.repository)
        if asked.count or self._store.is_denied(name.host, name.repository):
            return
        record = await self._tier.manifest(name)
        if record is not None and not asked.is_over and self._store.manifest(name) is None:
            _log.info("%s: taken over from the object store", name)
            self._store.adopt(name, record)

    def _deny(self, name: Name) -> None:
        if self._store.deny(name.host, name.repository):
            _log.warning("%s: refused to an anonymous request; its repository is private from now on", name)

    async def _fetch(
        self, request: Request, name: Name, confirm: ManifestRecord | None, *, has_copy: bool
    ) -> tuple[Reply, bool, bool]:
        """(upstream's reply, collapsed, whether an anonymous request got it and it was adopted).

        Authorization does not make a model private (client2 sends it always), so the anonymous try comes first;
        only what that is denied is requested with the caller's credentials, and never stored.
        """
        timeout_s = freshness.REVALIDATE_TIMEOUT_S if has_copy else DEADLINE_S

        reply, collapsed = await self._fetches.join(
            (name, request.host, request.agent, request.trail),
            lambda: self.revalidate(
                name, request.agent, request.trail, host=request.host, confirm=confirm, timeout_s=timeout_s
            ),
        )
        if reply.heard in (Heard.DENIED, Heard.GONE) and request.authorization is not None:
            reply = await self.hear(
                name,
                request.agent,
                request.trail,
                host=request.host,
                authorization=request.authorization,
                timeout_s=timeout_s,
            )
            if reply.response.status == 200:
                # A 404 to everybody else was no withdrawal.
                self._deny(name)
            return reply, False, False
        return reply, collapsed, True

    async def revalidate(
        self,
        name: Name,
        agent: str,
        trail: str = "",
        *,
        host: str | None = None,
        confirm: ManifestRecord | None = None,
        is_ready: Callable[[ManifestRecord], Awaitable[bool]] | None = None,
        timeout_s: float,
    ) -> Reply:
        """Ask upstream anonymously with this User-Agent, and update the store from the answer.

        A manifest for which nothing `is_ready` yet is not adopted. Other arguments as for `hear`.
        """
        asked = self._store.moment(name.host, name.repository)
        reply = await self.hear(name, agent, trail, host=host, confirm=confirm, timeout_s=timeout_s)
        if reply.record is None or is_ready is None or await is_ready(reply.record):
            self._conclude(name, reply, agent, asked)
        return reply

    async def hear(
        self,
        name: Name,
        agent: str,
        trail: str = "",
        *,
        host: str | None = None,
        confirm: ManifestRecord | None = None,
        authorization: str | None = None,
        timeout_s: float,
    ) -> Reply:
        """Ask upstream without changing the store. A HEAD may `confirm` a record by its digest; otherwise a GET is
        sent.

        `host` is the name of the registry that the client used: upstream's challenge is for that name.
        """
        host = host or self._settings.asked(name.host)
        target = f"/v2/{name.repository}/manifests/{name.reference}"
        headers = {"Accept": accept_of(takes_lists=name.takes_lists)}
        if agent:
            headers["User-Agent"] = agent
        if trail:
            headers[CDN_LOOP] = trail
        if authorization is not None:
            headers["Authorization"] = authorization
        confirmed = False
        try:
            async with asyncio.timeout(timeout_s):
                if confirm is not None:
                    with contextlib.suppress(NotTheRegistry):
                        head = await self._upstream.ask("HEAD", host, target, headers, timeout_s=timeout_s)
                        confirmed = _confirms(head, confirm)
                    if confirmed:
                        response = Response(200, CIMultiDict({"Content-Type": confirm.content_type}), confirm.body)
                        return Reply(Heard.MANIFEST, response, confirm._replace(confirmed=time.time()))
                return _classify(name, await self._upstream.ask("GET", host, target, headers, timeout_s=timeout_s))
        except UpstreamError as error:
            return _nothing(error)
        except TimeoutError:
            return _nothing(UpstreamTimeout("no answer in time"))

    def _conclude(self, name: Name, reply: Reply, agent: str, asked: Moment) -> None:
        """Update the store from upstream's answer to an anonymous request with this User-Agent.

        `asked` is when the request was sent: a refusal that has overtaken a yes prevails.
        """
        if reply.heard is Heard.MANIFEST and asked.is_over:
            return
        stored = self._store.manifest(name)
        known = self._copy(name) is not None
        verdict = freshness.conclude(reply.heard, stored=known, withdrawn=self._settings.withdrawn)
        if verdict is Verdict.ADOPT and reply.record is not None:
            version, pulled, brought = version_of(agent), 0.0, 0.0
            if stored is not None:
                pulled, brought = stored.pulled, stored.brought
                if stored.body == reply.record.body:
                    # What was granted to a version is granted to newer ones, as long as the bytes are the same.
                    version = min((item for item in (stored.oldest, version) if item is not None), default=None)
                elif not stored.denied:
                    _log.info("%s moved: sha256:%s -> sha256:%s", name, stored.digest, reply.record.digest)
            self._store.put_manifest(name, reply.record._replace(oldest=version, pulled=pulled, brought=brought))
        elif verdict is Verdict.RELAY_AND_DENY:
            self._deny(name)
        elif verdict is Verdict.RELAY_AND_DROP and name.takes_lists:
            # A client that takes lists would take a plain manifest too: there is nothing for any client.
            _log.warning("%s: withdrawn upstream (404): dropped", name)
            self._store.drop_model(name)
        elif verdict is Verdict.RELAY_AND_DROP and stored is not None:
            _log.warning("%s: withdrawn upstream (404) for clients that take no lists: dropped", name)
            self._store.drop_manifest(name)


def _rank(agent: str) -> tuple[int, ...]:
    """Return the sort key for an Ollama's version; versions that cannot exist yet sort lowest."""
    version = version_of(agent)
    return version if version is not None and version < ABSURD else ()


def _classify(name: Name, response: Response) -> Reply:
    match response.status:
        case 200:
            record = ManifestRecord.parse(response.body, response.headers.get("Content-Type", ""), now=time.time())
            if record is None and not response.body.lstrip()[:1] == b"{":
                raise UnexpectedResponse(f"{name}: expected a manifest, got {described(200, response.headers)}")
            if record is None:
                _log.warning("%s: upstream's answer is no manifest; not stored", name)
                return Reply(Heard.SOMETHING, response)
            if record.is_list and not name.takes_lists:
                _log.warning("%s: upstream's answer is a list, which was not asked for; not stored", name)
                return Reply(Heard.SOMETHING, response)
            if not record.content_type:
                record = record._replace(content_type=LIST_TYPE if record.is_list else DOCKER_TYPE)
            if ":" in name.reference and f"sha256:{record.digest}" != name.reference:
                raise UnexpectedResponse(f"{name}: expected a manifest with this digest, got sha256:{record.digest}")
            return Reply(Heard.MANIFEST, response, record)
        case 404:
            return Reply(Heard.GONE, response)
        case 401 | 403:
            return Reply(Heard.DENIED, response)
        case 412:
            return Reply(Heard.REFUSED, response)
    return Reply(Heard.FAILING, response)


def _nothing(cause: UpstreamError) -> Reply:
    return Reply(Heard.NOTHING, Response(0, CIMultiDict(), b""), cause=cause)


def _told(reply: Reply) -> str:
    if reply.cause is not None:
        return f"upstream failed ({reply.cause})"
    what = "with something else" if reply.heard is Heard.SOMETHING else str(reply.response.status)
    return f"upstream answered {what}"


def _digest(response: Response) -> str:
    """Return the manifest's digest, bare hexadecimal, as Ollama's registry (seen 2026-09) or any OCI registry tells
    it.
    """
    names = ("ollama-content-digest", "Docker-Content-Digest")
    told = next((response.headers[name] for name in names if name in response.headers), "")
    return told.removeprefix("sha256:").lower()


def _confirms(head: Response, record: ManifestRecord) -> bool:
    """Return whether upstream's answer to a HEAD says that the record is what a GET would bring."""
    # The digest could be that of the other representation.
    media_type = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    other = DOCKER_TYPE if record.is_list else LIST_TYPE
    return head.status == 200 and _digest(head) == record.digest and media_type != other


def _manifest_answer(request: Request, record: ManifestRecord, cache: CacheStatus) -> Answer:
    # Ollama's check for a list goes by the media type alone (0.40), whatever a GET said.
    media_type = LIST_TYPE if record.is_list and request.method == "HEAD" else record.content_type
    headers = [("Content-Type", media_type), ("Vary", "Accept")]
    if request.method == "HEAD":
        # As the registry does: bare hexadecimal, on HEAD only (seen 2026-09).
        headers.append(("ollama-content-digest", record.digest))
    body = record.body if request.method == "GET" else b""
    return Answer(200, cache, tuple(headers), body, len(record.body))


def _relay(request: Request, name: Name, response: Response, cache: CacheStatus) -> Answer:
    if response.status >= 400 and not response.body and request.method == "GET":
        message = f"{name} is not recorded, and upstream answered {response.status}: try again later"
        answer = explained(response.status, "UNAVAILABLE", message, cache)
        kept = (field for field in relayable(response.headers) if field[0] != "Content-Type")
        return replace(answer, headers=(*answer.headers, *kept))
    body = response.body if request.method == "GET" else b""
    headers = relayable(response.headers)
    if response.status in REDIRECTS and (location := response.headers.get("Location")):
        headers.append(("Location", location))
    return Answer(response.status, cache, tuple(headers), body, len(response.body))


def _unavailable(name: Name, error: UpstreamError) -> Answer:
    message = f"{name} is not recorded and upstream cannot be asked: {error}"
    return explained(504, "MANIFEST_UNKNOWN", message, CacheStatus(Outcome.MISS, detail="upstream-failed"))
