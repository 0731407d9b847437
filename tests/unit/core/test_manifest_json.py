"""manifest_json: what a manifest or a list of them says, and which clients take lists."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core import manifest_json
from pullthrough.core.digest import Digest
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE, MAX_CHILDREN, Child, Layer, accept_of, takes_lists

A, B, C = (Digest(letter * 64) for letter in "abc")
MODEL = "application/vnd.ollama.image.model"


def item(digest: Digest | str, size: object) -> dict[str, object]:
    return {"mediaType": MODEL, "digest": str(digest), "size": size}


def encode(**manifest: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": LIST_TYPE, **manifest}).encode()


def listing(*children: object) -> bytes:
    return encode(manifests=list(children))


LAYER = Layer(A, 1, MODEL)
IN_PLACE = {"schemaVersion": 2, "mediaType": DOCKER_TYPE, "layers": [item(A, 1)]}


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        pytest.param({"digest": str(A)}, Child(A, "", "", ()), id="a digest alone"),
        pytest.param(
            {"mediaType": DOCKER_TYPE, "digest": str(A), "runner": "llamacpp", "format": "gguf"},
            Child(A, "llamacpp", "gguf", ()),
            id="as Ollama's",
        ),
        pytest.param({"digest": str(A), "runner": " MLX ", "format": 7}, Child(A, "mlx", "", ()), id="odd words"),
        pytest.param({"digest": str(A), "runner": None, "size": "big"}, Child(A, "", "", ()), id="other fields"),
        pytest.param({"digest": str(A), "layers": [item(B, 2)]}, Child(A, "", "", ()), id="digest and layers"),
        pytest.param({**IN_PLACE, "runner": "ggml"}, Child(None, "ggml", "", (LAYER,)), id="in place"),
        pytest.param(
            {**IN_PLACE, "config": item(B, 2)}, Child(None, "", "", (LAYER, Layer(B, 2, MODEL))), id="with a config"
        ),
        pytest.param(
            {"layers": [item(A, 1), {**item(A, 1), "from": "/srv/x"}]},
            Child(None, "", "", (LAYER, LAYER)),
            id="a layer twice, with a from field",
        ),
        pytest.param({"mediaType": LIST_TYPE, "digest": str(A)}, None, id="a list, by reference"),
        pytest.param({"mediaType": LIST_TYPE, "manifests": [{"digest": str(A)}]}, None, id="a list, in place"),
        pytest.param({"manifests": [], "layers": [item(A, 1)]}, None, id="a list that does not say so"),
        pytest.param({"digest": "sha256:x"}, None, id="a bad digest"),
        pytest.param({"digest": None, "layers": [item(A, 1)]}, None, id="a digest that is null"),
        pytest.param({"digest": [str(A)]}, None, id="a digest that is a list"),
        pytest.param({"digest": f"sha512:{'a' * 128}"}, None, id="another hash"),
        pytest.param({"layers": [item(A, 1), item(B, -1)]}, None, id="one bad layer of two"),
        pytest.param({"layers": [item(A, 1 << 63)]}, None, id="a size that no client can count"),
        pytest.param({"layers": {"0": item(A, 1)}}, None, id="layers an object"),
        pytest.param({"runner": "mlx"}, None, id="neither digest nor layers"),
        pytest.param(None, None, id="null"),
        pytest.param(str(A), None, id="a string"),
        pytest.param([[{"digest": str(A)}]], None, id="an array"),
    ],
)
def test_a_child(child: object, expected: Child | None) -> None:
    """What has a known form is followed; what has none is passed over, and spoils nothing."""
    document = manifest_json.parse(listing(child, {"digest": str(C)}))
    found = [*([expected] if expected is not None else []), Child(C, "", "", ())]
    assert document == manifest_json.Document(children=tuple(found))
    assert manifest_json.children_of(listing(child, {"digest": str(C)})) == tuple(found)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(encode(), id="no manifests"),
        pytest.param(encode(manifests=None), id="null"),
        pytest.param(encode(manifests={}), id="an object"),
        pytest.param(encode(manifests=str(A)), id="a string"),
        pytest.param(encode(layers=[item(A, 1)]), id="a manifest of the list's type"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(listing({"digest": str(A)})[:-1], id="cut"),
        pytest.param(json.dumps({"mediaType": DOCKER_TYPE, "manifests": [{"digest": str(A)}]}).encode(), id="a type"),
        pytest.param(json.dumps({"mediaType": [LIST_TYPE], "manifests": []}).encode(), id="a type that is a list"),
    ],
)
def test_no_list(body: bytes) -> None:
    """The document's own type and an array of children make a list."""
    with pytest.raises(ValueError, match="expected a manifest or a list of manifests"):
        manifest_json.parse(body)


def test_an_empty_list() -> None:
    """It is a list, of nothing."""
    assert manifest_json.parse(listing()).children == ()


def test_what_says_that_it_is_a_list_is_one() -> None:
    """As the client reads it, whatever else is there."""
    both = encode(manifests=[{"digest": str(A)}], layers=[item(B, 1)])
    assert manifest_json.parse(both) == manifest_json.Document(children=(Child(A, "", "", ()),))


def test_a_huge_list_is_followed_in_part() -> None:
    """No list can make the cache follow thousands of blobs; what cannot be followed does not count."""
    children = [*({"digest": "x"} for _ in range(100)), *({"digest": f"sha256:{i:064x}"} for i in range(20_000))]
    found = manifest_json.children_of(listing(*children))
    assert [child.digest for child in found] == [Digest(f"{i:064x}") for i in range(MAX_CHILDREN)]


def test_a_manifest_may_name_its_runner() -> None:
    """As a child of a list does."""
    body = json.dumps({"layers": [item(A, 1)], "config": item(B, 2), "runner": "GGML"}).encode()
    assert manifest_json.parse(body) == manifest_json.Document((LAYER, Layer(B, 2, MODEL)), runner="ggml")
    assert manifest_json.children_of(body) == ()


JSON = st.recursive(
    st.sampled_from((None, True, 7, -1, 1.5, "", str(A), LIST_TYPE, DOCKER_TYPE)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("mediaType", "manifests", "layers", "config", "digest", "size", "runner")), inner
        )
    ),
    max_leaves=12,
)


@given(document=JSON | st.fixed_dictionaries({"mediaType": st.just(LIST_TYPE), "manifests": JSON | st.lists(JSON)}))
def test_any_json_is_a_document_or_not(document: Any) -> None:
    """Whatever it holds, it is read or refused."""
    try:
        found = manifest_json.parse(json.dumps(document).encode())
    except ValueError:
        return
    assert (found.children is not None) == (document["mediaType"] == LIST_TYPE if "mediaType" in document else False)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("application/*", False),
        (DOCKER_TYPE, False),
        (LIST_TYPE, True),
        (f"{LIST_TYPE}, {DOCKER_TYPE}", True),
        (f"{DOCKER_TYPE},{LIST_TYPE}", True),
        (f"text/html , {LIST_TYPE.upper()} ;q=0.1, */*", True),
        (f"{LIST_TYPE};q=0", False),
        (f"{LIST_TYPE}; Q=0.000", False),
        (f"{LIST_TYPE};q=0.001", True),
        (f"{LIST_TYPE};q=0, {LIST_TYPE}", True),
        (f"{LIST_TYPE}x", False),
        (f"x{LIST_TYPE}", False),
        (f"{LIST_TYPE} {DOCKER_TYPE}", False),
        (f'"{LIST_TYPE}"', False),
        (", ,;;,", False),
        ("application/vnd.docker.distribution.manifest.list.v2+json", False),
        ("\x00\xff", False),
    ],
)
def test_who_takes_lists(accept: str | None, expected: bool) -> None:
    """Who names the type, wherever, unless to refuse it (RFC 9110 section 12.4.2)."""
    assert takes_lists(accept) is expected


def test_what_is_asked_for() -> None:
    """As Ollama 0.40 and the ones before it send it; each is of its own class."""
    assert accept_of(takes_lists=True) == f"{LIST_TYPE}, {DOCKER_TYPE}"
    assert accept_of(takes_lists=False) == DOCKER_TYPE
    assert [takes_lists(accept_of(takes_lists=each)) for each in (False, True)] == [False, True]
