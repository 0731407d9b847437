"""records: what counts as a manifest, and how a name is written."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.records import BlobRecord, ManifestRecord, Name, by_model

A, B, C = (Digest(letter * 64) for letter in "abc")
TYPE = "application/vnd.docker.distribution.manifest.v2+json"


def item(digest: Digest | str, size: object) -> dict[str, object]:
    return {"mediaType": "application/vnd.ollama.image.model", "digest": str(digest), "size": size}


def encode(**manifest: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": TYPE, **manifest}).encode()


@pytest.mark.parametrize(
    ("body", "sizes"),
    [
        pytest.param(encode(config=item(A, 1), layers=[item(B, 2), item(C, 3)]), {A: 1, B: 2, C: 3}, id="as Ollama's"),
        pytest.param(encode(layers=[item(B, 2)]), {B: 2}, id="no config"),
        pytest.param(encode(config=None, layers=[item(B, 2)]), {B: 2}, id="config null"),
        pytest.param(encode(config={}, layers=[item(B, 2)]), {B: 2}, id="config empty"),
        pytest.param(encode(config=item(A, 1), layers=[]), {A: 1}, id="no layers"),
        pytest.param(encode(layers=[item(A, 1), item(A, 1)]), {A: 1}, id="the same layer twice"),
        pytest.param(encode(layers=[item(f"sha256-{'A' * 64}", 1)]), {A: 1}, id="other spelling of a digest"),
        pytest.param(encode(layers=[item(A, 0)]), {A: 0}, id="empty blob"),
        pytest.param(encode(layers=[item(A, 1 << 40)]), {A: 1 << 40}, id="a terabyte"),
        pytest.param(encode(layers=[{**item(A, 1), "from": "/srv/x", "name": "t"}]), {A: 1}, id="more fields"),
        pytest.param(b"\xef\xbb\xbf" + encode(layers=[item(A, 1)]), {A: 1}, id="byte order mark"),
        pytest.param(b"\r\n " + encode(layers=[item(A, 1)]) + b"\n", {A: 1}, id="white space around"),
    ],
)
def test_a_manifest(body: bytes, sizes: dict[Digest, int]) -> None:
    """Its bytes and type untouched, the time it was confirmed, and the blobs it lists."""
    record = ManifestRecord.parse(body, "text/plain", now=7.5)
    assert record is not None
    assert (record.body, record.digest) == (body, hashlib.sha256(body).hexdigest())
    assert (record.content_type, record.confirmed, record.pulled) == ("text/plain", 7.5, 0.0)
    assert (record.sizes, sorted(record.digests), record.size) == (sizes, sorted(sizes), sum(sizes.values()))
    assert all(map(record.lists, sizes))
    assert not record.lists(Digest("f" * 64))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>please log in</html>", id="captive portal"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(encode(layers=[item(A, 1)])[:-1], id="cut"),
        pytest.param(encode(layers=[item(A, 1)]) * 2, id="twice"),
        pytest.param(b"null", id="null"),
        pytest.param(b"7", id="a number"),
        pytest.param(b'"layers"', id="a string"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}', id="an error document"),
        pytest.param(encode(manifests=[item(A, 1)]), id="an index of manifests"),
        pytest.param(encode(config=item(A, 1)), id="no layers"),
        pytest.param(encode(layers={"0": item(A, 1)}), id="layers an object"),
        pytest.param(encode(layers="layers"), id="layers a string"),
        pytest.param(encode(layers=[None]), id="a layer null"),
        pytest.param(encode(layers=[str(A)]), id="a layer a string"),
        pytest.param(encode(layers=[{"size": 1}]), id="a layer without digest"),
        pytest.param(encode(layers=[{"digest": str(A)}]), id="a layer without size"),
        pytest.param(encode(layers=[item(A, None)]), id="size null"),
        pytest.param(encode(layers=[item(A, "big")]), id="size no number"),
        pytest.param(encode(layers=[item(A, [])]), id="size a list"),
        pytest.param(encode(layers=[item(A, float("nan"))]), id="size not a number"),
        pytest.param(encode(layers=[item("sha512:" + "a" * 64, 1)]), id="another hash"),
        pytest.param(encode(layers=[item("sha256:" + "a" * 63, 1)]), id="a short digest"),
        pytest.param(encode(layers=[item("../../etc/passwd", 1)]), id="a path"),
        pytest.param(encode(layers=[{"digest": 7, "size": 1}]), id="a digest that is a number"),
        pytest.param(encode(layers=[item(B, 2)], config="config"), id="config a string"),
        pytest.param(encode(layers=[item(B, 2)], config=[item(A, 1)]), id="config a list"),
        pytest.param(encode(layers=[item(B, 2)], config={"digest": str(A)}), id="config without size"),
        pytest.param(encode(layers=[item(A, 1), item("sha256:x", 1)]), id="one bad layer of two"),
    ],
)
def test_no_manifest(body: bytes) -> None:
    """A 200 with anything else in it is no manifest, and no error."""
    assert ManifestRecord.parse(body, TYPE, now=0) is None


SCALARS = st.sampled_from((None, True, 7, -1, 1.5, "", "7", "x", str(A), str(B), [], {}))
ITEMS = SCALARS | st.fixed_dictionaries({}, optional={"digest": SCALARS, "size": SCALARS})
MANIFESTS = SCALARS | st.fixed_dictionaries(
    {}, optional={"layers": SCALARS | st.lists(ITEMS, max_size=3), "config": ITEMS}
)


@given(document=MANIFESTS)
def test_any_json_is_a_manifest_or_not(document: Any) -> None:
    """No document makes it stumble, and what it takes is exactly what the document lists."""
    body = json.dumps(document).encode()
    record = ManifestRecord.parse(body, TYPE, now=0)
    if record is not None:
        listed = [*(document["layers"] or []), *([document["config"]] if document.get("config") else [])]
        assert {str(digest) for digest in record.sizes} == {each["digest"] for each in listed}
        assert record.body == body


@given(body=st.binary(max_size=40))
def test_any_bytes_are_a_manifest_or_not(body: bytes) -> None:
    """Nor does any noise."""
    assert ManifestRecord.parse(body, TYPE, now=0) is None


def test_the_id_of_a_model_is_the_hash_of_the_bytes() -> None:
    """Bare hexadecimal, of the very bytes: white space counts."""
    body = encode(layers=[item(A, 1)])
    for raw in (body, body + b"\n"):
        record = ManifestRecord.parse(raw, TYPE, now=0)
        assert record is not None
        assert record.digest == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (Name("registry.ollama.ai", "library/tiny", "latest"), "registry.ollama.ai/library/tiny:latest"),
        (Name("hub.example", "a/b/c", "1.0"), "hub.example/a/b/c:1.0"),
        (Name("hub.example", "a", str(A)), f"hub.example/a@{A}"),
    ],
    ids=["tag", "deep repository", "digest"],
)
def test_names_are_written_as_users_write_them(name: Name, expected: str) -> None:
    """A colon in front of a tag, an at sign in front of a digest."""
    assert str(name) == expected


def test_names_have_an_order() -> None:
    """By host, then repository, then reference."""
    names = [Name("a", "b", "d"), Name("a", "b", "c"), Name("a", "a", "z"), Name("0", "z", "z")]
    assert sorted(names) == names[::-1]


def test_nothing_is_known_at_first() -> None:
    """A digest that was merely heard of is neither here nor public, and its size is not 0 but unknown."""
    assert BlobRecord() == BlobRecord(size=None, held=False, public=False, mtime_ns=0, inode=0, recorded=0.0)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("llama3.2:1b", True),
        ("llama3*", True),
        ("library/llama3.2:*", True),
        ("registry.ollama.ai/library/*", True),
        ("*", True),
        ("llama3.2", False),
        ("LLAMA3*", False),
        ("3.2*", False),
        ("hf.co/*", False),
    ],
)
def test_patterns(pattern: str, expected: bool) -> None:
    """A pattern means a name as a user types it, with its namespace, or in full; all of it, and case counts."""
    assert Name("registry.ollama.ai", "library/llama3.2", "1b").matches(pattern) is expected
    assert Name("hf.co", "me/m", "Q4").matches("hf.co/*")
    assert Name("hf.co", "me/m", "Q4").matches("me/m:Q?")


def test_a_registry_of_two_names() -> None:
    """What users type, and the patterns of options, mean the one name under which it is stored."""
    name = Name.parse("registry.ollama.com/library/llama3.2:1b")
    assert name == Name("registry.ollama.ai", "library/llama3.2", "1b")
    assert name.typed == "llama3.2:1b"
    assert name.matches("registry.ollama.com/library/*")
    assert not Name("hub.example", "library/llama3.2", "1b").matches("registry.ollama.com/*")


def test_a_model_has_two_representations() -> None:
    """Written alike, told apart, and each finds the other."""
    name = Name("registry.ollama.ai", "library/tiny", "latest")
    assert (name.twin.takes_lists, name.twin.twin, name.twin.model, name.model) == (True, name, name, name)
    assert (str(name.twin), name.twin.forms, name.twin.place) == (str(name), name.forms, name.place)
    record = ManifestRecord.parse(encode(layers=[]), TYPE, now=1)
    other = ManifestRecord.parse(encode(layers=[item(A, 1)]), TYPE, now=2)
    assert record and other
    alone = Name("hub.example", "a", "b", takes_lists=True)
    assert by_model({name.twin: other, alone: record, name: record}) == {
        name: [record, other],
        alone.model: [record],
    }
