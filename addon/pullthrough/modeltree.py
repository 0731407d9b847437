"""Ollama's models folder: where it keeps what, found and read without trusting it.

    manifests/<host>/<namespace>/<model>/<tag>   a manifest, byte for byte (since v0.19.0)
    blobs/sha256-<hex>                           a blob; beside it whatever a pull has left

(server/manifest.go, types/model/name.go, v0.33.) Invariant: no name leads out of the folder, and no link is followed
below it. Hashes nothing.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from pullthrough import platform
from pullthrough.digest import Digest
from pullthrough.errors import TransferRefused
from pullthrough.records import Name
from pullthrough.route import ManifestRoute, parse_registry_target

MANIFESTS: Final = "manifests"
BLOBS: Final = "blobs"
LONGEST_MANIFEST: Final = 4 << 20
"""Bytes; the largest of tensor models have a few hundred KiB."""

_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}(:[0-9]{1,5})?")


def manifest_path(name: Name) -> str:
    """Where a manifest lies below the folder. TransferRefused for a name that Ollama has no place for."""
    path = f"{MANIFESTS}/{name.host}/{name.repository}/{name.reference}"
    if parse_manifest_path(path) != name:
        raise TransferRefused(f"{name}: expected host/namespace/model:tag, as Ollama's folders are, got another form")
    return path


def blob_path(digest: Digest) -> str:
    """Where a blob lies below the folder."""
    return f"{BLOBS}/{digest.file_name}"


def parse_manifest_path(path: str) -> Name | None:
    """The name of the model whose manifest lies there; None where none can."""
    parts = path.split("/")
    if len(parts) != 5 or parts[0] != MANIFESTS or not _HOST.fullmatch(parts[1]):
        return None
    route = parse_registry_target(f"/v2/{parts[2]}/{parts[3]}/manifests/{parts[4]}")
    if not isinstance(route, ManifestRoute) or route.digest is not None:
        return None
    return Name(parts[1], route.repository, route.reference)


def parse_blob_path(path: str) -> Digest | None:
    """The digest of the blob that lies there; None where none can."""
    match = re.fullmatch(rf"{BLOBS}/sha256-([0-9a-f]{{64}})", path)
    return Digest(match[1]) if match else None


def default_tree(environment: Mapping[str, str]) -> Path:
    """The models of the Ollama on this machine: OLLAMA_MODELS, the user's, or those of the Linux service."""
    if named := environment.get("OLLAMA_MODELS"):
        return Path(named)
    places = [Path.home() / ".ollama" / "models"]
    if sys.platform == "linux":
        places.append(Path("/usr/share/ollama/.ollama/models"))
    for place in places:
        if (place / MANIFESTS).is_dir():
            return place
    raise TransferRefused(f"expected OLLAMA_MODELS or models in {' or '.join(map(str, places))}, got none")


class ModelTree:
    """A models folder that is there."""

    def __init__(self, folder: Path) -> None:
        """TransferRefused when it is none."""
        if not (folder / MANIFESTS).is_dir():
            raise TransferRefused(f"expected a models folder of Ollama, with {MANIFESTS} in it, got {folder}")
        self.folder = folder

    def manifests(self) -> Iterator[tuple[str, Name | None]]:
        """(path below the folder, its model's name) of all manifests; None for what should not be there.

        Hidden files, as file managers leave them, are passed over.
        """
        yield from self._walk(PurePosixPath(MANIFESTS), depth=4)

    def _walk(self, path: PurePosixPath, *, depth: int) -> Iterator[tuple[str, Name | None]]:
        with os.scandir(self.folder / path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            below = path / entry.name
            if entry.name.startswith("."):
                continue
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from self._walk(below, depth=depth - 1)
            elif depth > 1 or not entry.is_file(follow_symlinks=False):
                yield str(below), None
            else:
                yield str(below), parse_manifest_path(str(below))

    def read_manifest(self, path: str) -> bytes:
        """Its bytes. OSError, or TransferRefused when it is far too long."""
        with os.fdopen(platform.open_regular(self.folder / path), "rb") as file:
            body = file.read(LONGEST_MANIFEST + 1)
        if len(body) > LONGEST_MANIFEST:
            raise TransferRefused(f"{path}: expected a manifest of at most {LONGEST_MANIFEST} bytes, got more")
        return body

    def open_blob(self, digest: Digest) -> int:
        """A descriptor of its file. OSError where there is none."""
        if (self.folder / BLOBS).is_symlink():
            raise TransferRefused(f"{self.folder / BLOBS}: expected a folder, got a link")
        return platform.open_regular(self.folder / blob_path(digest))
