"""The source of one blob: kept, shared by all its connections, obtained again when it has expired.

Invariant: sources live in memory only, and are obtained once for all who miss one; the fleet's own come first, and
one of them that fails is let go at once.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from pullthrough.core.errors import LengthContradicted, SourceExpired, UpstreamError, UpstreamTimeout
from pullthrough.fleet.nearby_sources import NearbySources
from pullthrough.recording.retry_policy import FIRST_TRY_S, FirstTries, lets_go
from pullthrough.runtime.clock import steady
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.data_stream import DataStream, Source

_log = logging.getLogger(__name__)

MAX_CONTRADICTIONS: Final = 3
"""How often upstream tells one and the same other length, before what is here is what is wrong."""

Obtain = Callable[[], Awaitable[Source]]


class BlobSource:
    """Opens checked responses for the blob, from whatever source is good now."""

    def __init__(
        self, upstream: Upstream, obtain: Obtain, source: Source | None, nearby: NearbySources | None = None
    ) -> None:
        """`obtain` asks a registry for a source; `source` is one that a client's request has just got.

        `nearby_sources` are the fleet's own.
        """
        self._upstream = upstream
        self._obtain = obtain
        self._nearby = nearby
        self._source: Source | None = None
        self._proofs: set[Callable[[], None] | None] = set()
        """What each source so far would have proven."""
        self._given = source if nearby is not None else None
        """Of upstream's, for when the fleet has none."""
        if source is not None and nearby is None:
            self._use(source)
        self._obtaining: asyncio.Task[Source] | None = None
        self._validator: str | None = None
        self._told: Counter[int] = Counter()
        """The complete lengths that contradict what is here, and how often each was told."""

    def offer(self, source: Source, obtain: Obtain) -> None:
        """A client has just got this source: use it if ours is gone, and that client's right from now on."""
        self._obtain = obtain
        if self._nearby is not None:
            self._given = source
        elif self._source is None:
            self._use(source)

    async def source(self) -> Source:
        """Return the source now; UpstreamError if none can be had."""
        if self._source is not None:
            return self._source
        # Where tasks start eagerly it may be done before it is named.
        if self._obtaining is None or self._obtaining.done():
            self._obtaining = asyncio.get_running_loop().create_task(self._obtain_once(), name="obtain source")
        return await asyncio.shield(self._obtaining)

    async def _obtain_once(self) -> Source:
        near: Source | None = None
        if self._nearby is not None:
            if not self._nearby.is_public:
                # Obtaining it from upstream may show that it is.
                self._given = self._given or await self._obtain()
            if self._nearby.is_public:
                near = await self._nearby.source()
        if near is not None:
            return self._use(near)
        given, self._given = self._given, None
        return self._use(given or await self._obtain())

    def _use(self, source: Source) -> Source:
        self._source = source
        self._proofs.add(source.proves)
        return source

    def permits(self, size: int) -> bool:
        """Return whether the blob may be so long, by what is known where the source is from."""
        source = self._source or self._given
        return source is None or not source.sizes or size in source.sizes

    def prove(self) -> None:
        """Let the source know that the blob has its digest, unless some of it may have come from another one."""
        if len(self._proofs) == 1 and (proves := self._proofs.pop()) is not None:
            proves()

    def expect(self, validator: str | None) -> None:
        """Hold all later responses against this validator."""
        self._validator = validator

    @property
    def host(self) -> str:
        """Of the source now, "" where there is none."""
        return self._source.host if self._source is not None else ""

    async def open_first(self, size: Callable[[str], int]) -> DataStream:
        """Return the first response: at most so many bytes from the start as `size` says of the host; it tells the
        length.

        Raises what nothing speaks for another try after.
        """
        tries = FirstTries(steady())
        while True:
            source: Source | None = None
            try:
                async with asyncio.timeout(FIRST_TRY_S):
                    source = await self.source()
                    return await self.open(source, 0, size(source.host), length=None)
            except TimeoutError:
                problem: UpstreamError = UpstreamTimeout(f"no answer of the source in {FIRST_TRY_S:.0f} s")
            except UpstreamError as error:
                problem = error
            if source is not None:
                # One of the fleet may be just asking upstream itself: it has one try more.
                self.failed(source, problem, silent_s=FIRST_TRY_S * tries.count)
            pause_s = tries.fail(problem, steady())
            if pause_s is None:
                raise problem
            _log.info("first response: %s; trying again", problem)
            await asyncio.sleep(pause_s)

    async def open(self, source: Source, start: int, stop: int, *, length: int | None) -> DataStream:
        """Return a response with `[start, stop)`, or with the whole where the source ignores Range."""
        validator = None if source.near else self._validator
        try:
            stream = await self._upstream.open_range(source, start, stop, expected_length=length, validator=validator)
        except SourceExpired:
            self._drop(source)
            raise
        except LengthContradicted as error:
            error.discards = length is not None and self._is_wrong(source, length, error.told)
            raise
        self._validator = self._validator or stream.validator
        # The next slices need not ask all the way again: what expires is obtained anew, from the registry on.
        if self._source is source and stream.source is not None:
            self._source = stream.source
        return stream

    def _is_wrong(self, source: Source, length: int, told: int) -> bool:
        """Return whether the blob has another length than the one that an earlier answer told."""
        if source.sizes:
            return length not in source.sizes or told in source.sizes
        self._told[told] += 1
        return len(self._told) == 1 and self._told[told] >= MAX_CONTRADICTIONS

    def failed(self, source: Source, error: UpstreamError, *, silent_s: float) -> None:
        """`source` did not bring all that it was asked for, and nothing at all for `silent_s`."""
        if source.near and lets_go(error, silent_s):
            self._drop(source)

    def mistrust(self) -> None:
        """The bytes do not have the digest."""
        if self._nearby is not None:
            self._nearby.mistrust()

    def _drop(self, source: Source) -> None:
        if self._source is source:
            self._source = None
            if source.near and self._nearby is not None:
                self._nearby.failed()

    def slot(self, source: Source) -> asyncio.Semaphore:
        """Return a place among all connections to the source's host."""
        return self._upstream.slot(source)

    def close(self) -> None:
        if self._obtaining is not None:
            self._obtaining.cancel()
