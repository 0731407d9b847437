"""The body of a checked data response, and its source.

Invariant: either exactly the bytes that the response's head announced are handed on, or an error is raised; no message
quotes an address, which may be signed.
"""

import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

from yarl import URL

from pullthrough.core.errors import UnexpectedResponse, UpstreamError, UpstreamUnreachable
from pullthrough.core.fields import is_clean
from pullthrough.runtime.executors import Crew
from pullthrough.upstream.data_client import GATHER_S, HELD_S, PIECE, DataResponse
from pullthrough.upstream.dialer import translated
from pullthrough.upstream.response_checks import Extent

BATCH: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of one blob can be had: a (usually signed, short-lived) address. In memory only."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    near: bool = field(default=False, repr=False)
    """The address belongs to the fleet, not to upstream."""
    sizes: frozenset[int] = field(default=frozenset(), repr=False)
    """The complete lengths that the blob may have; empty where nothing is known."""
    proves: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    """To be called once the whole blob has come from here with its digest: whoever named the source was right."""

    @property
    def host(self) -> str:
        return URL(self.url, encoded=True).host or ""

    def moved(self, location: str) -> Self:
        """Return the source that a Location in this source's answer leads to; credentials stay within the origin."""
        there = join(self.url, location)
        return replace(self, url=there, headers=self.headers if _origin(there) == _origin(self.url) else {})


def join(base: str, location: str) -> str:
    """Return the address that a Location leads to. Raises UnexpectedResponse, not quoting it: it may be signed."""
    try:
        return str(URL(base, encoded=True).join(URL(location, encoded=True)))
    except ValueError:
        raise UnexpectedResponse(
            f"expected an address in Location, got {len(location)} characters that are none"
        ) from None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port: the scope of an Authorization field (RFC 6454 section 4)."""
    parsed = URL(url, encoded=True)
    return parsed.scheme, parsed.host, parsed.port


class Errors(Counter[type[UpstreamError]]):
    """Upstream's failures since the start, by kind."""

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count an upstream error that leaves the block."""
        try:
            yield
        except UpstreamError as error:
            self[type(error)] += 1
            raise


class DataStream:
    """A checked data response: the bytes `[start, stop)` of a blob of `length` bytes, in order. `close` it."""

    def __init__(
        self,
        response: DataResponse,
        crew: Crew,
        extent: Extent,
        errors: Errors,
        source: Source | None = None,
        *,
        ranged: bool = True,
    ) -> None:
        """`source` is where the bytes came from after all redirects; `ranged` says that a Range was asked for.

        The threads of `crew` read the body, and `errors` counts its failures.
        """
        self.source = source
        self.ranged = ranged
        self.whole = response.status == 200
        """The source answered with the complete blob, whatever was asked for."""
        self.start = extent.start
        self.stop = extent.stop
        self.length = extent.length
        # The fleet's sources need not share a validator: the digest tells whether their bytes fit together.
        tag = response.headers.get("ETag")
        self.validator = tag if tag is not None and not self.near and is_clean("ETag", tag) else None
        self._response = response
        self._crew = crew
        self._errors = errors
        self._left = self.stop - self.start
        if not self._left:
            # A response that says that the blob is empty may have another body.
            response.close()

    @property
    def near(self) -> bool:
        """Whether the bytes come from the fleet and cost upstream nothing."""
        return self.source is not None and self.source.near

    def close(self) -> None:
        """Close the response. One that was read to its end has already given its connection back."""
        self._response.close()

    async def pour(self, write: Callable[[int, memoryview], None], piece: int = PIECE) -> None:
        """Have a thread pass all bytes to `write(offset, bytes)`, at most `piece` of them at once.

        Raises UpstreamUnreachable or UpstreamTimeout if the body ends early or stalls, after writing what came.
        """
        with self._errors.counted():
            await self._crew.run(lambda: self._pour(write, piece), self._response.stop)

    def pause(self, seconds: float) -> None:
        """Read nothing for some seconds; for the thread that writes the bytes."""
        self._response.pause(seconds)

    async def first(self, count: int) -> bytes:
        """Return the first `count` bytes, or all if there are fewer; abandon the rest. Raises as `batches` does."""
        found = b""
        async with contextlib.aclosing(self.batches()) as batches:
            while len(found) < count and (data := await anext(batches, b"")):
                found += data
        self.close()
        return found[:count]

    async def batches(self) -> AsyncGenerator[bytes]:
        """Yield the body in batches. Raises UpstreamUnreachable or UpstreamTimeout if it ends early or stalls."""
        buffer = memoryview(bytearray(min(BATCH, self._left)))
        with self._errors.counted():
            while self._left:
                count = await self._crew.run(lambda: self._fill(buffer), self._response.stop)
                yield bytes(buffer[:count])

    def _pour(self, write: Callable[[int, memoryview], None], piece: int) -> None:
        buffer = memoryview(bytearray(min(piece, self._left)))
        while self._left:
            offset = self.stop - self._left
            write(offset, buffer[: self._fill(buffer)])

    def _fill(self, buffer: memoryview) -> int:
        """Read at least a byte, until the buffer is full, the body ends, or bytes should be held back no longer."""
        response, filled, until = self._response, 0, 0.0
        room = min(len(buffer), self._left)
        problem: UpstreamError | None = None
        try:
            with translated():
                while filled < room and (not filled or time.monotonic() < until):
                    count = response.take(buffer[filled:room])
                    if count is None:
                        if not response.wait(GATHER_S if filled else None):
                            if filled:
                                break
                            raise TimeoutError
                    elif count:
                        until = until if filled else time.monotonic() + HELD_S
                        filled += count
                    else:
                        raise UpstreamUnreachable(
                            f"expected {self._left - filled} more bytes, got the end of the response"
                        )
        except UpstreamError as error:
            # Hand on the bytes that came: the next read fails again.
            if not filled:
                raise
            problem = error
        self._left -= filled
        if problem is None and not self._left:
            response.finish()
        return filled


@contextlib.contextmanager
def closing_on_error(response: DataResponse) -> Iterator[None]:
    """Close the response when an error leaves the block."""
    try:
        yield
    except BaseException:
        response.close()
        raise
