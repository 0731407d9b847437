"""What an Ollama does to its models folder when it starts, before and since v0.40.

Before (server/images.go PruneLayers, server/manifest.go, server/routes.go Serve; v0.33): unless OLLAMA_NOPRUNE is set,
every file in `blobs` that no manifest in `manifests` lists is removed, and so are names that are no digest, and empty
folders below `manifests`; one manifest that cannot be read stops it. Since v0.40.0 documents of both trees count, and
their children. Knows nothing of a cache.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.modelsfolder import sha256

_BLOB = re.compile(r"sha256-[0-9a-f]{64}")


def start(folder: Path, *, current: bool, noprune: bool = False) -> list[str]:
    """Start an Ollama on the folder; the blobs that it has removed. ValueError where it does not start pruning."""
    if noprune:
        return []
    trees = ("manifests-v2", "manifests") if current else ("manifests",)
    listed = {name for tree in trees for path in _files(folder / tree) for name in _listed(folder, path, current)}
    gone = []
    for path in sorted((folder / "blobs").iterdir()):
        if not _BLOB.fullmatch(path.name) or path.name not in listed:
            path.unlink()
            gone.append(path.name)
    for tree in trees:
        _prune_folder(folder / tree)
    return gone


def _files(tree: Path) -> Iterator[Path]:
    return (path for path in sorted(tree.glob("*/*/*/*")) if not path.is_dir())


def _listed(folder: Path, path: Path, current: bool) -> Iterator[str]:
    body = path.read_bytes()
    if current:
        yield f"sha256-{sha256(body)}"
    yield from _blobs(folder, json.loads(body), current)


def _blobs(folder: Path, document: Any, current: bool) -> Iterator[str]:
    for layer in [*(document.get("layers") or []), *([document["config"]] if document.get("config") else [])]:
        yield layer["digest"].replace(":", "-")
    for child in document.get("manifests", ()) if current else ():
        name = child["digest"].replace(":", "-")
        yield name
        if (folder / "blobs" / name).exists():
            yield from _blobs(folder, json.loads((folder / "blobs" / name).read_bytes()), current)


def _prune_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _prune_folder(path)
            if not list(path.iterdir()):
                path.rmdir()
