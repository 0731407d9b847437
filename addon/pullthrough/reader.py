"""Hand out the bytes of one interval of one blob, whether it is complete or being recorded.

Invariant: what is handed out lies in `[position, stop)` of the blob, in order and without gaps; a span names bytes
that are written and stay readable until `close`. Two mouths use it: the stream layer and the blob server.
Knows no HTTP and no upstream: when bytes are missing it waits for the recording.
"""

from dataclasses import dataclass

from pullthrough.ingest import SharedFile
from pullthrough.recording import Cursor, Recording


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes `[start, stop)` of an open file, to be sent or read by position."""

    descriptor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pending:
    """Nothing yet: look whether your client is still there, then ask again."""


class Reader:
    """The interval `[start, stop)` of a blob of `size` bytes. `close` it, whatever happens."""

    def __init__(self, start: int, stop: int, *, file: SharedFile | None = None, recording: Recording | None = None):
        """Exactly one of `file` (acquired for this reader; a complete blob) and `recording`."""
        self.start = start
        self.stop = stop
        self.position = start
        self._file = file
        self._cursor: Cursor | None = None
        if recording is not None:
            self._cursor = recording.attach(start, stop)

    @property
    def done(self) -> bool:
        return self.position >= self.stop

    async def next(self, limit: int, wait_s: float) -> FileSpan | Pending:
        """At most `limit` bytes from where the last span ended; Pending when there are none within `wait_s`.

        UpstreamError or StoreError when the recording has failed for good: what was handed out so far is all
        there is.
        """
        if self._file is not None:
            span = FileSpan(self._file.descriptor, self.position, min(self.position + limit, self.stop))
        else:
            assert self._cursor is not None
            present = await self._cursor.wait(wait_s)
            if present <= self.position:
                return Pending()
            stop = min(self.position + limit, present, self.stop)
            span = FileSpan(self._cursor.descriptor, self.position, stop)
            self._cursor.advance(stop)
        self.position = span.stop
        return span

    def close(self) -> None:
        """Let go of the file or the recording. May be called twice."""
        if self._file is not None:
            self._file.release()
            self._file = None
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None
