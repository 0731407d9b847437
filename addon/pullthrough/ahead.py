"""Record blobs that no client has asked for yet, for everybody.

Invariant: a blob comes in through its one recording, like a client's, and only from where an anonymous request gets
it. Knows no manifest and nobody who waits.
"""

from collections.abc import Awaitable, Callable
from functools import partial

from pullthrough.datastream import Source
from pullthrough.digest import Digest
from pullthrough.recorder import Recorder
from pullthrough.recording import Recording
from pullthrough.store import Store


class Ahead:
    """Of all registries."""

    def __init__(
        self, store: Store, recorder: Recorder, source: Callable[[str, str, Digest], Awaitable[Source]]
    ) -> None:
        """`source` obtains a blob's public source from (host, repository)."""
        self._store = store
        self._recorder = recorder
        self._source = source

    async def begin(self, host: str, repository: str, digest: Digest) -> Recording | None:
        """The recording of the blob, completed though nobody reads; None where it is here.

        Then it is public by upstream's word: UpstreamError if upstream gives it to nobody.
        """
        if self._store.held(digest) is None:
            return self._recorder.open(digest, obtain=partial(self._source, host, repository, digest), wanted=True)
        known = self._store.blob(digest)
        if known is None or not known.public:
            await self._source(host, repository, digest)
        return None
