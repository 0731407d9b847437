"""routes: which request targets are ours."""

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.routes import (
    BlobRoute,
    CanonicalRoute,
    ChunksumsRoute,
    ManifestRoute,
    canonical_path,
    parse_canonical_target,
    parse_registry_target,
)

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/v2/library/llama3.2/manifests/latest", ManifestRoute("library/llama3.2", "latest")),
        ("/v2/library/nomic-embed-text/manifests/v1.5", ManifestRoute("library/nomic-embed-text", "v1.5")),
        ("/v2/Some_One/My-Model.GGUF/manifests/Q4_K_M", ManifestRoute("Some_One/My-Model.GGUF", "Q4_K_M")),
        ("/v2/a/b/c/manifests/x", ManifestRoute("a/b/c", "x")),
        (f"/v2/library/x/manifests/sha256:{HEX}", ManifestRoute("library/x", f"sha256:{HEX}")),
        (f"/v2/library/x/manifests/sha256%3a{HEX.upper()}", ManifestRoute("library/x", f"sha256:{HEX}")),
        (f"/v2/library/x/manifests/sha256-{HEX}", ManifestRoute("library/x", f"sha256-{HEX}")),
        (f"/v2/library/x/chunksums/sha256:{HEX}", ChunksumsRoute("library/x", Digest(HEX))),
        (f"/v2/library/x/blobs/sha256:{HEX}", BlobRoute("library/x", Digest(HEX))),
        (f"/v2/library/x/blobs/sha256-{HEX}", BlobRoute("library/x", Digest(HEX))),
        (f"/v2/library/x/blobs/sha256%3A{HEX}", BlobRoute("library/x", Digest(HEX))),
        (f"/v2/library/x/blobs/sha256:{HEX.upper()}", BlobRoute("library/x", Digest(HEX))),
        ("/v2/", None),
        ("/v2/library/x/tags/list", None),
        (f"/v2/library/x/chunksums/sha256:{HEX}/1", None),
        ("/v2/library/x/blobs/uploads/", None),
        (f"/v2/library/x/blobs/sha256:{HEX[1:]}", None),
        (f"/v2/library/x/blobs/sha256:{HEX}?a=b", None),
        (f"/v2/library/../x/blobs/sha256:{HEX}", None),
        (f"/v2/./x/blobs/sha256:{HEX}", None),
        (f"/v2//x/blobs/sha256:{HEX}", None),
        (f"/v2/library/x y/blobs/sha256:{HEX}", None),
        (f"/v2/library/x/blobs/sha256:{HEX}\n", None),
        ("/token", None),
        ("*", None),
    ],
)
def test_registry_targets(target: str, expected: object) -> None:
    """Manifests and blobs by repository; everything else is passed through."""
    assert parse_registry_target(target) == expected


def test_canonical_targets() -> None:
    """The blob host's own address of a blob, with its query."""
    path = canonical_path(Digest(HEX))
    assert path == f"/ollama/docker/registry/v2/blobs/sha256/01/{HEX}/data"
    assert parse_canonical_target(path) == CanonicalRoute(Digest(HEX), "")
    assert parse_canonical_target(f"{path}?a=b") == CanonicalRoute(Digest(HEX), "a=b")


@pytest.mark.parametrize("path", ["/", f"/ollama/docker/registry/v2/blobs/sha256/02/{HEX}/data", f"/x/{HEX}/data"])
def test_other_targets_of_the_blob_host(path: str) -> None:
    """Other objects, and a folder that does not fit its digest, are not ours."""
    assert parse_canonical_target(path) is None


@pytest.mark.parametrize(("reference", "digest"), [("latest", None), (f"sha256-{HEX}", None), (f"sha256:{HEX}", HEX)])
def test_manifest_digest(reference: str, digest: str | None) -> None:
    """Only the form with a colon names bytes: the other is a tag."""
    assert ManifestRoute("library/x", reference).digest == (Digest(digest) if digest else None)
