"""Ask a registry for a blob with a caller's credentials, and remember whom it granted the blob.

Invariant: a yes is a redirect to the blob host's own address of that digest, or bytes that agree with what is known of
it: a random piece of the stored bytes, else the size that the repository's manifests claim. Where nothing is known the
yes counts once all bytes have arrived and match the digest. Any other redirect proves nothing until such bytes have
come from behind it: it may lead to a login page, or to a server that refuses the caller. What an anonymous request got
is public; what took credentials is granted to those credentials, which stay in memory.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any, Final

from yarl import URL

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import (
    LengthContradicted,
    SourceExpired,
    UpstreamError,
    UpstreamRefused,
    UpstreamUnreachable,
)
from pullthrough.core.routes import BlobRoute, ChunksumsRoute, parse_canonical_target
from pullthrough.library.expected_sizes import sizes_in
from pullthrough.net import client_acl
from pullthrough.recording.slicing import FIRST_SLICE
from pullthrough.registry.messages import Request
from pullthrough.runtime import platform
from pullthrough.runtime.clock import Moment
from pullthrough.store.store import Store
from pullthrough.upstream.client import DEADLINE_S, DENIED, PAUSES_S, PRIVATE, Upstream
from pullthrough.upstream.data_stream import DataStream, Source
from pullthrough.upstream.response_checks import check_length

_log = logging.getLogger(__name__)

Pair = BlobRoute | ChunksumsRoute
"""Names a repository and a digest."""


MOST_LIKELY: Final = 10_000
"""For how many blobs the place is remembered."""
PIECE: Final = 4 << 10
"""How many stored bytes an answer is compared with."""


class Word(Enum):
    """What an answer says about the requested blob."""

    PROVEN = auto()
    """The registry has named it, or its bytes or length agree with what is known."""
    LIKELY = auto()
    """Nothing contradicts it, because nothing is known about the blob."""
    HANDED_ON = auto()
    """It is a redirect that has not been followed."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A registry's answer, as far as it has been followed."""

    source: Source
    stream: DataStream | None
    location: str | None
    word: Word


@dataclass(frozen=True, slots=True)
class _Piece:
    """Stored bytes of a blob at `start`, and at its beginning for sources that ignore Range."""

    start: int
    data: bytes
    first: bytes

    @property
    def interval(self) -> tuple[int, int]:
        """The interval to request; for an empty blob its first byte, which does not exist."""
        return self.start, self.start + max(1, len(self.data))

    async def agrees(self, stream: DataStream) -> bool:
        """Return whether the stream has the same bytes; it is read as far as necessary, and closed."""
        expected = self.data if stream.start == self.start else self.first
        return await stream.first(len(expected)) == expected


@dataclass(frozen=True, slots=True)
class Grant:
    """A registry's yes."""

    source: Source
    stream: DataStream | None
    """The blob from byte 0, as far as it goes, where the yes brought bytes; of a held blob a piece, and closed."""
    again: Callable[[], Awaitable[Source]]
    """Asks for a source again, for the same caller."""
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
        self._vouchers = client_acl.Vouchers()
        self._seen: set[str] = set()
        """Redirect targets that have delivered a blob: clients are never sent to a login page."""
        self._likely: dict[Digest, tuple[str, str]] = {}
        """(host, repository) that seems to have a blob about which nothing is known yet."""

    # --- what is known

    def holds(self, request: Request, pair: Pair) -> bool:
        """Return whether this caller may have the blob without asking the registry."""
        record = self._store.blob(pair.digest)
        vouched = self._vouchers.holds(
            client_acl.credential_key(request.authorization),
            request.host,
            pair.repository,
            pair.digest,
            now=time.monotonic(),
        )
        listed = self._store.is_member(request.host, pair.repository, pair.digest)
        evidence = client_acl.Evidence(public=record is not None and record.public, listed=listed, vouched=vouched)
        return client_acl.decide(evidence) is client_acl.Decision.GRANT

    def is_public(self, host: str, pair: Pair) -> bool:
        """Return whether everybody may have the blob of this repository."""
        record = self._store.blob(pair.digest)
        return record is not None and record.public and self._store.is_member(host, pair.repository, pair.digest)

    def moment(self, host: str, pair: Pair) -> Moment:
        """Return the moment to pass to `confirm`: take it before the registry is asked."""
        return self._store.moment(host, pair.repository)

    def confirm(self, host: str, pair: Pair, authorization: str | None, *, since: Moment) -> None:
        """Record that the registry granted the blob to the holder of `authorization`; without one, to everybody.

        A public grant that a refusal has overtaken meanwhile confirms nothing.
        """
        if authorization is None:
            if not since.is_over:
                self._store.confirm_public(host, pair.repository, pair.digest)
            return
        key = client_acl.credential_key(authorization)
        self._vouchers.add(key, host, pair.repository, pair.digest, now=time.monotonic())
        # The credentials were used because the anonymous request was refused, with whatever status.
        self._deny(host, pair.repository)

    def refuse(self, host: str, pair: Pair, authorization: str | None, status: int) -> None:
        """Record that the registry refused the blob to the holder of `authorization`."""
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
        """Return the registry's grant to this caller, asking anonymously first. Raises UpstreamRefused where it
        refuses.

        `look` bytes are requested from behind a redirect that proves nothing by itself. With `hands_on` the caller is
        only sent there: such a redirect is followed until its host has delivered a blob. If the registry gives the
        bytes itself, no more than `stop` are wanted.
        """
        refusal: UpstreamRefused | None = None
        asked = (0, stop) if stop is not None else None
        for authorization, headers in attempts(request):
            try:
                found = await self._try(
                    request.host, pair, authorization, headers, look=look, asked=asked, hands_on=hands_on
                )
            except UpstreamRefused as error:
                if error.status_hint not in DENIED:
                    raise
                refusal = error
                continue
            again = self.again(request, pair, authorization)
            return Grant(found.source, found.stream, again, found.location, public=authorization is None)
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
            return await self._locate(request.host, pair, authorization, headers, look=0)

        return obtain

    async def source(self, digest: Digest, place: tuple[str, str] | None = None) -> Source:
        """Return a source for a blob, as everybody gets it: from a (host, repository), or from any that has it.

        Raises UpstreamError if none gives one.
        """
        problem: UpstreamError = UpstreamUnreachable(f"no repository is known that holds {digest.short} in public")
        likely = [self._likely[digest]] if digest in self._likely else []
        record = self._store.blob(digest)
        is_known = place is None and record is not None and record.public
        for host, repository in [place] if place is not None else [*self._store.repositories(digest), *likely]:
            pair = BlobRoute(repository, digest)
            try:
                return await self._locate(self._settings.asked(host), pair, None, {}, look=0 if is_known else 1)
            except UpstreamError as error:
                problem = error
        raise problem

    async def _locate(
        self, host: str, pair: Pair, authorization: str | None, headers: Mapping[str, str], *, look: int
    ) -> Source:
        found = await self._try(host, pair, authorization, headers, look=look, asked=(0, 1))
        if found.stream is not None:
            found.stream.close()
        return found.source

    async def _try(
        self, host: str, pair: Pair, authorization: str | None, headers: Mapping[str, str], **how: Any
    ) -> _Found:
        """Ask as `_ask` does, and note what a yes or a no says of who may have the blob."""
        since = self.moment(host, pair)
        try:
            found = await self._ask(host, pair, headers, **how)
        except UpstreamRefused as error:
            self.refuse(host, pair, authorization, error.status_hint)
            raise
        if authorization is not None and found.word is Word.LIKELY:
            # It counts for this caller alone.
            found = replace(found, word=Word.PROVEN)
        confirm = partial(self.confirm, host, pair, authorization, since=since)
        return replace(found, source=self._settle(host, pair, found, confirm))

    def _settle(self, host: str, pair: Pair, found: _Found, confirm: Callable[[], None]) -> Source:
        """Confirm the grant now if it is proven, else once the blob has arrived from there and matches its digest."""
        if found.word is Word.PROVEN:
            confirm()
        if found.word is not Word.LIKELY:
            return found.source
        self._likely.pop(pair.digest, None)
        self._likely[pair.digest] = (host, pair.repository)
        if len(self._likely) > MOST_LIKELY:
            del self._likely[next(iter(self._likely))]
        return replace(found.source, proves=confirm)

    def told(self, host: str, pair: Pair, length: int) -> int:
        """Return the claimed length, which grants nothing. Raises Disagreement if the blob cannot have it."""
        try:
            check_length(length, sizes_in(self._store, host, pair.repository, pair.digest))
        except LengthContradicted as error:
            raise self._disagreement(host, "another length", f"{pair.digest.short}: {error}") from None
        return length

    def _disagreement(self, host: str, what: str, detail: str) -> UpstreamError:
        return self._upstream.impostors.disagreeing(host, what, detail)

    def sums(
        self, host: str, pair: Pair, authorization: str | None, source: Source, size: int, *, since: Moment
    ) -> Source:
        """Settle the grant of `source`, which the registry named to this caller with sums that cover `size` bytes.

        No byte has arrived: the proof is an address on the blob host, or sums of a known length. Raises Disagreement
        where the length is another.
        """
        sizes = sizes_in(self._store, host, pair.repository, pair.digest)
        self.told(host, pair, size)
        source = replace(source, sizes=sizes or frozenset({size}))
        proven = sizes or authorization is not None or self._names(source, pair.digest)
        found = _Found(source, None, None, Word.PROVEN if proven else Word.LIKELY)
        return self._settle(host, pair, found, partial(self.confirm, host, pair, authorization, since=since))

    async def _ask(
        self,
        host: str,
        pair: Pair,
        headers: Mapping[str, str],
        *,
        look: int,
        asked: tuple[int, int] | None = None,
        hands_on: Callable[[str], bool] = lambda _location: False,
    ) -> _Found:
        """Return where the blob is, and what proves it. Raises Disagreement where something else is there.

        A blob that is not stored is requested whole, or as the interval `asked`, to be recorded. For who has a right
        to it already `look` is 0, and nobody looks behind a redirect: its address may be good for few requests.
        """
        held = await self._piece(pair.digest)
        # Asked now: bytes that come to be held meanwhile, or cannot be read, are compared with nothing below.
        is_claimed = not self._store.held(pair.digest) and sizes_in(self._store, host, pair.repository, pair.digest)
        wanted = held.interval if held is not None else asked
        source, stream = await self._upstream.obtain(
            host, pair.repository, pair.digest, headers, asked=wanted, timeout_s=DEADLINE_S
        )
        sizes = sizes_in(self._store, host, pair.repository, pair.digest)
        source = replace(source, sizes=sizes)
        location = source.url if stream is None else None
        if stream is None:
            if self._names(source, pair.digest):
                return _Found(source, None, location, Word.PROVEN)
            handed_on, there = hands_on(source.url), source.host
            if not look or (handed_on and there in self._seen):
                return _Found(source, None, location, Word.HANDED_ON)
            stream = await self._look(host, source, held.interval if held is not None else (0, look))
            source = stream.source or source
            if handed_on:
                self._seen.add(there)
        try:
            self.told(host, pair, stream.length)
            if held is not None and not await held.agrees(stream):
                raise self._disagreement(host, "other bytes", pair.digest.short)
        except BaseException:
            stream.close()
            raise
        return _Found(source, stream, location, Word.PROVEN if held is not None or is_claimed else Word.LIKELY)

    async def _piece(self, digest: Digest) -> _Piece | None:
        """Return a random piece of the stored blob; None where it is not stored, or cannot be read."""
        file = self._store.open_blob(digest)
        if file is None:
            return None
        try:
            start = secrets.randbelow(max(1, file.size - PIECE + 1))
            first = await asyncio.to_thread(platform.read_at, file.descriptor, 0, PIECE)
            data = await asyncio.to_thread(platform.read_at, file.descriptor, start, PIECE) if start else first
        except OSError as error:
            _log.warning("%s cannot be read, so nothing is compared with it: %s", digest.short, error)
            return None
        finally:
            file.release()
        return _Piece(start, data, first)

    def _names(self, source: Source, digest: Digest) -> bool:
        """Return whether the source is the blob host's own address for the digest, which is proof by itself."""
        url = URL(source.url, encoded=True)
        route = parse_canonical_target(url.raw_path_qs)
        return url.host == self._settings.blob_host and route is not None and route.digest == digest

    async def _look(self, host: str, source: Source, interval: tuple[int, int]) -> DataStream:
        """Return the source's bytes in this interval; a refusal on the way counts if it has a registry's shape."""
        for pause_s in (*PAUSES_S, None):
            try:
                return await self._upstream.open_range(source, *interval, expected_length=None, validator=None)
            except SourceExpired as error:
                if error.what:
                    raise self._upstream.impostors.displaced(host, f"behind its redirect: {error.what}") from None
                raise UpstreamRefused(error.status, error.headers) from error
            except LengthContradicted as error:
                raise self._upstream.impostors.disagreeing(
                    host, "another length", f"behind its redirect: {error}"
                ) from None
            except UpstreamError:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError


def attempts(request: Request) -> Iterator[tuple[str | None, dict[str, str]]]:
    """Yield (Authorization, fields to send) for each try, the anonymous one first.

    Authorization does not make a model private: client2 always sends it.
    """
    yield None, request.forwarded
    if request.authorization is not None:
        yield request.authorization, request.forwarded | {"Authorization": request.authorization}
