"""Carry models of the store out: to a models folder that Ollama can use, or to a bundle.

Invariant: every byte is hashed as it is copied, and a model whose blobs are not all here, or that its registry refuses
to everybody, is not exported at all. A manifest comes to its place after its blobs, a bundle's file when it is whole.
Only reads the store, so it may run beside a daemon. Knows no terminal.
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pullthrough import platform
from pullthrough.bundle import END, SUMS, header, padding, sums
from pullthrough.copying import Crew, Extent
from pullthrough.digest import Digest
from pullthrough.errors import TransferRefused
from pullthrough.inventory import Inventory
from pullthrough.modeltree import blob_path, manifest_path
from pullthrough.records import by_model


@dataclass(frozen=True, slots=True)
class Cargo:
    """What is carried: paths as in a models folder of Ollama, in order."""

    manifests: dict[str, bytes]
    sha256: dict[str, str]
    """Of the manifests."""
    blobs: dict[Digest, int]
    """With their sizes."""

    @property
    def size(self) -> int:
        return sum(self.blobs.values())


def select(inventory: Inventory, models: Collection[str]) -> Cargo:
    """These models of the store. TransferRefused unless each is there, whole and not private."""
    found = {name: record for model in models for name, record in inventory.select(model).items()}
    manifests, hashes, blobs = {}, {}, {}
    for name, records in sorted(by_model(found).items()):
        record = next((record for record in records if not record.is_list), None)
        if record is None:
            raise TransferRefused(f"{name}: expected a manifest, got only a list of them: pull it with an older Ollama")
        if record.denied:
            raise TransferRefused(f"{name}: expected a public model, got one that its registry refuses to everybody")
        for digest, size in record.sizes.items():
            held = inventory.blobs.get(digest)
            if held is None or not held.held or held.size is None:
                raise TransferRefused(
                    f"{name}: expected all its blobs in the store, got none of {digest}: pull it first"
                )
            if not held.public:
                raise TransferRefused(f"{name}: expected public blobs, got {digest}, which nobody has been granted yet")
            if held.size != size:
                raise TransferRefused(f"{name}: expected {size} bytes of {digest}, got {held.size}")
            blobs[digest] = size
        path = manifest_path(name)
        manifests[path] = record.body
        hashes[path] = record.digest
    return Cargo(manifests, hashes, dict(sorted(blobs.items())))


def export_tree(
    inventory: Inventory, cargo: Cargo, folder: Path, *, on_bytes: Callable[[int], object] = lambda count: None
) -> None:
    """Write the cargo into a models folder, which may be there already. OSError as the disk says."""
    crew = Crew(on_bytes)
    paths = {digest: folder / blob_path(digest) for digest in cargo.blobs}
    for target in [*paths.values(), *(folder / path for path in cargo.manifests)]:
        target.parent.mkdir(parents=True, exist_ok=True)

    def work(digest: Digest) -> None:
        target = paths[digest]
        if _has(crew, target, digest, cargo.blobs[digest]):
            return
        with _opened(inventory, digest, cargo.blobs[digest]) as source, _placed(target) as descriptor:
            _compare(digest, crew.copy(source, descriptor))

    todo = sorted(cargo.blobs, key=lambda digest: -cargo.blobs[digest])
    crew.each(todo, work, lambda _, result: result())
    for path, body in cargo.manifests.items():
        with _placed(folder / path) as descriptor:
            platform.write_at(descriptor, 0, body)
            platform.sync_data(descriptor)
    for parent in {(folder / path).parent for path in cargo.manifests} | {path.parent for path in paths.values()}:
        platform.sync_folder(parent)


def export_bundle(
    inventory: Inventory, cargo: Cargo, file: BinaryIO, *, on_bytes: Callable[[int], object] = lambda count: None
) -> None:
    """Write the cargo as a bundle, front to back. An error leaves it without its end, so nobody takes it for whole."""
    crew = Crew(on_bytes)
    members = cargo.sha256 | {blob_path(digest): digest.hex for digest in cargo.blobs}
    for path, body in {SUMS: sums(members), **cargo.manifests}.items():
        file.write(header(path, len(body)) + body + padding(len(body)))
    for digest, size in cargo.blobs.items():
        with _opened(inventory, digest, size) as source:
            file.write(header(blob_path(digest), size))
            _compare(digest, crew.pour(source, file.write))
            file.write(padding(size))
    file.write(END)
    file.flush()


def export_bundle_file(
    inventory: Inventory, cargo: Cargo, path: Path, *, on_bytes: Callable[[int], object] = lambda count: None
) -> None:
    """The same into a file, which is in its place when it is whole and durable."""
    with _placed(path) as descriptor:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            export_bundle(inventory, cargo, file, on_bytes=on_bytes)
        platform.sync_data(descriptor)
    platform.sync_folder(path.parent)


def _has(crew: Crew, path: Path, digest: Digest, size: int) -> bool:
    """An earlier export has put the blob there."""
    try:
        descriptor = platform.open_regular(path)
    except OSError:
        return False
    try:
        source = Extent.whole(descriptor)
        return source.size == size and crew.hash(source) == digest.hex
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _opened(inventory: Inventory, digest: Digest, size: int) -> Iterator[Extent]:
    try:
        descriptor = platform.open_regular(inventory.blob_path(digest))
    except OSError as error:
        raise TransferRefused(f"blob {digest}: expected its file, got: {error}; run verify") from error
    try:
        source = Extent.whole(descriptor)
        if source.size != size:
            raise TransferRefused(f"blob {digest}: expected {size} bytes, got {source.size}; run verify")
        yield source
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[int]:
    """A new file to write, which takes the path's place when nothing fails."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    # Readable by all: an Ollama that runs as a user of its own is to read it.
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
