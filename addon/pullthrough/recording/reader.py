"""Hand out the bytes of one interval of one blob, whether it is complete, being recorded, or cannot be kept.

Invariant: what is handed out lies in `[position, stop)` of the blob, in order and without gaps; a span names bytes
that are written and stay readable until `close`. Threads use it through `byte_sender.LoopReader`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pullthrough.core.errors import StoreUnwritable
from pullthrough.recording.cursor import Cursor
from pullthrough.recording.recording import Recording
from pullthrough.recording.relay import Relay
from pullthrough.runtime.shared_file import SharedFile

WAIT_S: Final = 1.0
"""How long a sender waits for missing bytes before it checks that its client is still there."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes `[start, stop)` of an open file, to be sent or read by position."""

    descriptor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that are in no file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pending:
    """No bytes yet: the sender checks that its client is still there, then asks again."""


class Reader:
    """The interval `[start, stop)` of a blob of `size` bytes. `close` it, whatever happens."""

    def __init__(
        self,
        start: int,
        stop: int,
        *,
        file: SharedFile | None = None,
        recording: Recording | None = None,
        on_unreadable: Callable[[], None] = lambda: None,
    ):
        """Give exactly one of `file` (acquired for this reader; a complete blob) and `recording`.

        The sender calls `on_unreadable` if a span of the file cannot be read.
        """
        self.on_unreadable = on_unreadable
        self.on_close: Callable[[], None] | None = None
        """Called once, when the reader is closed."""
        self.sent = 0
        """Bytes sent to the client; the sender sets this before it closes the reader."""
        self.start = start
        self.stop = stop
        self.position = start
        self._file = file
        self._recording = recording
        self._cursor: Cursor | None = None
        self._relay: Relay | None = None
        if recording is not None:
            try:
                self._cursor = recording.attach(start, stop)
            except StoreUnwritable:
                self._pass_through()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here: then `next` never waits, and can return the whole interval at once."""
        return self._file is not None

    @property
    def done(self) -> bool:
        return self.position >= self.stop

    @property
    def passes_through(self) -> bool:
        """Whether the bytes bypass the disk, without a check of their digest."""
        return self._relay is not None

    async def next(self, limit: int, wait_s: float) -> FileSpan | Memory | Pending:
        """Return at most `limit` bytes after the last ones; Pending if none come within `wait_s`.

        Raises UpstreamError or StoreError if the recording has failed for good: no more bytes will come.
        """
        if self._file is not None:
            return self._span(self._file, min(self.position + limit, self.stop))
        if self._cursor is not None:
            try:
                present = await self._cursor.wait(wait_s)
            except StoreUnwritable:
                self._pass_through()
            else:
                if present <= self.position:
                    return Pending()
                span = self._span(self._cursor.file, min(self.position + limit, present, self.stop))
                self._cursor.advance(self.position)
                return span
        assert self._relay is not None
        data = await self._relay.next(limit, wait_s)
        self.position += len(data)
        return Memory(data) if data else Pending()

    async def whole(self, wait_s: float) -> bool:
        """Return whether there is nothing to wait for: all bytes are here, or are passed through, past the disk.

        Waits up to `wait_s` for more of them. Raises what `next` raises.
        """
        if self._cursor is None:
            return True
        try:
            present = min(await self._cursor.wait(wait_s), self.stop)
        except StoreUnwritable:
            self._pass_through()
            return True
        if present > self._cursor.position:
            self._cursor.advance(present)
        if present < self.stop:
            return False
        # Check again from the beginning: the recording may have been begun again meanwhile.
        self._cursor.advance(self.position)
        return self._cursor.present >= self.stop

    def _span(self, file: SharedFile, stop: int) -> FileSpan:
        place, stop = file.locate(self.position, stop)
        span = FileSpan(file.descriptor, place, place + stop - self.position)
        self.position = stop
        return span

    def _pass_through(self) -> None:
        """Take the rest from upstream, past the unusable disk: a pull never fails because of our disk."""
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None
        assert self._recording is not None
        self._relay = self._recording.relay(self.position, self.stop)

    def close(self) -> None:
        """Release the file or the recording. May be called twice."""
        if self.on_close is not None:
            on_close, self.on_close = self.on_close, None
            on_close()
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self._file is not None:
            self._file.release()
            self._file = None
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None
