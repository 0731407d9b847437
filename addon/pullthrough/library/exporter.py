"""Export models of the store: to a models folder that Ollama can use, or to a bundle.

Invariant: every byte is hashed as it is copied, unless a folder shares the store's files. A model that lacks blobs, or
that its registry refuses to the public, is not exported at all. A manifest is put in place after its blobs, a bundle's
file when it is complete. Only reads the store, so it may run beside a daemon.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TransferRefused
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE, Child, children_of, in_place, preferred
from pullthrough.core.records import ManifestRecord, Name, by_model
from pullthrough.library.bundle import END, SUMS, header, padding, sums
from pullthrough.library.parallel_hash import FileRange, HashPool
from pullthrough.library.snapshot import Snapshot
from pullthrough.runtime import platform
from pullthrough.store.ollama_dir import (
    NAMED_DOCUMENTS,
    anchor,
    anchored,
    blob_path,
    document_path,
    link_target,
    manifest_path,
    parse_manifest_path,
)

BUNDLE_SUFFIX: Final = ".tar"


@dataclass(frozen=True, slots=True)
class Cargo:
    """The export, as in a models folder of Ollama."""

    manifests: dict[str, bytes]
    """By path, in order: manifests and anchors in the old tree, lists in the new tree."""
    lists: dict[Digest, bytes]
    """The lists again, which are blobs in such a folder, too."""
    blobs: dict[Digest, int]
    """All other blobs, with their sizes."""

    @property
    def size(self) -> int:
        return sum(self.blobs.values())

    @property
    def models(self) -> int:
        return len(set(map(parse_manifest_path, self.manifests)))


@dataclass(frozen=True, slots=True)
class _Part:
    """A manifest whose blobs are all stored: a model's own, or a child of its list."""

    child: Child | None
    """The child; None for a model's own manifest."""
    manifest: Mapping[str, Any]
    blobs: dict[Digest, int]
    """The blobs; if a list refers to the manifest, it is one of them."""


def select(
    inventory: Snapshot, models: Collection[str], *, on_left_out: Callable[[str], object] | None = None
) -> Cargo:
    """Select these models of the store. Raises TransferRefused unless each is stored, whole and not private.

    Of a model's two representations, and of a list's children, those that are whole are taken. With `on_left_out`, what
    cannot be exported is left out, and the function is told why.
    """
    found = {name: record for model in models for name, record in inventory.select(model).items()}
    cargo = Cargo({}, {}, {})
    for name, records in sorted(by_model(found).items()):
        try:
            _add(cargo, inventory, name, records)
        except TransferRefused as error:
            if on_left_out is None:
                raise
            on_left_out(str(error))
    lists = {digest: body for digest, body in sorted(cargo.lists.items()) if digest not in cargo.blobs}
    return Cargo(cargo.manifests, lists, dict(sorted(cargo.blobs.items())))


def _add(cargo: Cargo, inventory: Snapshot, name: Name, records: Sequence[ManifestRecord]) -> None:
    """Add a model to the cargo. Raises TransferRefused if it cannot be exported."""
    if any(record.denied for record in records):
        raise TransferRefused(f"{name}: expected a public model, got one that its registry refuses to everybody")
    whole: dict[bool, tuple[ManifestRecord, list[_Part]]] = {}
    refused = []
    for record in sorted(records, key=lambda record: record.confirmed):
        try:
            whole[record.is_list] = record, _parts(inventory, name, record)
        except TransferRefused as error:
            refused.append(error)
    if not whole:
        raise refused[-1]
    for record, parts in whole.values():
        for part in parts:
            cargo.blobs.update(part.blobs)
        if record.is_list:
            cargo.lists[Digest(record.digest)] = record.body
            cargo.manifests[document_path(name)] = record.body
            cargo.manifests[manifest_path(name)] = _anchor(record, parts)
    if False in whole:
        cargo.manifests[manifest_path(name)] = whole[False][0].body


def _parts(inventory: Snapshot, name: Name, record: ManifestRecord) -> list[_Part]:
    """Return the manifest, or those in a list, whose blobs are all stored. Raises TransferRefused if there are none."""
    if not record.is_list:
        if anchored(record.body) is not None:
            raise TransferRefused(
                f"{name}: expected a registry's manifest, got an anchor that Ollama writes for its older versions: "
                "remove the model, and import it again"
            )
        blobs = _sizes(record)
        if lacking := _lacking(inventory, blobs):
            raise TransferRefused(f"{name}: {lacking}")
        return [_Part(None, json.loads(record.body), blobs)]
    found = []
    lacking = "expected a manifest of its list in the store, got none: pull it first"
    for child in children_of(record.body):
        if child.digest is None:
            manifest, blobs = in_place(record.body, child), {layer.digest: layer.size for layer in child.layers}
        elif (known := inventory.children.get(child.digest)) is not None:
            manifest, blobs = json.loads(known.body), {child.digest: len(known.body), **_sizes(known)}
        else:
            continue
        if not (lacking := _lacking(inventory, blobs)):
            found.append(_Part(child, manifest, blobs))
    if not found:
        raise TransferRefused(f"{name}: {lacking}")
    return found


def _sizes(record: ManifestRecord) -> dict[Digest, int]:
    return {digest: size for digest, size in record.sizes.items() if size is not None}


def _lacking(inventory: Snapshot, blobs: Mapping[Digest, int]) -> str:
    """Return why these blobs cannot be exported; "" if they can."""
    for digest, size in blobs.items():
        held = inventory.blobs.get(digest)
        if held is None or not held.held or held.size is None:
            return f"expected all its blobs in the store, got none of {digest}: pull it first"
        if not held.public:
            return f"expected public blobs, got {digest}, which nobody has been granted yet"
        if held.size != size:
            return f"expected {size} bytes of {digest}, got {held.size}"
    return ""


def _anchor(record: ManifestRecord, parts: Sequence[_Part]) -> bytes:
    """Return the anchor of a list: what an older Ollama runs of it, and what makes it keep the rest."""
    children = {part.child: part for part in parts if part.child is not None}
    documents = {Digest(record.digest): (LIST_TYPE, len(record.body))}
    for child, part in children.items():
        if child.digest is not None:
            documents[child.digest] = DOCKER_TYPE, part.blobs[child.digest]
    best = preferred(children)
    assert best is not None
    return anchor(children[best].manifest, documents)


def overwritten(cargo: Cargo, target: Path) -> list[Path]:
    """Return what an export to `target` would replace: the bundle, or manifests of other bytes in a models folder."""
    if target.name.endswith(BUNDLE_SUFFIX):
        return [target] if os.path.lexists(target) else []
    present = {target / path: body for path, body in cargo.manifests.items() if (target / path).exists()}
    return [path for path, body in present.items() if path.read_bytes() != body]


def export_tree(
    inventory: Snapshot,
    cargo: Cargo,
    folder: Path,
    *,
    link: bool = False,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the cargo into a models folder, which may already exist.

    With `link` its blobs take no room: they share their bytes with the store's, by reflinks or else hard links. Raises
    TransferRefused if they cannot, OSError if the disk fails.
    """
    crew = HashPool(on_bytes)
    manifests, documents = dict(cargo.manifests), dict(cargo.lists)
    for path, body in cargo.manifests.items():
        name = parse_manifest_path(path)
        if name is None or document_path(name) in cargo.manifests:
            continue
        if os.path.lexists(folder / document_path(name)):
            # A newer Ollama has another document of that name in the new tree, where it looks first.
            manifests[document_path(name)] = body
            documents[Digest(sha256(body).hexdigest())] = body
    paths = {digest: folder / blob_path(digest) for digest in (*cargo.blobs, *documents)}
    for target in [*paths.values(), *(folder / path for path in manifests)]:
        target.parent.mkdir(parents=True, exist_ok=True)

    def work(digest: Digest) -> None:
        target = paths[digest]
        if link:
            _share(inventory, digest, cargo.blobs[digest], target)
            return
        if _has(crew, target, digest, cargo.blobs[digest]):
            return
        with _opened(inventory, digest, cargo.blobs[digest]) as source, _placed(target) as descriptor:
            _compare(digest, crew.copy(source, descriptor))

    todo = sorted(cargo.blobs, key=lambda digest: -cargo.blobs[digest])
    crew.each(todo, work, lambda _, result: result())
    for digest, body in documents.items():
        _write(paths[digest], body)
    for path, body in manifests.items():
        if not (path.startswith(f"{NAMED_DOCUMENTS}/") and _link(folder / path, Digest(sha256(body).hexdigest()))):
            _write(folder / path, body)
    for parent in {(folder / path).parent for path in manifests} | {path.parent for path in paths.values()}:
        platform.sync_folder(parent)


def export_bundle(
    inventory: Snapshot, cargo: Cargo, file: BinaryIO, *, on_bytes: Callable[[int], object] = lambda count: None
) -> None:
    """Write the cargo as a bundle, front to back. After an error its end is missing, so it cannot pass for complete."""
    crew = HashPool(on_bytes)
    first = cargo.manifests | {blob_path(digest): body for digest, body in cargo.lists.items()}
    members = {path: sha256(body).hexdigest() for path, body in first.items()}
    members |= {blob_path(digest): digest.hex for digest in cargo.blobs}
    for path, body in {SUMS: sums(members), **first}.items():
        file.write(header(path, len(body)) + body + padding(len(body)))
    for digest, size in cargo.blobs.items():
        with _opened(inventory, digest, size) as source:
            file.write(header(blob_path(digest), size))
            _compare(digest, crew.pour(source, file.write))
            file.write(padding(size))
    file.write(END)
    file.flush()


def export_bundle_file(
    inventory: Snapshot, cargo: Cargo, path: Path, *, on_bytes: Callable[[int], object] = lambda count: None
) -> None:
    """Write the bundle into a file, put in place once it is complete and durable. Raises TransferRefused."""
    if path.is_dir():
        raise TransferRefused(f"{path} is a folder: name a file for the bundle, or a folder of another name")
    with _placed(path) as descriptor:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            export_bundle(inventory, cargo, file, on_bytes=on_bytes)
        platform.sync_data(descriptor)
    platform.sync_folder(path.parent)


def _share(inventory: Snapshot, digest: Digest, size: int, target: Path) -> None:
    """Share the blob's bytes with the target without a copy, if the blob's file is the one that was verified."""
    with _opened(inventory, digest, size) as source:
        path, status = inventory.blob_path(digest), os.fstat(source.descriptor)
        if target.exists() and os.path.samestat(target.stat(), status):
            return
        if not inventory.blobs[digest].is_file(size, status.st_mtime_ns, status.st_ino):
            raise TransferRefused(f"blob {digest}: its file is not the one that was verified; run verify")
        temporary = _temporary(target)
        try:
            if not _cloned(source.descriptor, temporary):
                temporary.hardlink_to(path)
        except OSError as error:
            raise TransferRefused(
                f"{target} cannot share the bytes of {path} ({error.strerror}): name a folder on the store's own disk, "
                "or leave out --link, which copies them"
            ) from error
        os.replace(temporary, target)


def _cloned(source: int, path: Path) -> bool:
    """Make a new file that shares the blocks of an open one. Return False, leaving no file, if that is impossible."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if is_cloned := platform.reflink(source, descriptor):
            platform.sync_data(descriptor)
    finally:
        os.close(descriptor)
    if not is_cloned:
        path.unlink()
    return is_cloned


def _has(crew: HashPool, path: Path, digest: Digest, size: int) -> bool:
    """Return whether an earlier export has put the blob there."""
    try:
        descriptor = platform.open_regular(path)
    except OSError:
        return False
    try:
        source = FileRange.whole(descriptor)
        return source.size == size and crew.hash(source) == digest.hex
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _opened(inventory: Snapshot, digest: Digest, size: int) -> Iterator[FileRange]:
    try:
        descriptor = platform.open_regular(inventory.blob_path(digest))
    except OSError as error:
        raise TransferRefused(f"blob {digest}: expected its file, got: {error}; run verify") from error
    try:
        source = FileRange.whole(descriptor)
        if source.size != size:
            raise TransferRefused(f"blob {digest}: expected {size} bytes, got {source.size}; run verify")
        yield source
    finally:
        os.close(descriptor)


def _write(path: Path, body: bytes) -> None:
    with _placed(path) as descriptor:
        platform.write_at(descriptor, 0, body)
        platform.sync_data(descriptor)


def _link(path: Path, digest: Digest) -> bool:
    """Make the name in the new tree a link to its document. Return False if links cannot be made."""
    temporary = _temporary(path)
    try:
        temporary.symlink_to(Path(link_target(digest)))
    except OSError:
        return False  # no links on this file system, or forbidden by Windows: Ollama makes copies there, too
    os.replace(temporary, path)
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[int]:
    """Yield a new file to write, which takes the path's place if nothing fails."""
    temporary = _temporary(path)
    # Readable by all, for an Ollama that runs as another user.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    try:
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _compare(digest: Digest, actual: str) -> None:
    if actual != digest.hex:
        raise TransferRefused(f"blob {digest}: expected bytes of this digest, got sha256:{actual}; run verify")
