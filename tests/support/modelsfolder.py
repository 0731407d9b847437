"""A models folder, written and read the way `ollama serve` does it: before v0.40, and since.

    v0.33    server/manifest.go, types/model/name.go: manifests/ holds each manifest
    v0.40    manifest/manifest.go, manifest/paths.go: documents are blobs, manifests-v2/ names them, manifests/ has
             for older versions what they can run

Invariant: what is read is checked as far as Ollama relies on it: a name at four levels; a link that leads to a blob of
the folder; a blob that is a regular file, of the size that is claimed for it, named by its hash. Knows nothing of the
product.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
LIST_TYPE: Final = "application/vnd.ollama.manifest.list.v2+json"
LAYER_TYPE: Final = "application/vnd.ollama.image.model"
PUBLIC_HOSTS: Final = ("registry.ollama.ai", "ollama.com")
"""One registry; the first names it in the old tree, the second in the new one."""
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,349}")
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
_BLOB: Final = re.compile(r"sha256-[0-9a-f]{64}")

Kind = Literal["link", "hard link", "copy"]
"""What a name of the new tree is, from best to worst."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_of(*blobs: bytes) -> bytes:
    """The manifest of these layers, the last of which is the config; spaced as no JSON library does by itself."""
    described = [{"mediaType": LAYER_TYPE, "digest": f"sha256:{sha256(blob)}", "size": len(blob)} for blob in blobs]
    document = {"schemaVersion": 2, "config": described[-1], "layers": described[:-1]}
    return json.dumps(document, separators=(" ,", ":  ")).encode() + b"\n \n"


def list_of(children: Mapping[str, bytes]) -> bytes:
    """The list of these manifests by runner; as bare as a registry writes it, but spaced as nobody does."""
    described = [
        {"mediaType": MANIFEST_TYPE, "digest": f"sha256:{sha256(child)}", "runner": runner, "format": "gguf"}
        for runner, child in children.items()
    ]
    document = {"schemaVersion": 2, "mediaType": LIST_TYPE, "manifests": described}
    return json.dumps(document, separators=(" ,", ":  ")).encode() + b"\n"


# --- written


def write_blob(folder: Path, data: bytes) -> Path:
    """Put a blob in place."""
    path = folder / "blobs" / f"sha256-{sha256(data)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_model(folder: Path, name: str, blobs: Sequence[bytes]) -> bytes:
    """Put a model (`host/namespace/model/tag`) in place as before v0.40, and return its manifest."""
    for blob in blobs:
        write_blob(folder, blob)
    manifest = manifest_of(*blobs)
    _new_file(folder / "manifests" / name).write_bytes(manifest)
    return manifest


def write_document(folder: Path, name: str, document: bytes, *, kind: Kind = "link") -> Path:
    """Put a manifest or list among the blobs and name it in the new tree; the path of the name."""
    blob = write_blob(folder, document)
    path = _new_file(document_path(folder, name))
    match kind:
        case "link":
            path.symlink_to(Path("../../../../blobs") / blob.name)
        case "hard link":
            path.hardlink_to(blob)
        case "copy":
            path.write_bytes(document)
    return path


def write_anchor(folder: Path, name: str, manifest: bytes, documents: Sequence[bytes]) -> bytes:
    """Put what an older version can run into the old tree: the manifest, decoded and encoded anew, and what to keep."""
    parsed = json.loads(manifest)
    kept = [
        {
            "mediaType": LIST_TYPE if b"manifests" in document else MANIFEST_TYPE,
            "digest": f"sha256:{sha256(document)}",
            "size": len(document),
        }
        for document in documents
    ]
    anchor = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": parsed["config"],
        "layers": [*parsed["layers"], *kept],
    }
    body = json.dumps(anchor, separators=(",", ":")).encode() + b"\n"
    _new_file(folder / "manifests" / name).write_bytes(body)
    return body


def pull_plain(folder: Path, name: str, blobs: Sequence[bytes], *, kind: Kind = "link") -> bytes:
    """What a pull of a plain manifest leaves since v0.40; the manifest."""
    for blob in blobs:
        write_blob(folder, blob)
    manifest = manifest_of(*blobs)
    write_document(folder, name, manifest, kind=kind)
    write_anchor(folder, name, manifest, [manifest])
    return manifest


def pull_list(
    folder: Path,
    name: str,
    children: Mapping[str, Sequence[bytes]],
    *,
    pulled: Sequence[str],
    kind: Kind = "link",
) -> bytes:
    """What pulls of a list leave, of whose children by runner only some were chosen; the list."""
    manifests = {runner: manifest_of(*blobs) for runner, blobs in children.items()}
    document = list_of(manifests)
    for runner in pulled:
        write_blob(folder, manifests[runner])
        for blob in children[runner]:
            write_blob(folder, blob)
    write_document(folder, name, document, kind=kind)
    write_anchor(folder, name, manifests[pulled[-1]], [document, *(manifests[runner] for runner in pulled)])
    return document


def write_shadow(folder: Path, blobs: Sequence[bytes]) -> Path:
    """What the conversion of a model on the spot leaves in the old tree: a manifest named by its own digest."""
    for blob in blobs:
        write_blob(folder, blob)
    parsed = json.loads(manifest_of(*blobs))
    for layer in parsed["layers"]:
        layer["from"] = f"sha256-{sha256(blobs[0])}"
    body = json.dumps(parsed).encode()
    write_blob(folder, body)
    path = _new_file(folder / "manifests" / PUBLIC_HOSTS[0] / "library" / "llamacpp" / sha256(body))
    path.write_bytes(body)
    return path


def document_path(folder: Path, name: str) -> Path:
    """Where the new tree names a model."""
    host, rest = name.split("/", 1)
    return folder / "manifests-v2" / (PUBLIC_HOSTS[1] if host in PUBLIC_HOSTS else host.replace(":", "%3A")) / rest


def _new_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


# --- read


def read_models(folder: Path) -> dict[str, tuple[bytes, tuple[bytes, ...]]]:
    """`ollama list` before v0.40, and the loading of each: name → manifest, and its blobs in order, the config last."""
    models = {}
    for path in sorted(folder.glob("manifests/*/*/*/*")):
        parts = path.relative_to(folder / "manifests").parts
        assert _HOST.fullmatch(parts[0]) and all(_PART.fullmatch(part) for part in parts[1:]), parts
        manifest = path.read_bytes()
        models["/".join(parts)] = (manifest, _blobs_of(folder, json.loads(manifest)))
    return models


@dataclass(frozen=True, slots=True)
class Listed:
    """A model that `ollama list` shows since v0.40."""

    document: bytes
    """Whose hash is the digest that is shown."""
    runnable: dict[str, tuple[bytes, ...]]
    """The manifests that can be run, by digest, with their blobs in order: itself, or the children that are here."""


def read_current(folder: Path) -> dict[str, Listed]:
    """The same since v0.40: the new tree first, and for each name by itself the old one where that leads nowhere."""
    models: dict[str, Listed] = {}
    for tree in ("manifests-v2", "manifests"):
        for path in sorted(folder.glob(f"{tree}/*/*/*/*")):
            host, *rest = path.relative_to(folder / tree).parts
            if rest[-1].startswith("."):
                continue
            host = re.sub("%3[Aa]", ":", host)
            assert _HOST.fullmatch(host) and all(_PART.fullmatch(part) for part in rest), path
            name = "/".join((PUBLIC_HOSTS[0] if host in PUBLIC_HOSTS else host, *rest))
            if name not in models and (document := _read_document(folder, path)) is not None:
                models[name] = Listed(document, dict(_runnable(folder, document)))
    return models


def _read_document(folder: Path, path: Path) -> bytes | None:
    """OpenVerifiedManifest; None for a link that dangles."""
    if not path.is_symlink():
        assert path.is_file(), path
        return path.read_bytes()
    target = Path(os.path.normpath(path.parent / path.readlink()))
    assert target.parent == folder / "blobs" and _BLOB.fullmatch(target.name), f"{target} is not a sha256 blob"
    if not path.exists():
        return None
    document = target.read_bytes()
    assert f"sha256-{sha256(document)}" == target.name, "digest mismatch"
    return document


def _runnable(folder: Path, document: bytes) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """parseManifest, and selectManifest for every runner."""
    parsed = json.loads(document)
    if parsed.get("mediaType") != LIST_TYPE:
        yield f"sha256:{sha256(document)}", _blobs_of(folder, parsed)
        return
    found = 0
    for child in parsed["manifests"]:
        assert child["mediaType"] == MANIFEST_TYPE, "nested manifest lists are not supported"
        path = folder / "blobs" / child["digest"].replace(":", "-")
        if path.exists():
            body = path.read_bytes()
            assert f"sha256:{sha256(body)}" == child["digest"], "digest mismatch"
            yield child["digest"], _blobs_of(folder, json.loads(body))
            found += 1
    assert found, "no compatible manifest found"


def _blobs_of(folder: Path, manifest: Any) -> tuple[bytes, ...]:
    blobs = []
    for layer in [*manifest["layers"], manifest["config"]]:
        blob = folder / "blobs" / layer["digest"].replace(":", "-")
        assert blob.is_file() and not blob.is_symlink(), blob
        data = blob.read_bytes()
        assert (len(data), f"sha256:{sha256(data)}") == (layer["size"], layer["digest"])
        blobs.append(data)
    return tuple(blobs)
