"""Answer a request for a blob's bytes: ranges, preconditions, and a reader of what is stored or being recorded.

Invariant: whether this caller may have the bytes was decided before, or follows from the address itself: a capability
of ours, or a signed address that was handed out here. Only the bytes that readers ask for are fetched, until one of
them shows that it pulls the blob. Sends nothing: an answer carries a reader.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from pullthrough.core import capability
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.preconditions import Precondition, evaluate
from pullthrough.core.ranges import Unsatisfiable, if_range_matches, parse_range
from pullthrough.core.records import Name
from pullthrough.core.routes import CanonicalRoute
from pullthrough.fleet.documents import capability_secret
from pullthrough.fleet.tier import Tier
from pullthrough.library.eviction import SMALL
from pullthrough.library.expected_sizes import public_sizes
from pullthrough.net.pull_history import PullHistory
from pullthrough.recording.pulls import Place, Pulls
from pullthrough.recording.reader import WAIT_S, Reader
from pullthrough.recording.recorder import Recorder
from pullthrough.recording.recording import Recording
from pullthrough.registry.grants import Grant, Grants
from pullthrough.registry.messages import Answer, Request
from pullthrough.registry.offload import Offload
from pullthrough.registry.signed_urls import HandedOut
from pullthrough.runtime.clock import lasting
from pullthrough.store.store import Store

_log = logging.getLogger(__name__)

OCTETS: Final = "application/octet-stream"
_ANY_SIZE: Final = 1 << 62


class BlobContent:
    """The bytes of all blobs."""

    def __init__(
        self,
        store: Store,
        recorder: Recorder,
        grants: Grants,
        offload: Offload,
        pulls: Pulls,
        history: PullHistory,
        on_pull: Callable[[Place, Digest], None],
        tier: Tier | None = None,
    ) -> None:
        """`on_pull` is called with the place of a blob once a client has shown that it pulls it."""
        self._store = store
        self._recorder = recorder
        self._grants = grants
        self._offload = offload
        self._pulls = pulls
        self._history = history
        self._on_pull = on_pull
        self._tier = tier

    async def canonical(self, request: Request, route: CanonicalRoute) -> Answer | None:
        """Answer a request at a canonical address; None if the address is not ours."""
        granted = self._granted(route)
        if granted is not None:
            return await self.read(request, route.digest, offload=granted.offload)
        if capability.is_claimed(route.query):
            # The blob host would refuse it too, but with a text, and would have seen the capability.
            return Answer(403, CacheStatus(Outcome.BYPASS))
        return None

    def _granted(self, route: CanonicalRoute) -> capability.Capability | None:
        """Return the capability in the query: one of ours, or one of our fleet's, which is valid for public blobs."""
        now = lasting()
        if granted := capability.verify(route.query, route.digest, secret=self._store.secret, now=now):
            return granted
        record = self._store.blob(route.digest)
        if self._tier is None or record is None or not record.public:
            return None
        secret = capability_secret(self._tier.secret)
        return capability.verify(route.query, route.digest, secret=secret, now=now)

    async def read(
        self, request: Request, digest: Digest, *, offload: bool = False, handed_out: HandedOut | None = None
    ) -> Answer:
        """Return the requested bytes; whether this caller may have them was decided before.

        `handed_out` is the signed address of the request; with `offload` the bytes may be served elsewhere.
        """
        file = self._store.open_blob(digest)
        if file is not None:
            try:
                return self._bytes(
                    request,
                    digest,
                    file.size,
                    lambda a, b: Reader(a, b, file=file.acquire(), on_unreadable=lambda: self._disown(digest)),
                    offload=offload,
                )
            finally:
                file.release()
        recording = self.recording(digest, handed_out, look=wanted_from_start(request))
        size = await recording.ready()
        if size <= SMALL and request.method == "GET" and await self._is_verified(recording, size):
            return await self.read(request, digest, offload=offload)
        return self._bytes(
            request, digest, size, lambda a, b: Reader(a, b, recording=recording), recording=recording, offload=offload
        )

    async def _is_verified(self, recording: Recording, size: int) -> bool:
        """Wait until a small blob has arrived and matches its digest; False if it cannot be stored.

        So neither a web page of the right length nor a truncated body ever reaches a client. Raises the recording's
        error.
        """
        recording.pull()
        reader = Reader(0, size, recording=recording)
        try:
            while not await reader.whole(WAIT_S):
                pass
            if reader.passes_through:
                return False
        finally:
            reader.close()
        await recording.over.wait()
        try:
            recording.check()
        except StoreUnwritable:
            return False
        return self._store.held(recording.digest) is not None

    def recording(self, digest: Digest, handed_out: HandedOut | None = None, *, look: int = 0) -> Recording:
        """Return the recording of the blob: the running one, or a new one from any repository that has it publicly.

        For a new one, the first `look` bytes are certainly wanted.
        """
        if found := self._recorder.find(digest):
            return found
        source = None
        if handed_out is not None:
            source = replace(handed_out.source, sizes=public_sizes(self._store, digest))
        obtain = handed_out.obtain if handed_out is not None else None
        return self._recorder.open(
            digest, obtain=obtain or (lambda: self._grants.source(digest)), source=source, look=look
        )

    async def record(self, digest: Digest, grant: Grant, *, look: int = 0) -> int:
        """Return the size of a granted blob; if it is not stored, a recording is started. Raises CacheError.

        Of a new recording the first `look` bytes are surely wanted.
        """
        if (held := self._store.held(digest)) is not None and held.size is not None:
            if grant.stream is not None:
                grant.stream.close()
            return held.size
        recording = self._recorder.open(digest, obtain=grant.again, source=grant.source, stream=grant.stream, look=look)
        return await recording.ready()

    def _disown(self, digest: Digest) -> None:
        _log.error("%s: the stored file cannot be read; it will be recorded anew", digest.short)
        self._store.disown(digest)

    def _bytes(
        self,
        request: Request,
        digest: Digest,
        size: int,
        open_reader: Callable[[int, int], Reader],
        *,
        recording: Recording | None = None,
        offload: bool = False,
    ) -> Answer:
        """Answer with what the request selects of a blob of `size` bytes; `recording` is None for a stored one."""
        entity_tag = f'"{digest}"'
        hit = recording is None
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
        reads = request.method == "GET" and start < stop
        if reads and offload and (location := self._offload.location(request, digest, start, stop)):
            return Answer(307, replace(cache, detail="offload"), (("Location", location),))
        headers.append(("Content-Type", OCTETS))
        body: Reader | bytes = b""
        if reads:
            body = open_reader(start, stop)
            body.on_close = self._note(request.client, digest, size, body)
            if self._pulls.begin(request.client, digest, start, stop, size):
                self._follow(request, digest, recording)
        # x/transfer compares a blob's speed with the median of the last ones, counted from the head: after a few hits,
        # a blob that arrives at the speed of the line looks too slow (x/transfer/download.go, v0.14.0 to today).
        return Answer(status, cache, tuple(headers), body, stop - start, held=request.is_transfer and not hit)

    def _note(self, client: str, digest: Digest, size: int, reader: Reader) -> Callable[[], None]:
        """Note that bytes are about to be sent to the client; return the function to call when that has ended."""
        pull = self._history.begin(client, digest, size, lambda: self._find_model(digest), now=time.time())
        record = self._store.blob(digest)
        cached = record is not None and record.held and pull is not None and record.recorded <= pull.began

        def end() -> None:
            self._pulls.end(client, digest, reader.start, reader.stop)
            if pull is not None:
                self._history.end(pull, digest, reader.start, reader.sent, cached=cached, now=time.time())

        return end

    def _find_model(self, digest: Digest) -> Name | None:
        """Return a stored model that has the blob."""
        return next((name for name, record in self._store.manifests().items() if record.lists(digest)), None)

    def _follow(self, request: Request, digest: Digest, recording: Recording | None) -> None:
        """Record all of a blob that a client pulls, and the layers that come next."""
        if recording is not None:
            recording.pull()
        if (place := self._pulls.place(request.client, digest)) is not None:
            self._on_pull(place, digest)


def wanted_from_start(request: Request) -> int:
    """Return how many bytes from the start of a blob of unknown size the request certainly wants."""
    if request.method != "GET":
        return 0
    match parse_range(request.headers.get("range"), _ANY_SIZE):
        case None:
            return _ANY_SIZE
        case Unsatisfiable():
            return 0
        case selected:
            return selected.stop if selected.start == 0 else 0
