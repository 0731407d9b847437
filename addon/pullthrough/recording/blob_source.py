"""The source of one blob: kept, shared by all its connections, obtained again when it has expired.

Invariant: sources live only in memory, and connections that miss one wait for a single request. The fleet's own sources
come first, and one of these that fails is dropped at once.
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
"""How often upstream must report the same other length before our length counts as the wrong one."""

Obtain = Callable[[], Awaitable[Source]]


class BlobSource:
    """The blob's current source, from which it opens checked responses."""

    def __init__(
        self, upstream: Upstream, obtain: Obtain, source: Source | None, nearby: NearbySources | None = None
    ) -> None:
        """`obtain` asks a registry for a source; `source` is one that a client's request has just got.

        `nearby` has the fleet's own sources.
        """
        self._upstream = upstream
        self._obtain = obtain
        self._nearby = nearby
        self._source: Source | None = None
        self._proofs: set[Callable[[], None] | None] = set()
        """The `proves` callback of each source so far."""
        self._given = source if nearby is not None else None
        """A source of upstream's, for when the fleet has none."""
        if source is not None and nearby is None:
            self._use(source)
        self._obtaining: asyncio.Task[Source] | None = None
        self._validator: str | None = None
        self._told: Counter[int] = Counter()
        """How often upstream reported each complete length that contradicts ours."""

    def offer(self, source: Source, obtain: Obtain) -> None:
        """Take a source that a client has just got, if ours is gone; `obtain` uses that client's access from now on."""
        self._obtain = obtain
        if self._nearby is not None:
            self._given = source
        elif self._source is None:
            self._use(source)

    async def source(self) -> Source:
        """Return the current source, obtaining one if needed. Raises UpstreamError if that fails."""
        if self._source is not None:
            return self._source
        # Where tasks start eagerly, it may be done before it is assigned.
        if self._obtaining is None or self._obtaining.done():
            self._obtaining = asyncio.get_running_loop().create_task(self._obtain_once(), name="obtain source")
            # If all who wait leave, asyncio would log its error as lost.
            self._obtaining.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._obtaining)

    async def _obtain_once(self) -> Source:
        near: Source | None = None
        if self._nearby is not None:
            if not self._nearby.is_public:
                # Obtaining the blob from upstream may show that it is public.
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
        """Return whether the blob may have this size, by the sizes that came with the source."""
        source = self._source or self._given
        return source is None or not source.sizes or size in source.sizes

    def prove(self) -> None:
        """Tell the source that the blob has its digest, unless some bytes may have come from another one."""
        if len(self._proofs) == 1 and (proves := self._proofs.pop()) is not None:
            proves()

    def expect(self, validator: str | None) -> None:
        """Check all later responses against this validator."""
        self._validator = validator

    @property
    def host(self) -> str:
        """The current source's host, "" if there is none."""
        return self._source.host if self._source is not None else ""

    async def open_first(self, size: Callable[[str], int]) -> DataStream:
        """Return the first response, which tells the length: at most `size(host)` bytes from the start.

        Tries again after failures. Raises UpstreamError if another try would be in vain.
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
                # A cache of the fleet may itself just be asking upstream: it gets one more try.
                self.failed(source, problem, silent_s=FIRST_TRY_S * tries.count)
            pause_s = tries.fail(problem, steady())
            if pause_s is None:
                raise problem
            _log.info("first response: %s; trying again", problem)
            await asyncio.sleep(pause_s)

    async def open(self, source: Source, start: int, stop: int, *, length: int | None) -> DataStream:
        """Return a response with `[start, stop)`, or with the whole blob if the source ignores Range."""
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
        # Later slices skip the redirects that led here. If this address expires, the registry is asked again.
        if self._source is source and stream.source is not None:
            self._source = stream.source
        return stream

    def _is_wrong(self, source: Source, length: int, told: int) -> bool:
        """Return whether `length`, from an earlier answer, is wrong, now that one has `told` another."""
        if source.sizes:
            return length not in source.sizes or told in source.sizes
        self._told[told] += 1
        return len(self._told) == 1 and self._told[told] >= MAX_CONTRADICTIONS

    def failed(self, source: Source, error: UpstreamError, *, silent_s: float) -> None:
        """Note that `source` did not deliver all it was asked for, and nothing at all for `silent_s`."""
        if source.near and lets_go(error, silent_s):
            self._drop(source)

    def mistrust(self) -> None:
        """Note that the bytes do not have the digest."""
        if self._nearby is not None:
            self._nearby.mistrust()

    def _drop(self, source: Source) -> None:
        if self._source is source:
            self._source = None
            if source.near and self._nearby is not None:
                self._nearby.failed()

    def slot(self, source: Source) -> asyncio.Semaphore:
        """Return the semaphore that limits connections to the source's host."""
        return self._upstream.slot(source)

    def close(self) -> None:
        if self._obtaining is not None:
            self._obtaining.cancel()
