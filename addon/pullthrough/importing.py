"""Take models from a models folder of Ollama, or from a bundle, into the store.

`Staging` copies and verifies into a folder of its own inside the store, and needs no lock; the second step, which
`admission` has, is for whoever holds the store. Invariant: a model is imported whole or not at all, and a bundle as
well; nothing enters that was not hashed here. Knows no terminal.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from pullthrough import platform
from pullthrough.admission import Fate, Model, Outcome
from pullthrough.bundle import Member, check_whole, read_members
from pullthrough.copying import Crew, Extent
from pullthrough.digest import Digest
from pullthrough.errors import StoreUnwritable, TransferRefused
from pullthrough.modeltree import LONGEST_MANIFEST, ModelTree, blob_path
from pullthrough.records import Name
from pullthrough.store import STAGING


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the store may take, in bytes."""

    max_size: int | None = None
    min_free: int = 0


class Staging:
    """A folder inside the store for what is being verified; gone at the end, and at the next start after a crash."""

    def __init__(
        self,
        store_folder: Path,
        *,
        held: Mapping[Digest, int],
        bounds: Bounds = Bounds(),
        link: bool = False,
        on_total: Callable[[int], object] = lambda size: None,
        on_bytes: Callable[[int], object] = lambda count: None,
    ) -> None:
        """`held` are the sizes of the blobs that the store has. `link` allows hard links to files of our own user."""
        self._store_folder = store_folder
        self._held = held
        self._bounds = bounds
        self._link = link
        self._on_total = on_total
        self._crew = Crew(on_bytes)
        self._size = sum(held.values())
        self._free = 0
        self._turn = threading.Lock()
        self.folder = Path()

    def __enter__(self) -> "Staging":
        try:
            parent = self._store_folder / "ingest"
            self._free = shutil.disk_usage(parent).free
            self.folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=parent))
        except OSError as error:
            raise StoreUnwritable(f"importing: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def take_tree(self, tree: ModelTree, models: Sequence[Model], done: Callable[[Model, str], object]) -> None:
        """Stage the models of a folder; `done` gets each, with what is wrong with it or "" as soon as that is known."""
        users: dict[Digest, list[tuple[Model, int | None]]] = {}
        for model in models:
            for digest, size in model.record.sizes.items():
                users.setdefault(digest, []).append((model, size))
        missing = {id(model): set(model.record.digests) for model in models}

        def work(digest: Digest) -> int:
            with _opened(tree, digest) as source:
                self._stage(digest, source, tree.folder / blob_path(digest) if self._link else None)
                return source.size

        def arrived(digest: Digest, result: Callable[[], int]) -> None:
            size, wrong = -1, ""
            try:
                size = result()
            except (OSError, TransferRefused) as error:
                wrong = _told(error, digest)
            for model, claimed in users[digest]:
                left = missing.get(id(model))
                if left is None:
                    continue  # refused for another blob
                left.discard(digest)
                if not wrong and claimed is not None and size != claimed:
                    wrong = f"blob {digest}: expected {claimed} bytes, got {size}"
                if wrong or not left:
                    del missing[id(model)]
                    done(model, wrong)

        todo: list[Digest] = []
        for digest in users:
            if digest in self._held:
                arrived(digest, partial(self._held.__getitem__, digest))
            else:
                todo.append(digest)
        self._on_total(sum(users[digest][0][1] or 0 for digest in todo))
        self._crew.each(todo, work, arrived)

    def take_bundle(self, path: Path) -> list[Model]:
        """Verify every byte of a bundle and stage what is not held. TransferRefused if anything is wrong with it."""
        with os.fdopen(platform.open_regular(path), "rb") as file:
            members = read_members(file)
            models = [self._read_model(file.fileno(), member) for member in members if member.name is not None]
            blobs = [member for member in members if member.digest is not None]
            check_whole((digest for model in models for digest in model.record.digests), map(_digest_of, blobs))
            sizes = {_digest_of(member): member.size for member in blobs}
            for model in models:
                for digest, size in model.record.sizes.items():
                    if size is not None and sizes[digest] != size:
                        raise TransferRefused(f"{model.name}: expected {size} bytes of {digest}, got {sizes[digest]}")
            self._on_total(sum(sizes.values()))

            def work(member: Member) -> None:
                self._stage(_digest_of(member), Extent(file.fileno(), member.offset, member.size))

            self._crew.each(sorted(blobs, key=lambda member: -member.size), work, lambda _, result: result())
        return models

    def _read_model(self, descriptor: int, member: Member) -> Model:
        assert member.name is not None
        if member.size > LONGEST_MANIFEST:
            raise TransferRefused(f"{member.path}: expected at most {LONGEST_MANIFEST} bytes, got {member.size}")
        body = platform.read_at(descriptor, member.offset, member.size)
        if (actual := sha256(body).hexdigest()) != member.sha256:
            raise TransferRefused(f"{member.path}: expected sha256:{member.sha256}, got sha256:{actual}")
        return Model.parse(member.name, body)

    def _stage(self, digest: Digest, source: Extent, linked: Path | None = None) -> None:
        """Put a verified copy into the folder; where the blob is held, only see that it is right in the source too."""
        target = self.folder / digest.file_name
        if digest in self._held:
            actual = self._crew.hash(source)
        else:
            try:
                actual = self._copy(source, target, digest, linked)
            except BaseException:
                target.unlink(missing_ok=True)
                raise
        if actual != digest.hex:
            target.unlink(missing_ok=True)
            raise TransferRefused(f"{blob_path(digest)}: expected {digest}, got sha256:{actual}")

    def _copy(self, source: Extent, target: Path, digest: Digest, linked: Path | None) -> str:
        with self._turn:
            self._size += source.size
            if self._bounds.max_size is not None and self._size > self._bounds.max_size:
                raise StoreUnwritable(
                    f"importing {digest}: expected at most {self._bounds.max_size} bytes in the store (max_size), "
                    f"got {self._size} with it; an import evicts nothing"
                )
        if linked is not None and _link(linked, source, target):
            before = os.fstat(source.descriptor)
            actual = self._crew.hash(source)
            after = os.fstat(source.descriptor)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise TransferRefused(f"{blob_path(digest)}: expected a file at rest, got one that is being written")
            platform.sync_data(source.descriptor)
            return actual
        try:
            descriptor = platform.open_descriptor(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                return self._crew.copy(source, descriptor, reserve=lambda: self._reserve(digest, source.size))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreUnwritable(f"importing {digest}: {error}") from error

    def _reserve(self, digest: Digest, size: int) -> None:
        with self._turn:
            self._free -= size
            if self._free < self._bounds.min_free:
                raise StoreUnwritable(
                    f"importing {digest}: expected {self._bounds.min_free} bytes of the disk to stay free (min_free), "
                    f"got {self._free} with it"
                )


def take(source: Path, staging: Staging, admit: Callable[[Model], Outcome]) -> list[Outcome]:
    """Stage the models of a folder or bundle, and have those that are whole admitted; the outcome of each.

    TransferRefused, with nothing admitted, for a bundle with anything wrong in it.
    """
    if not source.is_dir():
        return [admit(model) for model in staging.take_bundle(source)]
    tree = ModelTree(source)
    named, strays = tree.models()
    stray = "expected a manifest at manifests/host/namespace/model/tag, got something else"
    outcomes = [Outcome(path, Fate.REFUSED, stray) for path in strays]
    models: list[Model] = []
    for name, paths in named.items():
        try:
            models.append(_read_model(tree, name, paths))
        except (OSError, TransferRefused) as error:
            outcomes.append(Outcome(str(name), Fate.REFUSED, str(error)))

    def done(model: Model, wrong: str) -> None:
        outcomes.append(Outcome(str(model.name), Fate.REFUSED, wrong) if wrong else admit(model))

    staging.take_tree(tree, models, done)
    return sorted(outcomes, key=lambda outcome: outcome.model)


def _read_model(tree: ModelTree, name: Name, paths: Sequence[str]) -> Model:
    """The model that the first of the paths names that leads somewhere."""
    for path in paths:
        if (body := tree.read(path)) is not None:
            return Model.parse(name, body)
    raise TransferRefused(f"expected a document where the link {paths[0]} leads, got none")


@contextlib.contextmanager
def _opened(tree: ModelTree, digest: Digest) -> Iterator[Extent]:
    descriptor = tree.open_blob(digest)
    try:
        yield Extent.whole(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, source: Extent, target: Path) -> bool:
    """Give the open file a second name in the store.

    Only if nobody but our own user can write to it: who can could change a blob after it was verified, and in the
    store nobody but us may. Not on Windows, whose files have no such owner.
    """
    status = os.fstat(source.descriptor)
    if sys.platform == "win32" or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        return False  # another file system, or one without links
    if os.path.samestat(target.lstat(), status):
        return True
    target.unlink()  # the name leads elsewhere by now
    return False


def _digest_of(member: Member) -> Digest:
    assert member.digest is not None
    return member.digest


def _told(error: Exception, digest: Digest) -> str:
    if isinstance(error, FileNotFoundError):
        return f"blob {digest}: expected its file, got none"
    return f"blob {digest}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
