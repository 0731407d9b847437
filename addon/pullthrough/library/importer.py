"""The import of models from a models folder of Ollama, or from a bundle, into the store.

`Staging` copies and verifies into its own folder inside the store, and needs no lock; the second step, in
`import_commit`, is for the process that holds the store. Invariant: a model is imported whole or not at all, and so is
a bundle; nothing gets in that was not hashed here.
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

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable, TransferRefused
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.bundle import Member, check_whole, read_members
from pullthrough.library.import_commit import Fate, ImportOutcome, Model, needs
from pullthrough.library.parallel_hash import FileRange, HashPool
from pullthrough.runtime import platform
from pullthrough.store.ollama_dir import LONGEST_MANIFEST, OllamaDir, anchored, blob_path
from pullthrough.store.store import STAGING


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of the store, in bytes."""

    max_size: int | None = None
    min_free: int = 0


class Staging:
    """A folder in the store for blobs under verification; removed at the end, or at the next start after a crash."""

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
        self._crew = HashPool(on_bytes)
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

    def take_tree(self, tree: OllamaDir, models: Sequence[Model], done: Callable[[Model, str], object]) -> None:
        """Stage the models of a folder; call `done` with each and its fault ("" if it has none) once that is known."""
        users: dict[Digest, list[tuple[Model, int]]] = {}
        for model in models:
            for digest, size in model.blobs.items():
                users.setdefault(digest, []).append((model, size))
        missing = {id(model): set(model.blobs) for model in models}

        def work(digest: Digest) -> int:
            with _opened(tree, digest) as source:
                self._stage(digest, source, tree.folder / blob_path(digest) if self._link else None)
                return source.size

        def arrived(digest: Digest, result: Callable[[], int]) -> None:
            size, unread = -1, ""
            try:
                size = result()
            except (OSError, TransferRefused) as error:
                unread = _told(error, digest)
            for model, claimed in users[digest]:
                left = missing.get(id(model))
                if left is None:
                    continue  # already refused because of another blob
                left.discard(digest)
                wrong = unread
                if not wrong and size != claimed:
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
        self._on_total(sum(users[digest][0][1] for digest in todo))
        self._crew.each(todo, work, arrived)

    def take_bundle(self, path: Path) -> list[Model]:
        """Verify every byte of a bundle and stage what is not held. Raises TransferRefused if anything is wrong."""
        with os.fdopen(platform.open_regular(path), "rb") as file:
            members = read_members(file)
            blobs = {member.digest: member for member in members if member.digest is not None}
            models, documents = _read_bundle(file.fileno(), members, blobs)
            wanted = [*documents.items(), *(blob for model in models for blob in model.blobs.items())]
            check_whole((digest for digest, _ in wanted), blobs)
            for digest, size in wanted:
                if blobs[digest].size != size:
                    raise TransferRefused(f"blob {digest}: expected {size} bytes, got {blobs[digest].size}")
            self._on_total(sum(member.size for member in blobs.values()))

            def work(digest: Digest) -> None:
                self._stage(digest, FileRange(file.fileno(), blobs[digest].offset, blobs[digest].size))

            self._crew.each(sorted(blobs, key=lambda digest: -blobs[digest].size), work, lambda _, result: result())
        return models

    def holds(self, digest: Digest) -> bool:
        """Return whether the store has the blob."""
        return digest in self._held

    def _stage(self, digest: Digest, source: FileRange, linked: Path | None = None) -> None:
        """Put a verified copy into the folder; if the blob is held, only check it in the source."""
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

    def _copy(self, source: FileRange, target: Path, digest: Digest, linked: Path | None) -> str:
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


def take(source: Path, staging: Staging, admit: Callable[[Model], ImportOutcome]) -> list[ImportOutcome]:
    """Stage the models of a folder or bundle, have the whole ones admitted, and return the outcome of each.

    Raises TransferRefused, admitting nothing, if anything in a bundle is wrong.
    """
    outcomes: list[ImportOutcome] = []
    if not source.is_dir():
        outcomes += map(admit, staging.take_bundle(source))
    else:
        tree = OllamaDir(source)
        named, strays = tree.models()
        stray = "expected a manifest at manifests/host/namespace/model/tag, got something else"
        outcomes += (ImportOutcome(path, Fate.REFUSED, stray) for path in strays)
        models: list[Model] = []
        for name, paths in named.items():
            try:
                models += _read_tree(tree, name, paths, staging.holds)
            except (OSError, TransferRefused) as error:
                outcomes.append(ImportOutcome(str(name), Fate.REFUSED, str(error)))

        def done(model: Model, wrong: str) -> None:
            outcomes.append(ImportOutcome(str(model.name), Fate.REFUSED, wrong) if wrong else admit(model))

        staging.take_tree(tree, models, done)
    # People see both representations of a model as one.
    return sorted(dict.fromkeys(outcomes), key=lambda outcome: outcome.model)


def _read_tree(tree: OllamaDir, name: Name, paths: Sequence[str], holds: Callable[[Digest], bool]) -> list[Model]:
    """Read the model at the first of these paths that exists; for a list, also the manifest at a later one, if whole.

    Clients that take no lists get that manifest. Raises OSError and TransferRefused.
    """

    def has(digest: Digest) -> bool:
        return holds(digest) or tree.has(digest)

    blobs = partial(needs, document=tree.document, has=has)
    rest = iter(paths)
    found = (Model.parse(name, body, blobs) for path in rest if (body := tree.read(path)) is not None)
    if (model := next(found, None)) is None:
        raise TransferRefused(f"expected a manifest where the link {paths[0]} leads, got none")
    if model.record.is_list:
        # Ollama no longer looks there, so a fault there is not the model's.
        with contextlib.suppress(OSError, TransferRefused):
            for older in found:
                if not older.record.is_list and all(map(has, older.blobs)):
                    return [model, older]
    return [model]


def _read_bundle(
    descriptor: int, members: Sequence[Member], blobs: Mapping[Digest, Member]
) -> tuple[list[Model], dict[Digest, int]]:
    """Return the models of a bundle, and the documents named in its new tree, with their sizes."""

    def document(digest: Digest) -> bytes | None:
        return _read_member(descriptor, blobs[digest]) if digest in blobs else None

    needed = partial(needs, document=document, has=blobs.__contains__)
    models: list[Model] = []
    named: dict[Name, Model] = {}
    for member in members:
        if member.name is not None and member.is_document:
            named[member.name] = model = Model.parse(member.name, _read_member(descriptor, member), needed)
            models.append(model)
    for member in members:
        if member.name is not None and not member.is_document:
            body = _read_member(descriptor, member)
            if (stands_for := anchored(body)) is None:
                models.append(Model.parse(member.name, body, needed))
            else:
                _check_anchor(member, body, stands_for, named.get(member.name))
    return models, {Digest(model.record.digest): len(model.record.body) for model in named.values()}


def _check_anchor(member: Member, body: bytes, stands_for: Digest, model: Model | None) -> None:
    """Raise TransferRefused if an anchor says anything that its list does not."""
    if model is None or model.record.digest != stands_for.hex:
        raise TransferRefused(f"{member.path}: expected to stand for {stands_for}, got no such document of that name")
    record = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
    blobs = {stands_for: len(model.record.body), **model.blobs}
    if record is None or any(blobs.get(digest) != size for digest, size in record.sizes.items()):
        raise TransferRefused(f"{member.path}: expected only blobs of {stands_for}, which it stands for, got others")


def _read_member(descriptor: int, member: Member) -> bytes:
    if member.size > LONGEST_MANIFEST:
        raise TransferRefused(f"{member.path}: expected at most {LONGEST_MANIFEST} bytes, got {member.size}")
    body = platform.read_at(descriptor, member.offset, member.size)
    if (actual := sha256(body).hexdigest()) != member.sha256:
        raise TransferRefused(f"{member.path}: expected sha256:{member.sha256}, got sha256:{actual}")
    return body


@contextlib.contextmanager
def _opened(tree: OllamaDir, digest: Digest) -> Iterator[FileRange]:
    descriptor = tree.open_blob(digest)
    try:
        yield FileRange.whole(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, source: FileRange, target: Path) -> bool:
    """Give the open file a second name in the store.

    Only if no other user can write to it: anyone who can could change a blob after it was verified, and only we may
    write in the store. Not on Windows, whose files have no such owner.
    """
    status = os.fstat(source.descriptor)
    if sys.platform == "win32" or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        return False  # it is on another file system, or on one without links
    if os.path.samestat(target.lstat(), status):
        return True
    target.unlink()  # the name has come to mean another file
    return False


def _told(error: Exception, digest: Digest) -> str:
    if isinstance(error, FileNotFoundError):
        return f"blob {digest}: expected its file, got none"
    return f"blob {digest}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
