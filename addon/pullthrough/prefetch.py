"""Record the layers that a client will ask for next: an Ollama pulls the layers of a manifest one after another.

Invariant: only public manifests are followed, one blob at a time per manifest, and never a model of tensors, whose
blobs either pass by (x/transfer ignores HTTPS_PROXY) or are asked for many at a time. What fails is left to the
client's own request. Knows no answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from pullthrough.datastream import Source
from pullthrough.digest import Digest
from pullthrough.recorder import Recorder
from pullthrough.store import Store


class Prefetcher:
    """The layers to come, of all manifests that are being pulled."""

    def __init__(
        self,
        store: Store,
        recorder: Recorder,
        source: Callable[[Digest], Awaitable[Source]],
        known: Callable[[Digest], Source | None] = lambda _digest: None,
    ) -> None:
        """`source` obtains a public blob's source from the registry; `known` is one that has been obtained already."""
        self._known = known
        self._store = store
        self._recorder = recorder
        self._source = source
        self._tasks: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._whole: dict[tuple[str, str, str], int] = {}
        """The manifests of which every blob was here, and how often the store had changed then."""

    def follow(self, host: str, repository: str, digest: Digest) -> None:
        """A client has asked for this blob: record what its manifest lists behind it."""
        for record in self._store.manifests_of(host, repository):
            key = (host, repository, record.digest)
            if key in self._tasks or self._whole.get(key) == self._store.changes or not record.lists(digest):
                continue
            listed = record.digests
            if record.is_of_tensors or all(map(self._store.held, listed)):
                self._whole[key] = self._store.changes
                continue
            task = asyncio.get_running_loop().create_task(self._record(listed[listed.index(digest) + 1 :]))
            self._tasks[key] = task
            task.add_done_callback(partial(self._ended, key))

    async def _record(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            if self._store.held(digest) is None and self._recorder.find(digest) is None:
                recording = self._recorder.open(
                    digest, obtain=partial(self._source, digest), source=self._known(digest), wanted=True
                )
                await recording.over.wait()

    def _ended(self, key: tuple[str, str, str], _task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)

    async def close(self) -> None:
        """Follow nothing any more; what has begun is the recorder's."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
