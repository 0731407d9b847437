"""Record blobs that no client has asked for yet, for everybody.

Invariant: a blob comes in through its one recording, like a client's, and only from where an anonymous request gets
it.
"""

from collections.abc import Awaitable, Callable
from functools import partial

from pullthrough.config.settings import Settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError
from pullthrough.core.records import ManifestRecord
from pullthrough.recording.recorder import Recorder
from pullthrough.recording.recording import Recording
from pullthrough.store.store import Store
from pullthrough.upstream.data_stream import Source


class Ahead:
    """Of all registries."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        source: Callable[[str, str, Digest], Awaitable[Source]],
    ) -> None:
        """`source` obtains a blob's public source from (host, repository)."""
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._source = source

    async def begin(self, host: str, repository: str, digest: Digest) -> Recording | None:
        """Return the recording of the blob, completed though nobody reads; None where it is here.

        Then it is public by upstream's word: UpstreamError if upstream gives it to nobody.
        """
        host = self._settings.asked(host)
        if self._store.held(digest) is None:
            return self._recorder.open(digest, obtain=partial(self._source, host, repository, digest), wanted=True)
        known = self._store.blob(digest)
        if known is None or not known.public:
            await self._source(host, repository, digest)
        return None

    async def child(self, host: str, repository: str, digest: Digest) -> ManifestRecord:
        """Return the manifest that the blob is, once it is here. Raises CacheError if it does not come, or is none."""
        if (recording := await self.begin(host, repository, digest)) is not None:
            await recording.over.wait()
        record = self._store.read_manifest(digest)
        if record is None:
            raise CacheError(f"expected {digest} to be a manifest, as a list says, got none; the cache's log has more")
        return record
