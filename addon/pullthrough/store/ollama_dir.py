"""Ollama's models folder: its layout, and how to read it without trusting it.

    blobs/sha256-<hex>                              a blob; since v0.40.0 each document (a manifest or list) is one too
    manifests-v2/<host>/<namespace>/<model>/<tag>   since v0.40.0: a relative link to the document, or a copy of it
    manifests/<host>/<namespace>/<model>/<tag>      before: the manifest itself (since v0.19.0); since v0.40.0 an anchor

An *anchor* is what an older Ollama runs: a manifest encoded anew, with one more layer for each document, which keeps
the older version from pruning the documents. (server/manifest.go, manifest/paths.go, types/model/name.go.)

Invariant: no name leads out of the folder, and no link below it is followed: a link only says which blob to open. A
document that is named by its digest is hashed; other blobs are not.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest, TransferRefused
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE
from pullthrough.core.records import DEFAULT_HOST, Name, canonical
from pullthrough.core.routes import ManifestRoute, parse_registry_target
from pullthrough.runtime import platform

MANIFESTS: Final = "manifests"
NAMED_DOCUMENTS: Final = "manifests-v2"
BLOBS: Final = "blobs"
_TREES: Final = (NAMED_DOCUMENTS, MANIFESTS)
LONGEST_MANIFEST: Final = 4 << 20
"""Bytes; the largest manifests of tensor models have a few hundred KiB."""

_PUBLIC_HOST: Final = "ollama.com"
"""The folder of DEFAULT_HOST in the new tree; the old one may have either."""
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}(:[0-9]{1,5})?")
_SHADOW: Final = re.compile(r"[0-9a-fA-F]{64}")


def manifest_path(name: Name) -> str:
    """Return the path of a manifest below the folder, in the old tree.

    Raises TransferRefused if the name does not fit Ollama's folders.
    """
    return _path(MANIFESTS, DEFAULT_HOST if name.host == _PUBLIC_HOST else name.host, name)


def document_path(name: Name) -> str:
    """Return the path of a document's name below the folder, in the new tree.

    Raises TransferRefused if the name does not fit Ollama's folders.
    """
    return _path(NAMED_DOCUMENTS, _PUBLIC_HOST if name.host == DEFAULT_HOST else name.host.replace(":", "%3A"), name)


def _path(tree: str, host: str, name: Name) -> str:
    path = f"{tree}/{host}/{name.repository}/{name.reference}"
    parsed = parse_manifest_path(path)
    if parsed is None or (parsed.repository, parsed.reference) != (name.repository, name.reference):
        raise TransferRefused(f"{name}: expected host/namespace/model:tag, as Ollama's folders are, got another form")
    return path


def link_target(digest: Digest) -> str:
    """Return the target of the link in the new tree that names a document."""
    return f"../../../../{blob_path(digest)}"


def blob_path(digest: Digest) -> str:
    """Return the path of a blob below the folder."""
    return f"{BLOBS}/{digest.file_name}"


def parse_manifest_path(path: str) -> Name | None:
    """Return the model whose manifest or list lies at this path, in either tree; None if no model's can."""
    parts = path.split("/")
    if len(parts) != 5 or parts[0] not in (MANIFESTS, NAMED_DOCUMENTS):
        return None
    host = re.sub("%3[Aa]", ":", parts[1]) if parts[0] == NAMED_DOCUMENTS else parts[1]
    route = parse_registry_target(f"/v2/{parts[2]}/{parts[3]}/manifests/{parts[4]}")
    if not _HOST.fullmatch(host) or not isinstance(route, ManifestRoute) or route.digest is not None:
        return None
    return Name(DEFAULT_HOST if host == _PUBLIC_HOST else canonical(host), route.repository, route.reference)


def parse_blob_path(path: str) -> Digest | None:
    """Return the blob that lies at this path; None if none can."""
    match = re.fullmatch(rf"{BLOBS}/sha256-([0-9a-f]{{64}})", path)
    return Digest(match[1]) if match else None


def anchor(manifest: Mapping[str, Any], documents: Mapping[Digest, tuple[str, int]]) -> bytes:
    """Make the anchor for an older Ollama: the manifest it runs, and the `documents` (media type, size) it keeps."""
    kept = [{"mediaType": kind, "digest": digest, "size": size} for digest, (kind, size) in documents.items()]
    return json.dumps({**manifest, "layers": [*(manifest["layers"] or []), *kept]}, separators=(",", ":")).encode()


def anchored(body: bytes) -> Digest | None:
    """Return the document an anchor stands for: the list that it names, else the manifest; None if it is no anchor.

    Raises TransferRefused if it names several.
    """
    found: dict[str, list[Digest]] = {LIST_TYPE: [], DOCKER_TYPE: []}
    try:
        for layer in json.loads(body)["layers"] or []:
            if layer.get("mediaType") in found:
                found[layer["mediaType"]].append(Digest.parse(layer["digest"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest):
        return None  # not a manifest either, which the caller finds out
    documents = found[LIST_TYPE] or found[DOCKER_TYPE]
    if len(documents) > 1:
        raise TransferRefused(f"expected a manifest that stands for one document, got one for {len(documents)}")
    return documents[0] if documents else None


def default_tree(environment: Mapping[str, str]) -> Path:
    """Find this machine's Ollama models folder: OLLAMA_MODELS, the user's, or the Linux service's.

    Raises TransferRefused if there is none.
    """
    if named := environment.get("OLLAMA_MODELS"):
        return Path(named)
    places = [Path.home() / ".ollama" / "models"]
    if sys.platform == "linux":
        places.append(Path("/usr/share/ollama/.ollama/models"))
    for place in places:
        if any((place / tree).is_dir() for tree in _TREES):
            return place
    raise TransferRefused(f"expected OLLAMA_MODELS or models in {' or '.join(map(str, places))}, got none")


class OllamaDir:
    """An existing models folder."""

    def __init__(self, folder: Path) -> None:
        """Check the folder. Raises TransferRefused if it is not a models folder."""
        if not any((folder / tree).is_dir() for tree in _TREES):
            raise TransferRefused(f"expected a models folder of Ollama, with {MANIFESTS} in it, got {folder}")
        self.folder = folder

    def models(self) -> tuple[dict[Name, list[str]], list[str]]:
        """Return the paths that name each model, in the order in which Ollama looks, and the paths that name none.

        Paths are relative to the folder. Hidden files, which file managers and interrupted pulls leave, and the names
        that Ollama gives to its own conversions are skipped.
        """
        named: dict[Name, list[str]] = {}
        strays = []
        for tree in _TREES:
            for path, is_leaf in self._walk(PurePosixPath(tree), depth=4):
                name = parse_manifest_path(path) if is_leaf else None
                if name is None:
                    strays.append(path)
                elif not _is_shadow(name):
                    named.setdefault(name, []).append(path)
        for name, paths in named.items():
            usual = document_path(name), manifest_path(name)
            # A model may be there under both names of the public registry, and both spellings of a colon.
            paths.sort(key=lambda path: (path.startswith(f"{MANIFESTS}/"), path not in usual))
        return named, strays

    def _walk(self, path: PurePosixPath, *, depth: int) -> Iterator[tuple[str, bool]]:
        """Yield (relative path, whether it may name a model) for everything but the folders that lead to names."""
        self._check_folder(path)
        try:
            with os.scandir(self.folder / path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        for entry in found:
            below = path / entry.name
            if entry.name.startswith("."):
                continue
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from self._walk(below, depth=depth - 1)
            else:
                yield str(below), depth == 1 and (entry.is_symlink() or entry.is_file(follow_symlinks=False))

    def read(self, path: str) -> bytes | None:
        """Read the document named at this path, or that its anchor stands for; None if a link's blob is missing.

        Raises TransferRefused if it cannot be the document that Ollama means, OSError if the disk fails.
        """
        if (self.folder / path).is_symlink():
            body = self.document(self._linked(path))
        else:
            body = _read(platform.open_regular(self.folder / path), path)
        if path.startswith(f"{MANIFESTS}/") and body is not None and (digest := anchored(body)) is not None:
            body = self.document(digest)
            if body is None:
                raise TransferRefused(
                    f"expected {digest} in {BLOBS}, for which this file stands with older versions of Ollama, "
                    "got none: pull the model again"
                )
        return body

    def document(self, digest: Digest) -> bytes | None:
        """Read a manifest or list from the blobs; None if it is missing. Raises the same errors as `read`."""
        try:
            body = _read(self.open_blob(digest), blob_path(digest))
        except FileNotFoundError:
            return None
        if (actual := sha256(body).hexdigest()) != digest.hex:
            raise TransferRefused(f"{blob_path(digest)}: expected {digest}, got sha256:{actual}")
        return body

    def has(self, digest: Digest) -> bool:
        """Return whether anything exists at the blob's path."""
        return os.path.lexists(self.folder / blob_path(digest))

    def open_blob(self, digest: Digest) -> int:
        """Open the blob's file. Raises OSError if there is none, TransferRefused if the folder is a link."""
        self._check_folder(PurePosixPath(BLOBS))
        return platform.open_regular(self.folder / blob_path(digest))

    def _linked(self, path: str) -> Digest:
        """Return the blob that a link names, without following it.

        Raises TransferRefused if it leads elsewhere.
        """
        target = os.readlink(self.folder / path)  # noqa: PTH115 -- a Path would change what Windows returns
        folder = Path(os.path.normpath(self.folder.absolute()))
        full = Path(os.path.normpath(folder / PurePosixPath(path).parent / target))
        digest = parse_blob_path(full.relative_to(folder).as_posix()) if full.is_relative_to(folder) else None
        if digest is None:
            raise TransferRefused(f"expected a link to {BLOBS}/sha256-… of the same folder, got one to {target!r:.200}")
        return digest

    def _check_folder(self, path: PurePosixPath) -> None:
        if (self.folder / path).is_symlink():
            raise TransferRefused(f"{self.folder / path}: expected a folder, got a link")


def _is_shadow(name: Name) -> bool:
    """Return whether Ollama made this name for one of its own conversions, which no registry has."""
    return name.place == (DEFAULT_HOST, "library/llamacpp") and bool(_SHADOW.fullmatch(name.reference))


def _read(descriptor: int, path: str) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        body = file.read(LONGEST_MANIFEST + 1)
    if len(body) > LONGEST_MANIFEST:
        raise TransferRefused(f"{path}: expected a manifest of at most {LONGEST_MANIFEST} bytes, got more")
    return body
