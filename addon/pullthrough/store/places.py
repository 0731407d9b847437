"""Where the parts of a store lie, depending on what its disk can do: the index is always on a local disk, even if the
store is not.

Invariant: `conclude` alone decides what follows from a disk's facts, and looks at nothing else. A disk that cannot
work is refused with the reason and the remedy.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pullthrough.config import paths
from pullthrough.config.settings import PREFIX
from pullthrough.core.errors import StoreError
from pullthrough.runtime import file_system
from pullthrough.runtime.file_system import Facts
from pullthrough.runtime.owner_file import Owner, OwnerFile
from pullthrough.runtime.temp_folder import TemporaryFolder
from pullthrough.store.ingest import INGEST
from pullthrough.store.layout import take_lock

_log = logging.getLogger(__name__)

INDEX: Final = "index"
OWNER: Final = "owner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How a store is kept on its disk."""

    index_elsewhere: bool = False
    """Whether the index is outside the store's folder."""
    shared: bool = False
    """Whether other machines may use the disk: the lock is beside the index, and a file names the store's owner."""
    unwritable: bool = False
    """Whether the disk cannot be written to: an index in the store's folder is then replaced by a temporary copy."""
    in_order: bool = False
    """Whether files must grow from their beginning, because the disk fills gaps with zeros."""
    largest: int | None = None
    """The longest blob that can be stored (bytes), None for no limit."""
    notes: tuple[str, ...] = ()
    """Warnings for the operator."""


def conclude(facts: Facts, *, index_given: bool = False) -> Place:
    """Decide how a store is kept on such a disk. Raises StoreError if it cannot be kept there."""
    kind = facts.kind or "unknown"
    if not facts.renames:
        raise StoreError(
            f"its file system ({kind}) does not rename files as it should, so nothing could be stored whole: "
            "use another disk, or another driver for this one"
        )
    notes = []
    if facts.shared:
        notes.append(f"the disk may be shared with other machines ({kind}): the index is on one of this machine")
    elif not facts.databases:
        notes.append(f"the disk ({kind}) can hold no database: the index is on another one of this machine")
    if not facts.holes:
        notes.append(
            f"the disk ({kind}) fills gaps with zeros: a large blob may take twice its size while it is recorded"
        )
    if facts.largest is not None:
        notes.append(f"the disk ({kind}) has no files over {facts.largest} bytes: larger blobs are passed through")
    if facts.problem:
        notes.append(f"nothing can be written now ({facts.problem}): what is stored is served, and nothing is recorded")
    return Place(
        index_elsewhere=facts.shared or index_given or not facts.databases,
        shared=facts.shared,
        unwritable=bool(facts.problem),
        in_order=not facts.holes,
        largest=facts.largest,
        notes=tuple(notes),
    )


def local_folder(folder: Path, index_dir: Path | None) -> Path:
    """Return the folder for the store's index and lock if they are not in the store itself."""
    store = folder.resolve()
    key = hashlib.sha256(os.fsencode(store)).hexdigest()[:12]
    return (index_dir or paths.default_index()) / f"{store.name}-{key}"


def index_folder(folder: Path, index_dir: Path | None) -> Path:
    """Return the index folder of an existing store."""
    inside, local = folder / INDEX, local_folder(folder, index_dir) / INDEX
    is_local = index_dir is not None or (any(local.glob("*.db")) and not any(inside.glob("*.db")))
    return local if is_local else inside


def look_at(folder: Path, *, index_given: bool) -> Place:
    """Examine the store's disk, and log warnings for the operator. Raises StoreError, OSError."""
    ingest = folder / INGEST
    facts = file_system.examine(ingest if ingest.is_dir() else folder)
    try:
        place = conclude(facts, index_given=index_given)
    except StoreError as error:
        raise StoreError(f"store {folder}: {error}") from error
    for note in place.notes:
        _log.warning("store %s: %s", folder, note)
    return place


def prepare_index(folder: Path, at: Path, place: Place, undo: contextlib.ExitStack) -> Path:
    """Return the index folder below `at`, taking over an index that is still in the store. Raises OSError."""
    former, index = folder / INDEX, at / INDEX
    if place.unwritable and not place.index_elsewhere:
        index = Path(undo.enter_context(TemporaryFolder()), INDEX)
    if former != index and not any(index.glob("*.db")) and any(former.glob("*.db")):
        shutil.copytree(former, index, dirs_exist_ok=True)
        if not place.unwritable:
            shutil.rmtree(former, ignore_errors=True)
    index.mkdir(exist_ok=True)
    return index


def lock_store(folder: Path, index_dir: Path | None, place: Place, undo: contextlib.ExitStack) -> Path:
    """Take the store for this process; returns the folder above its index. Raises StoreError, OSError."""
    at = _make_local(folder, index_dir) if place.index_elsewhere else folder
    undo.enter_context(take_lock(at if place.shared else folder, writable=place.shared or not place.unwritable))
    if place.shared and not place.unwritable:
        _own(folder, undo)
    return at


def _make_local(folder: Path, index_dir: Path | None) -> Path:
    """Return the folder for index and lock, making it if missing. Raises StoreError if it cannot be used."""
    local = local_folder(folder, index_dir)
    mend = f"name a folder on a disk of this machine with {PREFIX}index_dir"
    try:
        local.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StoreError(f"the index cannot be in {local} ({error.strerror}): {mend}") from error
    kind = file_system.kind_of(local)
    if file_system.is_shared(kind):
        raise StoreError(f"the index cannot be in {local}, whose disk is shared too ({kind}): {mend}")
    return local


def _own(folder: Path, undo: contextlib.ExitStack) -> None:
    """Take the store for this process among all machines. Raises StoreError if another process has it."""
    owner = OwnerFile(folder / OWNER, on_lost=lambda other: _end(folder, other))
    if (holder := owner.take()) is not None:
        raise StoreError(
            f"store {folder}: expected a free store, got one in use by {holder}; stop that one first, or name "
            "another store in ollama_cache_dir"
        )
    undo.callback(owner.release)


def _end(folder: Path, other: Owner) -> None:
    """End this process, because two would otherwise change the store at once."""
    _log.error("store %s: %s has taken it over, because this one gave no sign of life; ending", folder, other)
    os.kill(os.getpid(), signal.SIGTERM)
