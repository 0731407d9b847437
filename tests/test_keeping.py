"""Pins that were set while the cache runs: the keeper and the refresher heed them like the option's."""

import asyncio
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest

from pullthrough.digest import Digest
from pullthrough.errors import StoreUnwritable
from pullthrough.keeper import Keeper
from pullthrough.options import parse_settings
from pullthrough.records import ManifestRecord, Name
from pullthrough.refresh import Refresher
from pullthrough.store import Store
from pullthrough.threads import Threads

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
            await Keeper(store, threads, max_size=1500, min_free=0).reserve(Digest("0" * 64), 1000)
        finally:
            threads.close()

    if pinned:
        with pytest.raises(StoreUnwritable, match="nothing left to evict"):
            asyncio.run(reserve())
    else:
        asyncio.run(reserve())
    assert (store.manifest(NAME) is not None) == pinned


def test_the_refresher(store: Store, tmp_path: Path) -> None:
    """A pinned model is looked at however long ago it was pulled, until the pin is taken back."""
    settings = parse_settings({}, dir=tmp_path, certs=tmp_path)
    nobody = cast(Any, None)
    refresher = Refresher(settings, store, nobody, nobody, nobody)
    now = 1e9
    assert list(refresher._due(10, now)) == []
    store.ledger.pin("llama3.2:latest")
    assert list(refresher._due(10, now)) == [NAME]
    store.ledger.unpin("llama3.2:latest")
    assert list(refresher._due(10, now)) == []
