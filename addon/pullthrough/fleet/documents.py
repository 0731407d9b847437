"""What the caches of a fleet write into their object store: the keys, the formats, the signatures.

    blobs/sha256/<ab>/<hex>                     a blob's bytes; the attribute `sha256` says that they were hashed
    manifests/<host>/<repository>/<reference>   a signed document: a manifest all of whose blobs are there, as clients
                                                get it that take no lists
    leases/<hex>/<number>                       a signed document: which cache fetches the blob from upstream

A signed document is `<hexadecimal HMAC-SHA256>\\n<JSON>`. Invariant: a document opens only if this fleet's secret
signed it for the place where it lies.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any, Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import ForgedDocument, InvalidRequest
from pullthrough.core.records import ManifestRecord, Name

CHECKSUM: Final = "sha256"
"""The attribute of a blob's object (`x-amz-meta-sha256` in S3): the bare hexadecimal digest that its bytes had."""

BLOBS: Final = "blobs/sha256"
MANIFESTS: Final = "manifests"
LEASES: Final = "leases"


def blob_key(digest: Digest) -> str:
    return f"{BLOBS}/{digest.hex[:2]}/{digest.hex}"


def manifest_key(name: Name) -> str:
    return f"{MANIFESTS}/{name.host}/{name.repository}/{name.reference}"


def digest_of(key: str) -> Digest | None:
    """Of a blob's object; None for what else lies there."""
    try:
        digest = Digest.parse(f"sha256:{key.rpartition('/')[2]}")
    except InvalidRequest:
        return None
    return digest if blob_key(digest) == key else None


def name_of(key: str) -> Name:
    """Of a manifest's object."""
    _, host, *repository, reference = key.split("/")
    return Name(host, "/".join(repository), reference)


def lease_key(digest: Digest, number: int) -> str:
    return f"{LEASES}/{digest.hex}/{number}"


def capability_secret(secret: bytes) -> bytes:
    """Return the key with which the fleet signs capabilities: never the key for documents."""
    return hmac.digest(secret, b"capability", "sha256")


def seal(document: Mapping[str, Any], key: str, secret: bytes) -> bytes:
    """Return the document, signed for the place `key`."""
    payload = json.dumps(document).encode()
    return _signature(payload, key, secret) + b"\n" + payload


def unseal(data: bytes, key: str, secret: bytes) -> dict[str, Any]:
    """Return the content that was sealed for `key`. Raises ForgedDocument for anything else."""
    signature, _, payload = data.partition(b"\n")
    if not hmac.compare_digest(signature, _signature(payload, key, secret)):
        raise ForgedDocument(f"{key}: expected a document signed by this fleet, got another")
    document: dict[str, Any] = json.loads(payload)
    return document


def _signature(payload: bytes, key: str, secret: bytes) -> bytes:
    message = f"document {key}\n".encode() + payload
    return hmac.new(secret, message, hashlib.sha256).hexdigest().encode()


def seal_manifest(name: Name, record: ManifestRecord, secret: bytes) -> bytes:
    document = {
        "host": name.host,
        "repository": name.repository,
        "reference": name.reference,
        "digest": f"sha256:{record.digest}",
        "content_type": record.content_type,
        "confirmed": record.confirmed,
        "oldest": record.oldest,
        "body": base64.b64encode(record.body).decode(),
    }
    return seal(document, manifest_key(name), secret)


def unseal_manifest(data: bytes, name: Name, secret: bytes) -> ManifestRecord:
    """Return the manifest that a cache of the fleet recorded whole under `name`. Raises ForgedDocument otherwise."""
    document = unseal(data, manifest_key(name), secret)
    body = base64.b64decode(document["body"])
    record = ManifestRecord.parse(body, document["content_type"], now=document["confirmed"])
    if record is None or f"sha256:{record.digest}" != document["digest"]:
        raise ForgedDocument(f"{name}: expected a manifest with the digest {document['digest']}, got other bytes")
    return record._replace(oldest=tuple(document["oldest"]) if document["oldest"] is not None else None)
