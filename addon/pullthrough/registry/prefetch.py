"""Record the layers that a client will ask for next: an Ollama pulls the layers of a manifest one after another.

Invariant: only public manifests are followed, one blob at a time per manifest, and never a model of tensors, whose
blobs either go past the proxy (x/transfer ignores HTTPS_PROXY) or are requested many at a time. Of a list only the
child that the client pulls is followed; where several children list the blob and continue differently, that cannot be
known. A failure is left to the client's own request.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

from pullthrough.core.digest import Digest
from pullthrough.core.records import ManifestRecord, Series, by_model, canonical
from pullthrough.library.expected_sizes import public_sizes
from pullthrough.recording.recorder import Recorder
from pullthrough.runtime.clock import Moment
from pullthrough.store.store import Store
from pullthrough.upstream.data_stream import Source


class Prefetcher:
    """The next layers of all manifests that are being pulled."""

    def __init__(
        self,
        store: Store,
        recorder: Recorder,
        source: Callable[[Digest], Awaitable[Source]],
        known: Callable[[Digest], Source | None] = lambda _digest: None,
    ) -> None:
        """`source` obtains a public blob's source from the registry; `known` returns one that was obtained before."""
        self._known = known
        self._store = store
        self._recorder = recorder
        self._source = source
        self._tasks: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._whole: dict[tuple[str, str, str], Moment] = {}
        """The models that were complete, and the store's change number at that time."""

    def follow(self, host: str, repository: str, digest: Digest) -> None:
        """Record what the manifest lists after this blob, which a client has asked for."""
        place = (canonical(host), repository)
        for name, records in by_model(self._store.manifests_of(*place)).items():
            model = (*place, name.reference)
            if self._whole.get(model) != self._store.changes.now() and any(record.lists(digest) for record in records):
                self._follow(model, records, digest)

    def _follow(self, model: tuple[str, str, str], records: Sequence[ManifestRecord], digest: Digest) -> None:
        known = self._store.children()
        every = [series for record in records for series in record.series(known)]
        if all(series.is_of_tensors or all(map(self._store.held, series.digests)) for series in every):
            self._whole[model] = self._store.changes.now()
            return
        found = [series for series in every if digest in series.digests]
        if not found or (len(found) > 1 and len({self._missing_behind(digest, series) for series in found}) > 1):
            return
        series = found[0]
        key = (*model[:2], series.key)
        if key in self._tasks or series.is_of_tensors:
            return
        task = asyncio.get_running_loop().create_task(self._record(series.behind(digest)))
        self._tasks[key] = task
        task.add_done_callback(partial(self._ended, key))

    def _missing_behind(self, digest: Digest, series: Series) -> tuple[Digest, ...]:
        return tuple(each for each in series.behind(digest) if self._store.held(each) is None)

    async def _record(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            if self._store.held(digest) is None and self._recorder.find(digest) is None:
                source = self._known(digest)
                if source is not None:
                    source = replace(source, sizes=public_sizes(self._store, digest))
                recording = self._recorder.open(
                    digest, obtain=partial(self._source, digest), source=source, wanted=True
                )
                await recording.over.wait()

    def _ended(self, key: tuple[str, str, str], _task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)

    async def close(self) -> None:
        """Stop following; recordings that run belong to the recorder."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
