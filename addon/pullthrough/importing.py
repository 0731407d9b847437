"""Take models from a models folder of Ollama, or from a bundle, into the store.

Two steps with a clear seam. `Staging` copies and verifies into a folder of its own inside the store, and needs no
lock. `admit` moves what is whole among the blobs and enters it into the index: for whoever holds the store, under its
lock or in the daemon. Invariant: a model is imported whole or not at all, and a bundle as well; nothing enters that
was not hashed here. Knows no terminal.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Final

from pullthrough import platform
from pullthrough.bundle import Member, check_whole, read_members
from pullthrough.copying import Crew, Extent
from pullthrough.digest import Digest
from pullthrough.errors import StoreUnwritable, TransferRefused
from pullthrough.modeltree import LONGEST_MANIFEST, ModelTree, blob_path
from pullthrough.records import ManifestRecord, Name
from pullthrough.store import STAGING, Store

DOCKER_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
_OCI_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"


class Fate(StrEnum):
    """What became of one model."""

    IMPORTED = "imported"
    PRESENT = "present"
    """It was here already, with the same bytes."""
    KEPT = "kept"
    """Another manifest is stored under that name, and upstream has confirmed it."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one model; `why` of what was not imported."""

    model: str
    fate: Fate
    why: str = ""


@dataclass
class Model:
    """A model on its way in."""

    name: Name
    record: ManifestRecord
    staged: dict[Digest, Path] = field(default_factory=dict)
    """Where its verified blobs lie that are not in the store yet."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the store may take, in bytes."""

    max_size: int | None = None
    min_free: int = 0


def parse_model(name: Name, body: bytes) -> Model:
    """A model of these manifest bytes. TransferRefused if they are none."""
    # `confirmed` 0: upstream has said nothing about it here. It is stale from the beginning, and served when upstream
    # cannot be asked.
    record = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
    if record is None or not record.sizes:
        raise TransferRefused(f"{name}: expected a manifest that lists blobs, got {body[:60]!r}")
    if re.search(rf'"mediaType"\s*:\s*"{re.escape(_OCI_TYPE)}"', body.decode("utf-8", "replace")):
        record = replace(record, content_type=_OCI_TYPE)
    return Model(name, record)


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
        users: dict[Digest, list[Model]] = {}
        for model in models:
            for digest in model.record.sizes:
                users.setdefault(digest, []).append(model)
        missing = {id(model): set(model.record.sizes) for model in models}

        def work(digest: Digest) -> Path | None:
            with _opened(tree, digest) as source:
                return self._stage(digest, source, tree.folder / blob_path(digest) if self._link else None)

        def arrived(digest: Digest, result: Callable[[], Path | None]) -> None:
            path, wrong = None, ""
            try:
                path = result()
                # Asked once, before the first model that has it takes it away.
                size = path.stat().st_size if path is not None else self._held.get(digest)
            except (OSError, TransferRefused) as error:
                wrong = _told(error, digest)
            for model in users[digest]:
                left = missing.get(id(model))
                if left is None:
                    continue  # refused for another blob
                left.discard(digest)
                if path is not None:
                    model.staged[digest] = path
                if not wrong and size != model.record.sizes[digest]:
                    wrong = f"blob {digest}: expected {model.record.sizes[digest]} bytes, got {size}"
                if wrong or not left:
                    del missing[id(model)]
                    done(model, wrong)

        todo: list[Digest] = []
        for digest in users:
            if digest in self._held:
                arrived(digest, lambda: None)
            else:
                todo.append(digest)
        self._on_total(sum(users[digest][0].record.sizes[digest] for digest in todo))
        self._crew.each(todo, work, arrived)

    def take_bundle(self, path: Path) -> list[Model]:
        """Verify every byte of a bundle and stage what is not held. TransferRefused if anything is wrong with it."""
        with os.fdopen(platform.open_regular(path), "rb") as file:
            members = read_members(file)
            models = [self._read_model(file.fileno(), member) for member in members if member.name is not None]
            blobs = [member for member in members if member.digest is not None]
            check_whole((digest for model in models for digest in model.record.sizes), map(_digest_of, blobs))
            sizes = {_digest_of(member): member.size for member in blobs}
            for model in models:
                for digest, size in model.record.sizes.items():
                    if sizes[digest] != size:
                        raise TransferRefused(f"{model.name}: expected {size} bytes of {digest}, got {sizes[digest]}")
            self._on_total(sum(sizes.values()))

            def work(member: Member) -> Path | None:
                return self._stage(_digest_of(member), Extent(file.fileno(), member.offset, member.size))

            def arrived(member: Member, result: Callable[[], Path | None]) -> None:
                staged = result()
                for model in models:
                    if staged is not None and _digest_of(member) in model.record.sizes:
                        model.staged[_digest_of(member)] = staged

            self._crew.each(sorted(blobs, key=lambda member: -member.size), work, arrived)
        return models

    def _read_model(self, descriptor: int, member: Member) -> Model:
        assert member.name is not None
        if member.size > LONGEST_MANIFEST:
            raise TransferRefused(f"{member.path}: expected at most {LONGEST_MANIFEST} bytes, got {member.size}")
        body = platform.read_at(descriptor, member.offset, member.size)
        if (actual := sha256(body).hexdigest()) != member.sha256:
            raise TransferRefused(f"{member.path}: expected sha256:{member.sha256}, got sha256:{actual}")
        return parse_model(member.name, body)

    def _stage(self, digest: Digest, source: Extent, linked: Path | None = None) -> Path | None:
        """Where the verified copy lies; None where the blob is held, and is right in the source as well."""
        if digest in self._held:
            actual, target = self._crew.hash(source), None
        else:
            target = self.folder / digest.file_name
            actual = self._copy(source, target, digest, linked)
        if actual != digest.hex:
            raise TransferRefused(f"{blob_path(digest)}: expected {digest}, got sha256:{actual}")
        return target

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


def admit(store: Store, model: Model, *, public: bool, replace_confirmed: bool = False, now: float) -> Outcome:
    """Move a verified model into the store; its blobs first, its manifest last.

    `public`: everybody may have it, by the operator's word. Otherwise it is nobody's until upstream grants it, as after
    a refusal. What upstream has refused by now stays refused, whatever anybody says here.
    """
    stored = store.manifest(model.name)
    text = str(model.name)
    if public and _is_refused(store, model.name):
        return Outcome(text, Fate.REFUSED, "expected a public model, got one that its registry refuses to everybody")
    same = stored is not None and stored.body == model.record.body
    if stored is not None and stored.confirmed and not same and not replace_confirmed:
        return Outcome(text, Fate.KEPT, f"sha256:{stored.digest} is stored, and its registry has confirmed it")
    for digest, path in model.staged.items():
        if os.path.lexists(path):  # another model that has it may have come first
            ingest = store.ingest(digest)
            os.replace(path, ingest.partial_path)
            store.publish(ingest, now=now)
    for digest in model.record.sizes:
        if store.held(digest) is None:
            return Outcome(text, Fate.REFUSED, f"blob {digest}: expected it in the store, got none: it was evicted")
    if not (same and stored is not None and (not stored.denied or not public)):
        store.put_manifest(model.name, replace(model.record, denied=not public, pulled=now))
    elif not model.staged and (not public or all(_is_public(store, model.name, each) for each in model.record.sizes)):
        return Outcome(text, Fate.PRESENT)
    if public:
        for digest in model.record.sizes:
            store.confirm_public(model.name.host, model.name.repository, digest)
    return Outcome(text, Fate.IMPORTED)


def _is_refused(store: Store, name: Name) -> bool:
    """Upstream has refused the repository; what was imported as private is denied as well, and never confirmed."""
    where = (name.host, name.repository)
    records = store.manifests().items()
    return any(
        record.denied and record.confirmed for other, record in records if (other.host, other.repository) == where
    )


def _is_public(store: Store, name: Name, digest: Digest) -> bool:
    record = store.blob(digest)
    return record is not None and record.public and store.is_member(name.host, name.repository, digest)


def import_tree(
    store: Store,
    folder: Path,
    *,
    public: bool,
    replace_confirmed: bool = False,
    now: float,
    bounds: Bounds = Bounds(),
    link: bool = False,
    on_total: Callable[[int], object] = lambda size: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> list[Outcome]:
    """Import every model of a folder that is whole; the outcome of each."""
    tree = ModelTree(folder)
    outcomes: list[Outcome] = []
    models: list[Model] = []
    for path, name in tree.manifests():
        try:
            if name is None:
                raise TransferRefused("expected a manifest at manifests/host/namespace/model/tag, got something else")
            models.append(parse_model(name, tree.read_manifest(path)))
        except (OSError, TransferRefused) as error:
            outcomes.append(Outcome(str(name or path), Fate.REFUSED, str(error)))

    def done(model: Model, wrong: str) -> None:
        if wrong:
            outcomes.append(Outcome(str(model.name), Fate.REFUSED, wrong))
        else:
            outcomes.append(admit(store, model, public=public, replace_confirmed=replace_confirmed, now=now))

    held = held_sizes(store)
    with Staging(store.folder, held=held, bounds=bounds, link=link, on_total=on_total, on_bytes=on_bytes) as staging:
        staging.take_tree(tree, models, done)
    return sorted(outcomes, key=lambda outcome: outcome.model)


def import_bundle(
    store: Store,
    path: Path,
    *,
    public: bool,
    replace_confirmed: bool = False,
    now: float,
    bounds: Bounds = Bounds(),
    on_total: Callable[[int], object] = lambda size: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> list[Outcome]:
    """Import a bundle whole; the outcome of each model. TransferRefused, with nothing imported, if it is not right."""
    held = held_sizes(store)
    with Staging(store.folder, held=held, bounds=bounds, on_total=on_total, on_bytes=on_bytes) as staging:
        models = staging.take_bundle(path)
        return [admit(store, model, public=public, replace_confirmed=replace_confirmed, now=now) for model in models]


def held_sizes(store: Store) -> dict[Digest, int]:
    """The blobs that need not be imported."""
    return {digest: record.size or 0 for digest, record in store.blobs().items() if store.held(digest) is not None}


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
