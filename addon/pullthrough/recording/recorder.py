"""Record blobs: all blob bytes from upstream come in here.

Invariant: there is at most one recording per digest, however many clients request it.
"""

import asyncio
from collections.abc import KeysView

from pullthrough.config.settings import Finish
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError
from pullthrough.core.records import ManifestRecord
from pullthrough.fleet.lease_holder import LeaseHolder
from pullthrough.fleet.nearby_sources import NearbySources
from pullthrough.fleet.tier import Tier
from pullthrough.library.eviction import Evictor
from pullthrough.recording.blob_source import BlobSource, Obtain
from pullthrough.recording.plan import Line
from pullthrough.recording.recording import Recording
from pullthrough.recording.room import Disk, Room
from pullthrough.runtime.executors import Threads
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.data_stream import DataStream, Source


class Recorder:
    """All recordings of the daemon."""

    def __init__(
        self,
        store: Store,
        evictor: Evictor,
        upstream: Upstream,
        threads: Threads,
        line: Line,
        finish: Finish,
        fleet: tuple[Tier, LeaseHolder] | None = None,
    ) -> None:
        self.counters = line.counters
        self._store = store
        self._disk = Disk(store, evictor, threads)
        self._upstream = upstream
        self._line = line
        self._finish = finish
        self._fleet = fleet
        self._recordings: dict[Digest, Recording] = {}
        self._closing: dict[Digest, Recording] = {}

    def find(self, digest: Digest) -> Recording | None:
        """Return the running recording of `digest`, or None."""
        return self._recordings.get(digest)

    def recordings(self) -> list[Recording]:
        """Return all running recordings."""
        return list(self._recordings.values())

    @property
    def running(self) -> KeysView[Digest]:
        """The digests being recorded: a live view."""
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

        `obtain` gets a new source when the current one has expired; `stream` is a response whose body is the blob
        from byte 0, and belongs to the recording from here on. `wanted` completes the blob even without readers;
        otherwise the first `look` bytes of a new recording are surely wanted.
        """
        recording = self._recordings.get(digest)
        if recording is None:
            nearby = NearbySources(*self._fleet, self._store, digest) if self._fleet is not None else None
            blob_source = BlobSource(self._upstream, obtain, source, nearby)
            room = Room(self._disk, digest)
            recording = Recording(
                digest, blob_source, room, self._line, self._finish, on_end=self._ended, wanted=wanted, look=look
            )
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

    async def open_unasked(self, digest: Digest, obtain: Obtain) -> Recording | None:
        """Record a blob that no client has requested yet; returns None if it is here already.

        `obtain` gets a source by an anonymous request, which makes the blob public if upstream grants it. Raises
        UpstreamError if upstream refuses.
        """
        if self._store.held(digest) is None:
            return self.open(digest, obtain=obtain, wanted=True)
        known = self._store.blob(digest)
        if known is None or not known.public:
            await obtain()
        return None

    async def read_manifest(self, digest: Digest, obtain: Obtain) -> ManifestRecord:
        """Record a blob as `open_unasked` does, and parse it as a manifest. Raises CacheError if it is not one."""
        if (recording := await self.open_unasked(digest, obtain)) is not None:
            await recording.over.wait()
        record = self._store.read_manifest(digest)
        if record is None:
            raise CacheError(f"expected {digest} to be a manifest, as a list says, got none; the cache's log has more")
        return record

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
