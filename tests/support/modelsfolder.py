"""A models folder, written and read the way `ollama serve` does it (server/manifest.go, types/model/name.go, v0.33).

Invariant: what is read is checked as far as Ollama relies on it: a manifest at four levels, whose every blob is a
regular file of the size that it claims, named by its hash. Knows nothing of the product.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,349}")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_of(*blobs: bytes) -> bytes:
    """The manifest of these layers, the last of which is the config; spaced as no JSON library does by itself."""
    described = [
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{sha256(blob)}", "size": len(blob)}
        for blob in blobs
    ]
    document = {"schemaVersion": 2, "config": described[-1], "layers": described[:-1]}
    return json.dumps(document, separators=(" ,", ":  ")).encode() + b"\n \n"


def write_model(folder: Path, name: str, blobs: Sequence[bytes]) -> bytes:
    """Put a model (`host/namespace/model/tag`) in place and return its manifest."""
    for blob in blobs:
        path = folder / "blobs" / f"sha256-{sha256(blob)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
    manifest = manifest_of(*blobs)
    path = folder / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(manifest)
    return manifest


def read_models(folder: Path) -> dict[str, tuple[bytes, tuple[bytes, ...]]]:
    """`ollama list` and the loading of each: name → manifest, and its blobs in order, the config last."""
    models = {}
    for path in sorted(folder.glob("manifests/*/*/*/*")):
        parts = path.relative_to(folder / "manifests").parts
        assert _HOST.fullmatch(parts[0]) and all(_PART.fullmatch(part) for part in parts[1:]), parts
        manifest = path.read_bytes()
        document = json.loads(manifest)
        blobs = []
        for layer in [*document["layers"], document["config"]]:
            blob = folder / "blobs" / layer["digest"].replace(":", "-")
            assert blob.is_file() and not blob.is_symlink(), blob
            data = blob.read_bytes()
            assert (len(data), f"sha256:{sha256(data)}") == (layer["size"], layer["digest"])
            blobs.append(data)
        models["/".join(parts)] = (manifest, tuple(blobs))
    return models
