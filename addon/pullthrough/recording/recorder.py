"""Record blobs: the one door through which blob bytes come in from upstream.

Invariant: there is at most one recording per digest, whoever asks.
"""

import asyncio
from collections.abc import KeysView

from pullthrough.core.digest import Digest
from pullthrough.recording.blob_source import BlobSource, Obtain
from pullthrough.recording.recording import Recording
from pullthrough.recording.workroom import Workroom
from pullthrough.upstream.data_stream import DataStream, Source


class Recorder:
    """All recordings of the daemon."""

    def __init__(self, room: Workroom) -> None:
        self.counters = room.counters
        self._room = room
        self._recordings: dict[Digest, Recording] = {}
        self._closing: dict[Digest, Recording] = {}

    def find(self, digest: Digest) -> Recording | None:
        """Return the recording of `digest` that runs now."""
        return self._recordings.get(digest)

    def recordings(self) -> list[Recording]:
        """Return all that run now."""
        return list(self._recordings.values())

    @property
    def running(self) -> KeysView[Digest]:
        """What is being recorded, at any time one looks."""
        return self._recordings.keys()

    def open(
        self,
        digest: Digest,
        *,
        obtain: Obtain,
        source: Source | None = None,
        stream: DataStream | None = None,
        wanted: bool = False,
        look: int = 0,
    ) -> Recording:
        """Return the recording of `digest`: the running one, or a new one.

        `obtain` gets a source again when the present one has expired; `stream` is a response whose body is the blob
        from byte 0, and belongs to the recording from here on. `wanted` has it completed though nobody
        reads; of any other new one somebody surely wants the first `look` bytes.
        """
        recording = self._recordings.get(digest)
        if recording is None:
            blob_source = BlobSource(self._room.upstream, obtain, source, self._room.nearby(digest))
            recording = Recording(self._room, digest, blob_source, on_end=self._ended, wanted=wanted, look=look)
            # Registered before it starts: the loop runs new tasks eagerly, and the next caller must find it.
            self._recordings[digest] = recording
            recording.start(stream, after=self._closing.get(digest))
            return recording
        if wanted:
            recording.want()
        if source is not None:
            recording.blob_source.offer(source, obtain)
        if stream is not None:
            stream.close()
        return recording

    def _ended(self, recording: Recording) -> None:
        if self._recordings.get(recording.digest) is recording:
            del self._recordings[recording.digest]
        self._closing[recording.digest] = recording
        asyncio.get_running_loop().call_later(60, self._closed, recording)

    def _closed(self, recording: Recording) -> None:
        if self._closing.get(recording.digest) is recording:
            del self._closing[recording.digest]

    async def close(self) -> None:
        """End every recording, keeping what is present."""
        await asyncio.gather(*(recording.stop() for recording in list(self._recordings.values())))
        await asyncio.gather(*(recording.closed() for recording in list(self._closing.values())))
