"""Pins that were set while the cache runs: the keeper and the refresher heed them like the option's."""

import asyncio
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import SourceDistrusted, StoreUnwritable
from pullthrough.core.manifest_json import LIST_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.eviction import SMALL, Evictor
from pullthrough.registry.refresh import Refresher
from pullthrough.runtime.executors import Threads
from pullthrough.store.store import Store

NAME = Name.parse("llama3.2")
DATA = b"x" * 1000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with one model of 1000 bytes, pulled in 1970."""
    store = Store.open(tmp_path / "store")
    digest = Digest(sha256(DATA).hexdigest())
    ingest = store.ingest(digest)
    ingest.begin(len(DATA))
    ingest.write_at(0, DATA)
    ingest.close()
    store.publish(ingest.digest, store.place(ingest.digest, ingest.partial_path), now=1.0)
    ingest.forget()
    body = json.dumps({"layers": [{"mediaType": "x", "digest": str(digest), "size": len(DATA)}]}).encode()
    record = ManifestRecord.parse(body, "application/json", now=1.0)
    assert record is not None
    store.put_manifest(NAME, record)
    yield store
    store.close()


@pytest.mark.parametrize("pinned", [True, False])
def test_the_keeper(store: Store, pinned: bool) -> None:
    """A pinned model is not evicted: what would need its room is not recorded."""
    if pinned:
        store.ledger.pin("llama3*")

    async def reserve() -> None:
        threads = Threads()
        try:
            await Evictor(store, threads, max_size=1500, min_free=0).reserve(Digest("0" * 64), 1000)
        finally:
            threads.close()

    if pinned:
        with pytest.raises(StoreUnwritable, match="nothing left to evict"):
            asyncio.run(reserve())
    else:
        asyncio.run(reserve())
    assert (store.manifest(NAME) is not None) == pinned


def reserve(store: Store, digest: Digest, size: int, **bounds: int) -> None:
    async def work() -> None:
        threads = Threads()
        try:
            await Evictor(store, threads, **{"max_size": 1500, "min_free": 0, **bounds}).reserve(digest, size)
        finally:
            threads.close()

    asyncio.run(work())


def put_large(store: Store, name: str, large: int) -> Digest:
    """A model of a large blob and a config, neither of which is here; the config."""
    config = Digest("c" * 64)
    layers = [{"digest": str(Digest("d" * 64)), "size": large}, {"digest": str(config), "size": 71}]
    record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "application/json", now=2.0)
    assert record is not None
    store.put_manifest(Name.parse(name), record)
    return config


def test_nothing_goes_for_a_model_that_cannot_fit(store: Store) -> None:
    """The first of its blobs that is asked for is small, and the others would not find room after it."""
    config = put_large(store, "large", 2000)
    with pytest.raises(StoreUnwritable, match=r"expected room for 2\.0 KB within the bounds"):
        reserve(store, config, 71, max_size=1050)
    assert store.manifest(NAME) is not None
    put_large(store, "smaller", 900)
    reserve(store, config, 71, max_size=1050)
    assert store.manifest(NAME) is None


def test_leftovers_count_and_go_first(store: Store) -> None:
    """What is in quarantine, then what recordings have left; a model that was pulled long ago stays."""
    (store.folder / "quarantine" / f"sha256-{'a' * 64}-1").write_bytes(b"x" * 8192)
    ingest = store.ingest(Digest("b" * 64))
    ingest.begin(8192)
    ingest.write_at(0, b"x" * 8192)
    ingest.close()
    bound = 1000 + 2 * 8192 + 10
    reserve(store, Digest("0" * 64), 10, max_size=bound)
    assert len(list((store.folder / "quarantine").iterdir())) == 1
    reserve(store, Digest("0" * 64), 11, max_size=bound)
    assert not list((store.folder / "quarantine").iterdir())
    assert store.partials()
    reserve(store, Digest("0" * 64), 8192 + 11, max_size=bound)
    assert not store.partials()
    assert store.manifest(NAME) is not None


def test_the_keeper_takes_both_representations(store: Store) -> None:
    """A model goes whole, by when either was pulled last."""
    record = store.manifest(NAME)
    assert record is not None
    store.put_manifest(NAME.twin, record)
    store.touch(NAME.twin, 9.0)
    store.put_manifest(other := Name.parse("other"), record._replace(pulled=5.0))

    async def reserve() -> None:
        threads = Threads()
        try:
            await Evictor(store, threads, max_size=1500, min_free=0).reserve(Digest("0" * 64), 1000)
        finally:
            threads.close()

    store.ledger.pin("llama3*")
    with pytest.raises(StoreUnwritable):
        asyncio.run(reserve())
    assert set(store.manifests()) == {NAME, NAME.twin, other}
    store.ledger.unpin("llama3*")
    asyncio.run(reserve())
    assert dict(store.manifests()) == {}


def listing(*runners: str) -> ManifestRecord:
    """A list whose children are named after their runners."""
    entries = [{"digest": str(digest_of(runner)), "runner": runner} for runner in runners]
    body = json.dumps({"mediaType": LIST_TYPE, "manifests": entries}).encode()
    record = ManifestRecord.parse(body, LIST_TYPE, now=1.0)
    assert record is not None
    return record


def digest_of(text: str) -> Digest:
    return Digest(sha256(text.encode()).hexdigest())


def plain(text: str, **more: str) -> ManifestRecord:
    layers = [{"mediaType": "x", "digest": str(digest_of(text)), "size": 1}]
    record = ManifestRecord.parse(json.dumps({"layers": layers, **more}).encode(), "", now=1.0)
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("stored", "known", "moved", "wanted"),
    [
        pytest.param(plain("old"), (), plain("new"), ["new"], id="a manifest"),
        pytest.param(plain("old"), (), listing("mlx", "ggml", "llamacpp"), ["llamacpp of"], id="has become a list"),
        pytest.param(plain("old", runner="GGML"), (), listing("llamacpp", "ggml"), ["ggml of"], id="of a runner"),
        pytest.param(plain("old"), (), listing("odd"), ["odd of"], id="a list of one"),
        pytest.param(plain("old"), (), listing(), [], id="an empty list"),
        pytest.param(
            listing("ggml", "mlx"), ("mlx",), listing("ggml", "mlx"), ["mlx of"], id="the child that was here"
        ),
        pytest.param(
            listing("ggml", "mlx"), ("mlx", "ggml"), listing("ggml", "mlx"), ["ggml of", "mlx of"], id="both children"
        ),
        pytest.param(listing("mlx"), ("mlx",), listing("ggml", "llamacpp"), ["llamacpp of"], id="one that has gone"),
        pytest.param(listing("mlx"), ("mlx",), plain("new"), ["new"], id="is a manifest again"),
    ],
)
def test_what_a_moved_tag_needs(
    tmp_path: Path, stored: ManifestRecord, known: tuple[str, ...], moved: ManifestRecord, wanted: list[str]
) -> None:
    """The layers of those children whose runners have been pulled, which are recorded to see what they list."""
    names = {digest_of(runner): runner for runner in ("ggml", "mlx", "llamacpp", "odd")}
    recorded: list[str] = []

    async def read_manifest(digest: Digest, obtain: Any) -> ManifestRecord:
        assert await obtain() == (digest, NAME.place)
        recorded.append(names[digest])
        return plain(f"{names[digest]} of")

    children = {digest_of(runner): plain(runner) for runner in known}
    settings = parse_settings({}, dir=tmp_path, certs=tmp_path)
    folder = cast(Any, SimpleNamespace(children=lambda: children))

    async def source(digest: Digest, place: tuple[str, str]) -> Any:
        return digest, place

    recorder, nobody = cast(Any, SimpleNamespace(read_manifest=read_manifest)), cast(Any, None)
    refresher = Refresher(settings, folder, nobody, recorder, source, nobody)
    found = asyncio.run(refresher._wanted(NAME, stored, moved))
    assert found == [digest_of(each) for each in wanted]
    assert recorded == [each.removesuffix(" of") for each in wanted if each.endswith(" of")]


def test_the_refresher(store: Store, tmp_path: Path) -> None:
    """A pinned model is looked at however long ago it was pulled, until the pin is taken back."""
    settings = parse_settings({}, dir=tmp_path, certs=tmp_path)
    nobody = cast(Any, None)
    refresher = Refresher(settings, store, nobody, nobody, nobody, nobody)
    now = 1e9
    assert list(refresher._due(10, now)) == []
    store.ledger.pin("llama3.2:latest")
    assert list(refresher._due(10, now)) == [NAME]
    store.ledger.unpin("llama3.2:latest")
    assert list(refresher._due(10, now)) == []


def test_evidence_goes_before_models(store: Store) -> None:
    """Quarantined bytes count into the bounds, one file per blob, and no model is evicted while there are any."""

    async def scenario() -> None:
        threads = Threads()
        try:
            evictor = Evictor(store, threads, max_size=store.held_bytes + 8192, min_free=0)
            digest = Digest("9" * 64)
            for _ in range(2):
                ingest = store.ingest(digest)
                ingest.begin(8192)
                ingest.write_at(0, bytes(range(256)) * 32)
                store.quarantine(ingest)
                ingest.close()
            assert len(store.quarantined()) == 1
            await evictor.reserve(Digest("8" * 64), 8192)
            assert store.quarantined() == {} and store.evicted == 0
        finally:
            threads.close()

    asyncio.run(scenario())


def test_what_was_wrong_twice_has_no_room(store: Store) -> None:
    """It is passed through, unless it is so small that recording it anew costs nothing."""

    async def scenario() -> None:
        threads = Threads()
        try:
            evictor = Evictor(store, threads, max_size=None, min_free=0)
            digest = Digest("7" * 64)
            evictor.mismatches(digest)
            await evictor.reserve(digest, SMALL + 1)
            evictor.mismatches(digest)
            with pytest.raises(SourceDistrusted, match="brought other bytes twice"):
                await evictor.reserve(digest, SMALL + 1)
            await evictor.reserve(digest, SMALL)
        finally:
            threads.close()

    asyncio.run(scenario())


def keep(store: Store, *asked: tuple[str, int, int], max_size: int = 1500) -> None:
    """Reserve for each (letter of the digest, size, whole)."""

    async def reserve() -> None:
        threads = Threads()
        try:
            evictor = Evictor(store, threads, max_size=max_size, min_free=0)
            for letter, size, whole in asked:
                await evictor.reserve(Digest(letter * 64), size, whole=whole)
        finally:
            threads.close()

    asyncio.run(reserve())


def test_nothing_goes_for_what_can_never_be_whole(store: Store) -> None:
    """A client looks at the head of a blob that is larger than the store: no model goes for it, not even in part."""
    with pytest.raises(StoreUnwritable, match="nothing left to evict"):
        keep(store, ("a", 600, 2000))
    assert store.manifest(NAME) is not None
    keep(store, ("a", 400, 2000))
    assert store.manifest(NAME) is not None
    keep(store, ("a", 600, 1400))
    assert store.manifest(NAME) is None


def test_what_an_earlier_recording_has_left_counts_in_full(store: Store) -> None:
    """Though only the head of the blob is asked for this time."""
    left = store.ingest(Digest("a" * 64))
    left.begin(1 << 20)
    left.write_at(0, bytes(1 << 18))
    left.close()
    with pytest.raises(StoreUnwritable, match="nothing left to evict"):
        keep(store, ("a", 1 << 16, 1 << 20), ("b", 1 << 16, 1 << 16), max_size=3 << 16)
