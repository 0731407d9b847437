"""Request targets: those that name a manifest, a blob, its chunk sums, or its bytes at the canonical address.

Invariant: a route holds only names that the registry's grammar allows, and a normalised digest; None means "not ours,
pass it through unchanged".
"""

import re
from dataclasses import dataclass

from pullthrough.core.digest import Digest

# On other OCI registries a namespace may have several components; `.` and `..` are not names.
_COMPONENT = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}"
_REPOSITORY = rf"{_COMPONENT}(?:/{_COMPONENT}){{0,7}}"
_COLON_DIGEST = r"sha256(?::|%3[aA])[0-9a-fA-F]{64}"
_DIGEST = r"sha256(?:[:-]|%3[aA])[0-9a-fA-F]{64}"
_MANIFEST = re.compile(rf"/v2/({_REPOSITORY})/manifests/(({_COLON_DIGEST})|{_COMPONENT})", re.ASCII)
_BLOB = re.compile(rf"/v2/({_REPOSITORY})/blobs/({_DIGEST})", re.ASCII)
_CHUNKSUMS = re.compile(rf"/v2/({_REPOSITORY})/chunksums/({_DIGEST})", re.ASCII)
_CANONICAL = re.compile(r"/ollama/docker/registry/v2/blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})/data", re.ASCII)


@dataclass(frozen=True, slots=True)
class ManifestRoute:
    """`/v2/<repository>/manifests/<reference>` (OCI distribution-spec, "Pulling manifests")."""

    repository: str
    reference: str

    @property
    def digest(self) -> Digest | None:
        """The manifest's own digest, where the reference is one. A tag may look like `sha256-…` (OCI referrers)."""
        return Digest.parse(self.reference) if ":" in self.reference else None


@dataclass(frozen=True, slots=True)
class BlobRoute:
    """`/v2/<repository>/blobs/<digest>` (OCI distribution-spec, "Pulling blobs")."""

    repository: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class ChunksumsRoute:
    """`/v2/<repository>/chunksums/<digest>` (Ollama's own; server/internal/client/ollama/registry.go, v0.6.6)."""

    repository: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class CanonicalRoute:
    """The canonical address of a blob's bytes, with any query."""

    digest: Digest
    query: str


Route = ManifestRoute | BlobRoute | ChunksumsRoute


def parse_registry_target(target: str) -> Route | None:
    """Return the route of an origin-form target on a registry host.

    A target with a query is never ours: only the registry knows what the query means.
    """
    if match := _BLOB.fullmatch(target):
        return BlobRoute(match[1], _parse_digest(match[2]))
    if match := _MANIFEST.fullmatch(target):
        reference = match[2]
        return ManifestRoute(match[1], str(_parse_digest(reference)) if match[3] else reference)
    if match := _CHUNKSUMS.fullmatch(target):
        return ChunksumsRoute(match[1], _parse_digest(match[2]))
    return None


def parse_canonical_target(target: str) -> CanonicalRoute | None:
    """Return the route of an origin-form target on the blob host."""
    path, _, query = target.partition("?")
    match = _CANONICAL.fullmatch(path)
    return CanonicalRoute(Digest(match[2]), query) if match else None


def canonical_path(digest: Digest) -> str:
    """Return the path that R2 itself uses for the blob, so that every client accepts it."""
    return f"/ollama/docker/registry/v2/blobs/sha256/{digest.hex[:2]}/{digest.hex}/data"


def _parse_digest(text: str) -> Digest:
    # Some HTTP clients percent-encode the colon; `%` has no other use in the grammar.
    return Digest.parse(re.sub("%3[aA]", ":", text))
