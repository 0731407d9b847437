"""prefetch: what is recorded ahead, and how little a request for a model that is all here costs."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.manifest_json import LIST_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.prefetch import Prefetcher
from pullthrough.runtime.clock import Epoch
from pullthrough.store.store import Store
from pullthrough.upstream.data_stream import Source

PLACE = ("registry.ollama.ai", "library/m")
A, B, C, D = (Digest(letter * 64) for letter in "abcd")


def manifest(media_type: str = "application/vnd.ollama.image.model") -> ManifestRecord:
    layers = [{"mediaType": media_type, "digest": digest, "size": 1} for digest in (A, B, C)]
    record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "", now=1.0)
    assert record is not None
    return record


class Scene:
    """A store with one model, and a recorder whose recordings are over at once."""

    def __init__(
        self,
        record: ManifestRecord,
        *here: Digest,
        listed: ManifestRecord | None = None,
        children: dict[Digest, ManifestRecord] | None = None,
    ) -> None:
        name = Name(*PLACE, "latest")
        manifests = {name: record} | ({name.twin: listed} if listed is not None else {})
        self.here = set(here)
        self.looks = 0
        self.recorded: list[Digest] = []
        self.store = SimpleNamespace(
            manifests_of=lambda *_: manifests, children=lambda: children or {}, held=self._held, changes=Epoch()
        )
        recorder = SimpleNamespace(find=lambda _: None, open=self._open)
        self.prefetcher = Prefetcher(cast(Store, self.store), cast(Recorder, recorder), self._source)

    def _held(self, digest: Digest) -> tuple[int] | None:
        self.looks += 1
        return (1,) if digest in self.here else None

    def _open(self, digest: Digest, **_: Any) -> Any:
        self.recorded.append(digest)
        self.here.add(digest)
        self.store.changes.advance()
        over = asyncio.Event()
        over.set()
        return SimpleNamespace(over=over)

    async def _source(self, digest: Digest) -> Source:
        raise AssertionError(f"expected a recording that needs no source, got one of {digest}")

    async def follow(self, digest: Digest) -> None:
        self.prefetcher.follow(*PLACE, digest)
        await asyncio.gather(*self.prefetcher._tasks.values())
        await asyncio.sleep(0)  # what is called when a task is done


def test_what_lies_behind_is_recorded() -> None:
    """In the manifest's order, and nothing that is here, before it, or of another model."""

    async def run() -> None:
        scene = Scene(manifest(), B)
        await scene.follow(D)
        assert scene.recorded == []
        await scene.follow(B)
        assert scene.recorded == [C]
        await scene.follow(A)
        assert scene.recorded == [C]

    asyncio.run(run())


def test_tensors_are_not_followed() -> None:
    """They are asked for many at a time."""

    async def run() -> None:
        scene = Scene(manifest("application/vnd.ollama.image.tensor"))
        await scene.follow(A)
        assert scene.recorded == []

    asyncio.run(run())


def test_a_model_that_is_all_here_is_looked_at_once() -> None:
    """Until something changes: a file is asked for in many parts, and a model may have thousands."""

    async def run() -> None:
        scene = Scene(manifest(), A, B, C)
        for digest in (A, A, B, C):
            await scene.follow(digest)
        assert (scene.looks, scene.recorded) == (3, [])
        scene.here.discard(C)
        scene.store.changes.advance()
        await scene.follow(A)
        assert scene.recorded == [C]

    asyncio.run(run())


def list_of(*children: ManifestRecord | str) -> ManifestRecord:
    """A list of references and of manifests in place."""
    entries = [
        f'{{"digest": "sha256:{child.digest}"}}' if isinstance(child, ManifestRecord) else child for child in children
    ]
    body = f'{{"mediaType": "{LIST_TYPE}", "manifests": [{", ".join(entries)}]}}'
    record = ManifestRecord.parse(body.encode(), "", now=1.0)
    assert record is not None
    for child in children:
        if isinstance(child, ManifestRecord):
            record = record.grown(child)
    return record


def layered(*digests: Digest, media_type: str = "application/vnd.ollama.image.model") -> ManifestRecord:
    layers = [{"mediaType": media_type, "digest": digest, "size": 1} for digest in digests]
    record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "", now=1.0)
    assert record is not None
    return record


E = Digest("e" * 64)
TENSORS_TYPE = "application/vnd.ollama.image.tensor"
FIRST, SECOND, TENSORS = layered(A, B, C), layered(D, B, E), layered(E, C, media_type=TENSORS_TYPE)


def scene(plain: ManifestRecord, lists: ManifestRecord, *known: ManifestRecord) -> Scene:
    return Scene(plain, listed=lists, children={Digest(child.digest): child for child in known})


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        pytest.param(A, [B, C], id="of the first child"),
        pytest.param(D, [B, E], id="of the second"),
        pytest.param(B, [], id="of both, which go on differently"),
        pytest.param(C, [], id="the last one"),
        pytest.param(Digest(FIRST.digest), [], id="a child"),
        pytest.param(Digest("0" * 64), [], id="of neither"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True], ids=["references", "in place"])
def test_one_child_is_followed(asked: Digest, recorded: list[Digest], in_place: bool) -> None:
    """The one that lists what was asked for, never another; a layer that several list says nothing."""

    async def run() -> None:
        children = [child.body.decode() if in_place else child for child in (FIRST, SECOND)]
        it = scene(FIRST, list_of(*children), FIRST, SECOND)
        await it.follow(asked)
        assert it.recorded == recorded

    asyncio.run(run())


def test_what_is_left_is_the_same() -> None:
    """Where all that list the blob go on alike, as far as it is not here, there is nothing to choose."""

    async def run() -> None:
        it = scene(layered(A, B, C), list_of(layered(A, B, D, C)), layered(A, B, D, C))
        await it.follow(A)
        assert it.recorded == []
        it.here.add(D)
        await it.follow(A)
        assert it.recorded == [B, C]

    asyncio.run(run())


def test_a_child_of_tensors_is_not_followed() -> None:
    """The others are."""

    async def run() -> None:
        it = scene(FIRST, list_of(FIRST, TENSORS), FIRST, TENSORS)
        await it.follow(E)
        assert it.recorded == []
        await it.follow(A)
        assert it.recorded == [B, C]

    asyncio.run(run())


def test_a_child_that_is_not_known_is_not_missed() -> None:
    """What a list refers to and nobody has asked for is no layer."""

    async def run() -> None:
        it = scene(FIRST, list_of(FIRST, SECOND), FIRST)
        await it.follow(D)
        assert it.recorded == []

    asyncio.run(run())
