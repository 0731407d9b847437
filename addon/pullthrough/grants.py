"""Ask a registry for a blob in a caller's name, and remember to whom it said yes.

Invariant: a yes is the blob's bytes, or a redirect to the blob host's own address of that digest. Any other redirect
proves nothing until bytes have come from behind it: it may lead to a login page, or to where the caller is refused.
What an anonymous request got is public; what took credentials counts for those credentials, which stay in memory.
Knows neither recordings nor answers.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

from yarl import URL

from pullthrough import access
from pullthrough.datastream import DataStream, Source
from pullthrough.digest import Digest
from pullthrough.errors import SourceExpired, UpstreamError, UpstreamRefused, UpstreamUnreachable
from pullthrough.exchange import Request
from pullthrough.route import BlobRoute, ChunksumsRoute, parse_canonical_target
from pullthrough.scheduler import FIRST_SLICE
from pullthrough.settings import Settings
from pullthrough.store import Store
from pullthrough.upstream import DEADLINE_S, DENIED, PAUSES_S, PRIVATE, Upstream

_log = logging.getLogger(__name__)

Pair = BlobRoute | ChunksumsRoute
"""Names a repository and a digest."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A registry's yes."""

    source: Source
    stream: DataStream | None
    """The blob from byte 0, as far as it goes, where the yes brought bytes."""
    again: Callable[[], Awaitable[Source]]
    """Asks for a source again, with the same right."""
    location: str | None = None
    """Where the registry has redirected to; None where it gave the bytes itself."""
    public: bool = True
    """An anonymous request got it."""


class Grants:
    """Who may have which blob, as far as registries have said so."""

    def __init__(self, settings: Settings, store: Store, upstream: Upstream) -> None:
        self._settings = settings
        self._store = store
        self._upstream = upstream
        self._vouchers = access.Vouchers()

    # --- what is known

    def holds(self, request: Request, pair: Pair) -> bool:
        """Whether this caller may have the blob without a word of the registry's."""
        record = self._store.blob(pair.digest)
        vouched = self._vouchers.holds(
            access.credential_key(request.authorization),
            request.host,
            pair.repository,
            pair.digest,
            now=time.monotonic(),
        )
        listed = self._store.is_member(request.host, pair.repository, pair.digest)
        evidence = access.Evidence(public=record is not None and record.public, listed=listed, vouched=vouched)
        return access.decide(evidence) is access.Decision.GRANT

    def is_public(self, host: str, pair: Pair) -> bool:
        """Whether everybody may have the blob of this repository."""
        record = self._store.blob(pair.digest)
        return record is not None and record.public and self._store.is_member(host, pair.repository, pair.digest)

    def denials(self, host: str, pair: Pair) -> int:
        """What `confirm` is to be told of the moment when the registry was asked."""
        return self._store.denials(host, pair.repository)

    def confirm(self, host: str, pair: Pair, authorization: str | None, *, denials: int) -> None:
        """The registry has granted the blob's bytes to the holder of `authorization`; without one, to everybody.

        A yes to everybody that a refusal has overtaken meanwhile confirms nothing.
        """
        if authorization is None:
            if denials == self.denials(host, pair):
                self._store.confirm_public(host, pair.repository, pair.digest)
            return
        key = access.credential_key(authorization)
        self._vouchers.add(key, host, pair.repository, pair.digest, now=time.monotonic())
        # It was asked for because the anonymous request was refused, with whatever status.
        self._deny(host, pair.repository)

    def refuse(self, host: str, pair: Pair, authorization: str | None, status: int) -> None:
        """The registry has refused the blob to the holder of `authorization`."""
        if authorization is None and status in PRIVATE:
            self._deny(host, pair.repository)

    def _deny(self, host: str, repository: str) -> None:
        if self._store.deny(host, repository):
            _log.warning("%s/%s: refused to an anonymous request; private from now on", host, repository)

    # --- what is asked

    async def obtain(
        self,
        request: Request,
        pair: Pair,
        *,
        look: int = FIRST_SLICE,
        stop: int | None = None,
        hands_on: Callable[[str], bool] = lambda _location: False,
    ) -> Grant:
        """The registry's yes to this caller, asked anonymously first. UpstreamRefused where it says no.

        `look` bytes are asked for from behind a redirect that proves nothing by itself. One that the caller is merely
        handed, by `hands_on`, is not looked behind. Of bytes that the registry gives itself no more than `stop` are.
        """
        refusal: UpstreamRefused | None = None
        stop = 1 if self._store.held(pair.digest) is not None else stop
        for authorization, headers in attempts(request):
            denials = self.denials(request.host, pair)
            try:
                source, stream = await self._first(request.host, pair.repository, pair.digest, headers, stop=stop)
                location = source.url if stream is None else None
                if location is None or not hands_on(location):
                    source, stream = await self._prove(pair.digest, source, stream, stop or look)
            except UpstreamRefused as error:
                if error.status_hint not in DENIED:
                    raise
                self.refuse(request.host, pair, authorization, error.status_hint)
                refusal = error
                continue
            if location is None or not hands_on(location):
                self.confirm(request.host, pair, authorization, denials=denials)
            again = self.again(request, pair, authorization)
            return Grant(source, stream, again, location, public=authorization is None)
        assert refusal is not None
        raise refusal

    def again(self, request: Request, pair: Pair, authorization: str | None) -> Callable[[], Awaitable[Source]]:
        """Obtains a source for what has been granted: in public where that is possible, else as this caller."""

        async def obtain() -> Source:
            try:
                return await self.source(pair.digest)
            except UpstreamError:
                if authorization is None:
                    raise
            headers = request.forwarded | {"Authorization": authorization}
            return await self._locate(request.host, pair.repository, pair.digest, headers)

        return obtain

    async def source(self, digest: Digest) -> Source:
        """A source for a public blob, from any repository that has it. UpstreamError if none gives one."""
        problem: UpstreamError = UpstreamUnreachable(f"no repository is known that holds {digest.short} in public")
        record = self._store.blob(digest)
        for place, repository in self._store.repositories(digest):
            host = self._settings.asked(place)
            try:
                if record is None or not record.public:
                    return await self.public_source(host, repository, digest)
                return await self._locate(host, repository, digest, {})
            except UpstreamRefused as error:
                self.refuse(host, BlobRoute(repository, digest), None, error.status_hint)
                problem = error
            except UpstreamError as error:
                problem = error
        raise problem

    async def public_source(self, host: str, repository: str, digest: Digest) -> Source:
        """A source from this repository, as everybody gets it. UpstreamError if it gives none."""
        pair = BlobRoute(repository, digest)
        denials = self.denials(host, pair)
        try:
            source, stream = await self._first(host, repository, digest, {}, stop=1)
            source, stream = await self._prove(digest, source, stream, 1)
        except UpstreamRefused as error:
            self.refuse(host, pair, None, error.status_hint)
            raise
        if stream is not None:
            stream.close()
        self.confirm(host, pair, None, denials=denials)
        return source

    async def _locate(self, host: str, repository: str, digest: Digest, headers: Mapping[str, str]) -> Source:
        source, stream = await self._first(host, repository, digest, headers, stop=1)
        if stream is not None:
            stream.close()
        return source

    async def _first(
        self, host: str, repository: str, digest: Digest, headers: Mapping[str, str], *, stop: int | None = None
    ) -> tuple[Source, DataStream | None]:
        """The registry's own answer: where it redirects to, or the bytes; no more than `stop` of them are wanted."""
        return await self._upstream.obtain(host, repository, digest, headers, stop=stop, timeout_s=DEADLINE_S)

    async def _prove(
        self, digest: Digest, source: Source, stream: DataStream | None, stop: int
    ) -> tuple[Source, DataStream | None]:
        """The same, once it is the registry's word that these are the blob's bytes."""
        if stream is None and not self._names(source, digest):
            stream = await self._look(source, stop)
            source = stream.source or source
        return source, stream

    def _names(self, source: Source, digest: Digest) -> bool:
        """Whether the source is the blob host's own address of the digest: the registry's word that these are it."""
        url = URL(source.url, encoded=True)
        route = parse_canonical_target(url.raw_path_qs)
        return url.host == self._settings.blob_host and route is not None and route.digest == digest

    async def _look(self, source: Source, stop: int) -> DataStream:
        """The source's first bytes, at most `stop`; a refusal on the way to them is the registry's."""
        for pause_s in (*PAUSES_S, None):
            try:
                return await self._upstream.open_range(source, 0, stop, expected_length=None, validator=None)
            except SourceExpired as error:
                raise UpstreamRefused(error.status, error.headers) from error
            except UpstreamError:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError


def attempts(request: Request) -> Iterator[tuple[str | None, dict[str, str]]]:
    """(Authorization, fields to send) of each try: Authorization does not make a model private, client2 sends it
    always, so the anonymous try comes first."""
    yield None, request.forwarded
    if request.authorization is not None:
        yield request.authorization, request.forwarded | {"Authorization": request.authorization}
