"""Bytes of one blob straight from upstream, kept in a small window: the fallback if the store cannot be written to.

Invariant: bytes come in order and without gaps, from responses that were checked like a recording's; a failure is
retried from the next byte. Readers at about the same position share one response and the window of its latest bytes.
Up to 64 windows of a blob together hold about WINDOW bytes, and each further one about 2 * AHEAD; a reader that falls
out of its window gets a response of its own.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from pullthrough.core.errors import UpstreamError
from pullthrough.recording.blob_source import BlobSource
from pullthrough.recording.plan import Line
from pullthrough.recording.retry_policy import Patience, backoff_s
from pullthrough.runtime.clock import steady

_log = logging.getLogger(__name__)

WINDOW: Final = 64 << 20
AHEAD: Final = 512 << 10
"""How far a response is read ahead of its foremost reader."""


class Relays:
    """The responses that pass one blob of `size` bytes through."""

    def __init__(self, blob_source: BlobSource, line: Line, size: int) -> None:
        self.blob_source = blob_source
        self.line = line
        self.size = size
        self.lines: list[_Line] = []

    @property
    def share(self) -> int:
        """How many bytes one response may keep."""
        return max(2 * AHEAD, WINDOW // max(1, len(self.lines)))

    def join(self, relay: "Relay") -> "_Line":
        """Return a response that has the relay's next byte, or brings it next; a new one if there is none."""
        position = relay.position
        line = next((line for line in self.lines if line.offers(position)), None)
        if line is None:
            line = _Line(self, position, relay.stop)
            self.lines.append(line)
            line.begin()
        line.users.add(relay)
        return line


class _Line:
    """One response from `start` up to `stop`, or a chain of them if some fail."""

    def __init__(self, relays: Relays, start: int, stop: int) -> None:
        self.users: set[Relay] = set()
        self.error: UpstreamError | None = None
        self.changed = asyncio.Event()
        self._relays = relays
        self._stop = stop
        self._kept: deque[bytes] = deque()
        self._start = start
        self._end = start
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="relay")

    def offers(self, position: int) -> bool:
        return self.error is None and self._start <= position <= self._end and position < self._stop

    def read(self, position: int, limit: int) -> bytes:
        """Return at most `limit` bytes from `position`; b"" if none have come yet."""
        start = self._start
        for data in self._kept:
            if position < start + len(data):
                return data[position - start : position - start + limit]
            start += len(data)
        return b""

    def leave(self, relay: "Relay") -> None:
        """Remove a reader; the last one ends the response."""
        self.users.discard(relay)
        if not self.users:
            with contextlib.suppress(ValueError):
                self._relays.lines.remove(self)
            if self._task is not None:
                self._task.cancel()

    def moved(self) -> None:
        """Wake all who wait: a reader has moved on, or bytes have come."""
        self.changed.set()
        self.changed = asyncio.Event()

    async def _run(self) -> None:
        try:
            async with contextlib.aclosing(self._fetch()) as pieces:
                async for piece in pieces:
                    self._kept.append(piece)
                    self._end += len(piece)
                    while self._end - self._start - len(self._kept[0]) >= self._relays.share:
                        self._start += len(self._kept.popleft())
                    self.moved()
                    while self._end - max((user.position for user in self.users), default=0) > AHEAD:
                        await self.changed.wait()
        except UpstreamError as error:
            self.error = error
            self.moved()

    async def _fetch(self) -> AsyncGenerator[bytes]:
        position = self._start
        patience = Patience(steady())
        relays = self._relays
        source = None
        while position < self._stop:
            try:
                source = await relays.blob_source.source()
                async with relays.blob_source.slot(source):
                    stream = await relays.blob_source.open(source, position, self._stop, length=relays.size)
                    offset = stream.start
                    with contextlib.closing(stream):
                        async for data in stream.batches():
                            relays.line.counters.take(len(data), near=stream.near)
                            # If the source ignores Range, pass on only the interval.
                            piece = data[max(0, position - offset) : max(0, self._stop - offset)]
                            offset += len(data)
                            if piece:
                                position += len(piece)
                                yield piece
                                patience.hear(steady())
                            if position >= self._stop:
                                return
                            await asyncio.sleep(relays.line.rate_limit.spend(len(data), live=True, now=steady()))
            except UpstreamError as error:
                now = steady()
                silent = now - patience.heard
                if source is not None:
                    relays.blob_source.failed(source, error, silent_s=silent)
                relays.line.counters.retries += 1
                if patience.fail(error, now):
                    raise
                _log.info("passing through: %s; trying again (%.1f s without a byte)", error, silent)
                await asyncio.sleep(max(patience.quiet_s(now), backoff_s(patience.failures)))


class Relay:
    """One reader's position in the interval `[start, stop)`. `close` it, whatever happens."""

    def __init__(self, relays: Relays, start: int, stop: int) -> None:
        self.position = start
        self.stop = stop
        self._relays = relays
        self._line: _Line | None = None

    async def next(self, limit: int, wait_s: float) -> bytes:
        """Return at most `limit` of the next bytes; b"" if none came within `wait_s`.

        Raises UpstreamError if upstream has failed for good.
        """
        if self._line is not None and self._line.error is None and not self._line.offers(self.position):
            self._leave()
        if self._line is None:
            self._line = self._relays.join(self)
        line = self._line
        data = line.read(self.position, min(limit, self.stop - self.position))
        if not data and line.error is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await line.changed.wait()
            data = line.read(self.position, min(limit, self.stop - self.position))
        if not data and line.error is not None:
            raise line.error
        self.position += len(data)
        line.moved()
        return data

    def close(self) -> None:
        """Leave the response."""
        self._leave()

    def _leave(self) -> None:
        if self._line is not None:
            self._line.leave(self)
            self._line = None
