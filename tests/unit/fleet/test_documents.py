"""documents: a document opens only where and by whom it was sealed."""

import hashlib
import hmac
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.errors import ForgedDocument
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.fleet import documents

SECRET = b"s" * 32
NAME = Name("registry.ollama.ai", "library/llama3.2", "latest")
BODY = json.dumps({"layers": [{"digest": f"sha256:{'a' * 64}", "size": 5}]}).encode()
RECORD = ManifestRecord.parse(BODY, "application/json", now=1700000000.0)
assert RECORD is not None


def test_layout() -> None:
    """Where things lie is a promise to other versions, and to whoever looks into the bucket."""
    assert documents.blob_key(Digest("ab" + "0" * 62)) == f"blobs/sha256/ab/ab{'0' * 62}"
    assert documents.manifest_key(NAME) == "manifests/registry.ollama.ai/library/llama3.2/latest"


@given(oldest=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)))
def test_manifest_survives(oldest: tuple[int, ...] | None) -> None:
    """What one cache seals another one opens, to the byte."""
    record = RECORD._replace(oldest=oldest)
    assert documents.unseal_manifest(documents.seal_manifest(NAME, record, SECRET), NAME, SECRET) == record


@given(data=st.data())
def test_any_change_is_seen(data: st.DataObject) -> None:
    """One byte changed, cut or added anywhere."""
    sealed = documents.seal_manifest(NAME, RECORD, SECRET)
    position = data.draw(st.integers(0, len(sealed) - 1))
    change = data.draw(st.binary(max_size=2).filter(lambda piece: piece != sealed[position : position + 1]))
    with pytest.raises(ForgedDocument):
        documents.unseal_manifest(sealed[:position] + change + sealed[position + 1 :], NAME, SECRET)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        pytest.param(NAME._replace(reference="old"), SECRET, id="another-tag"),
        pytest.param(NAME._replace(repository="me/llama3.2"), SECRET, id="another-repository"),
        pytest.param(NAME._replace(host="hf.co"), SECRET, id="another-host"),
        pytest.param(NAME, b"t" * 32, id="another-fleet"),
    ],
)
def test_a_document_is_for_its_place(name: Name, secret: bytes) -> None:
    """A signed manifest that was copied to another place is not believed."""
    with pytest.raises(ForgedDocument):
        documents.unseal_manifest(documents.seal_manifest(NAME, RECORD, SECRET), name, secret)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\n")
@example(BODY)
def test_whatever_lies_there_is_refused(data: bytes) -> None:
    """Bytes of a stranger end in one error."""
    with pytest.raises(ForgedDocument):
        documents.unseal_manifest(data, NAME, SECRET)


def test_other_bytes_than_the_digest_says_are_refused() -> None:
    """Even under the right signature."""
    key = documents.manifest_key(NAME)
    document = documents.unseal(documents.seal_manifest(NAME, RECORD, SECRET), key, SECRET)
    with pytest.raises(ForgedDocument, match="digest"):
        documents.unseal_manifest(
            documents.seal(document | {"digest": "sha256:" + "0" * 64}, key, SECRET), NAME, SECRET
        )


def test_keys_differ() -> None:
    """What signs documents never signs capabilities."""
    payload = b"{}"
    forged = (
        hmac.new(documents.capability_secret(SECRET), b"document k\n" + payload, hashlib.sha256).hexdigest().encode()
    )
    with pytest.raises(ForgedDocument):
        documents.unseal(forged + b"\n" + payload, "k", SECRET)
