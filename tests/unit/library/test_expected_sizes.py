"""expected_sizes: what is known of a blob's length, and in which repository."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from pullthrough.core.digest import EMPTY, Digest
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.expected_sizes import public_sizes, sizes_in
from pullthrough.store.store import Store

HOST = "registry.ollama.ai"
DATA = b"x" * 1000
DIGEST = Digest(sha256(DATA).hexdigest())
MINE, OTHER = "library/mine", "library/other"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


def claim(store: Store, repository: str, size: object, tag: str = "latest") -> None:
    """Store a manifest that claims this size."""
    body = json.dumps({"layers": [{"mediaType": "x", "digest": str(DIGEST), "size": size}]}).encode()
    record = ManifestRecord.parse(body, "application/json", now=1.0)
    assert record is not None
    store.put_manifest(Name(HOST, repository, tag), record)


def hold(store: Store) -> None:
    """Record the blob."""
    ingest = store.ingest(DIGEST)
    ingest.begin(len(DATA))
    ingest.write_at(0, DATA)
    ingest.close()
    store.publish(DIGEST, store.place(DIGEST, ingest.partial_path), now=1.0)
    ingest.forget()


def test_nothing_is_known(store: Store) -> None:
    """Of a blob that no manifest lists, but for the empty one."""
    assert sizes_in(store, HOST, MINE, DIGEST) == frozenset()
    assert public_sizes(store, DIGEST) == frozenset()
    assert sizes_in(store, HOST, MINE, EMPTY) == public_sizes(store, EMPTY) == {0}


def test_a_claim_is_for_its_own_repository(store: Store) -> None:
    """Nobody spoils another one's blob; what two tags of one claim counts twice."""
    claim(store, MINE, 1000)
    claim(store, OTHER, 5)
    assert sizes_in(store, HOST, MINE, DIGEST) == {1000}
    assert sizes_in(store, HOST, OTHER, DIGEST) == {5}
    assert sizes_in(store, "hf.co", MINE, DIGEST) == frozenset()
    claim(store, MINE, 7, tag="other")
    assert sizes_in(store, HOST, MINE, DIGEST) == {7, 1000}


@pytest.mark.parametrize("size", [-1, 1 << 60, "1000", None, 1.5])
def test_what_is_no_size_claims_nothing(store: Store, size: object) -> None:
    """It leaves the length open; a manifest that is none at all is not even stored."""
    body = json.dumps({"layers": [{"mediaType": "x", "digest": str(DIGEST), "size": size}]}).encode()
    record = ManifestRecord.parse(body, "application/json", now=1.0)
    if record is not None:
        store.put_manifest(Name(HOST, MINE, "latest"), record)
    assert sizes_in(store, HOST, MINE, DIGEST) == frozenset()


def test_what_is_held_is_the_measure(store: Store) -> None:
    """It has the digest: a manifest that says otherwise is wrong."""
    claim(store, MINE, 5)
    hold(store)
    assert sizes_in(store, HOST, MINE, DIGEST) == {1000}


def test_a_private_claim_counts_within_its_repository(store: Store) -> None:
    """A size is no secret to those who may ask there; to the public nothing is known of a private blob."""
    claim(store, MINE, 1000)
    store.deny(HOST, MINE)
    assert sizes_in(store, HOST, MINE, DIGEST) == {1000}
    assert public_sizes(store, DIGEST) == frozenset()


def test_a_public_blob_has_the_lengths_of_all_its_places(store: Store) -> None:
    """Wherever it will be obtained from."""
    claim(store, MINE, 1000)
    claim(store, OTHER, 5)
    assert public_sizes(store, DIGEST) == frozenset()
    store.confirm_public(HOST, MINE, DIGEST)
    assert public_sizes(store, DIGEST) == {5, 1000}
    hold(store)
    assert public_sizes(store, DIGEST) == {1000}
