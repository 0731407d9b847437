"""Send a body from a thread: the bytes come from a reader of the event loop, and go to an outlet.

The reader and everything behind it belong to the event loop. A thread asks it through `LoopReader`, which takes as much
as is there, and asks again only when that has been sent: once for a stored blob. Descriptors stay open because the
reader holds them; it is closed when the thread is done.

Invariant: threads touch nothing that belongs to the loop. A body is sent whole, or stops short and `Sending` says why.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from pullthrough.core.errors import CacheError
from pullthrough.delivery.outlets import ClientGone, Outlet, Unreadable
from pullthrough.recording.reader import WAIT_S, FileSpan, Memory, Pending, Reader

SPAN: Final = 8 << 20
"""Bytes of a recording that are taken at once: small enough that a slow client is not mistaken for a stalled one."""


class LoopCalls:
    """The event loop, as a thread sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def wait[T](
        self, work: Coroutine[Any, Any, T], is_gone: Callable[[], bool], discard: Callable[[T], None] | None = None
    ) -> T:
        """Run `work` on the loop; return or raise its outcome. Raises ClientGone as soon as `is_gone`; the work goes
        on.

        `discard` is called on the loop with a result that came too late.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(WAIT_S)
            except TimeoutError:
                if future.done():
                    return future.result()
            if is_gone():
                future.add_done_callback(lambda done: _discard(done, discard))
                raise ClientGone("client disconnected")

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Call this on the loop soon."""
        self._loop.call_soon_threadsafe(call, *arguments)


class LoopReader:
    """A reader, as a thread sees it."""

    def __init__(self, reader: Reader, calls: LoopCalls, first: FileSpan | Memory | None = None) -> None:
        """`first` is what was taken from the reader before."""
        self._reader = reader
        self._calls = calls
        self._first = first
        self._left = reader.stop - reader.start

    def next(self, is_gone: Callable[[], bool], wait_s: float) -> FileSpan | Memory | Pending | None:
        """Return the reader's next bytes; None when there are no more."""
        if self._left <= 0:
            return None
        span = self._first or self._calls.wait(take(self._reader, wait_s), is_gone)
        self._first = None
        match span:
            case FileSpan():
                self._left -= span.stop - span.start
            case Memory():
                self._left -= len(span.data)
        return span

    def wait_whole(self, is_gone: Callable[[], bool]) -> None:
        """Return when all bytes are here."""
        while not self._calls.wait(self._take_whole(), is_gone):
            if is_gone():
                raise ClientGone("client disconnected")

    async def _take_whole(self) -> bool:
        """Return whether all bytes are here, having taken the first of them. Called on the loop."""
        if is_whole := await self._reader.whole(WAIT_S):
            span = await take(self._reader, 0.0)
            self._first = None if isinstance(span, Pending) else span
        return is_whole

    def on_unreadable(self) -> None:
        """The last span could not be read."""
        self._calls.soon(self._reader.on_unreadable)


@dataclass
class Sending:
    """The progress of a body."""

    sent: int = 0
    problem: str = ""
    """Why it ended early; "" if it did not."""


async def take(reader: Reader, wait_s: float) -> FileSpan | Memory | Pending:
    """Return what the reader has next, all of it if the blob is complete. Called on the loop."""
    return await reader.next(reader.stop - reader.start if reader.is_complete else SPAN, wait_s)


def send(reader: LoopReader, out: Outlet, sending: Sending) -> None:
    """Send all that the reader has. No error of the client, the network or the reader is raised: `sending` tells."""
    before = out.sent
    wait_s = 0.0
    try:
        while (span := reader.next(out.is_gone, wait_s)) is not None:
            match span:
                case FileSpan():
                    out.put_file(span.descriptor, span.start, span.stop)
                case Memory():
                    out.put(span.data)
                case Pending():
                    out.flush()
                    if out.is_gone():
                        raise ClientGone("client disconnected")
                    wait_s = WAIT_S
        out.flush()
    except Unreadable as error:
        reader.on_unreadable()
        sending.problem = str(error)
    except (CacheError, OSError) as error:
        sending.problem = str(error)
    finally:
        sending.sent += out.sent - before


def _discard[T](done: Future[T], discard: Callable[[T], None] | None) -> None:
    if discard is not None and not done.cancelled() and done.exception() is None:
        discard(done.result())
