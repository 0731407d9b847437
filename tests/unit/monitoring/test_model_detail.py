"""model_detail: one model, what is known of it, and nothing of what is private."""

import json
import time
from hashlib import sha256
from pathlib import Path

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.monitoring.model_detail import find_detail
from pullthrough.store.store import Store


def put(store: Store, tag: str, layers: list[str], *, repository: str = "library/a", denied: bool = False) -> None:
    body = {"layers": [{"digest": f"sha256:{sha256(each.encode()).hexdigest()}", "size": len(each)} for each in layers]}
    record = ManifestRecord.parse(json.dumps(body).encode(), "", now=50.0)
    assert record is not None
    store.put_manifest(Name("registry.ollama.ai", repository, tag), record._replace(denied=denied, pulled=70.0))


def hold(store: Store, content: str, *, verified: float) -> None:
    digest = Digest(sha256(content.encode()).hexdigest())
    path = store.folder / "ingest" / "new"
    path.write_text(content)
    store.publish(digest, store.place(digest, path), now=verified)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = Store.open(tmp_path / "store")
    put(opened, "1b", ["one", "shared"])
    put(opened, "latest", ["two", "shared"])
    hold(opened, "one", verified=60.0)
    hold(opened, "shared", verified=65.0)
    return opened


def test_a_model(store: Store) -> None:
    """Its layers in order, which of them are here and since when, its pins, and the tags beside it."""
    model = find_detail(store, ("a:*", "b:*"), "a:1b")
    assert model is not None
    assert [(layer["size"], layer["held"]) for layer in model.facts["layers"]] == [(3, True), (6, True)]
    assert (model.facts["name"], model.facts["held"], model.facts["pulled"]) == ("a:1b", "complete", 70.0)
    assert (model.pins, model.verified, model.held, model.listed) == (("a:*",), 65.0, 2, 2)
    assert [(tag["name"], tag["held"]) for tag in model.tags] == [("a:1b", "complete"), ("a:latest", "partial")]
    assert find_detail(store, (), "registry.ollama.ai/library/a:1b") is not None
    store.close()


def test_not_verified_yet(store: Store) -> None:
    """Of a model of which nothing is here no time is told."""
    put(store, "empty", ["three"])
    model = find_detail(store, (), "a:empty")
    assert model is not None
    assert (model.verified, model.held, model.listed) == (None, 0, 1)
    store.close()


@pytest.mark.parametrize("text", ["", "nothing", "a:2b", "a:*", "a b", "/", "@", "secret:1", "a@sha256:00", "x" * 5000])
def test_what_is_not_there(store: Store, text: str) -> None:
    """Strange names, and those of private models, are nobody's."""
    put(store, "1", ["s"], repository="library/secret", denied=True)
    assert find_detail(store, (), text) is None
    store.close()


def test_many_tags_beside(store: Store) -> None:
    """A private repository is no tag of a public one, and a name's digest is as good as its tag."""
    digest = "sha256:" + sha256(b"x").hexdigest()
    put(store, digest, ["one"])
    model = find_detail(store, (), f"a@{digest}")
    assert model is not None
    assert [tag["reference"] for tag in model.tags] == ["1b", "latest", digest]
    assert time.time() > (model.verified or 0)
    store.close()
