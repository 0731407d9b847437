"""The files of manifests, each with upstream's bytes at a path made of the name; and the files of grants.

    manifests/<host>/<namespace>/<model>/<tag>      for clients that take no lists; as Ollama keeps its models
    manifests-v2/<host>/<namespace>/<model>/<tag>   for those that do; a copy of the document, as Ollama 0.40 reads it
    other-names/<host/repository>/@<reference>      names that do not fit Ollama's folders, percent-encoded in lower
                                                    case, long ones split at `+/+`; `.lists` if the client takes lists
    grants/<host/repository>.txt                    blobs that upstream has granted there and no stored manifest of
                                                    the repository lists, a digest on each line

Manifests lie below `public/`, or below `private/` while upstream refuses them to an anonymous request; grants always
lie below `private/`. On a disk that folds case, names with capitals go to `other-names/`.

Invariant: a file is there whole or not at all, a name's newest state is the one written, and a hidden manifest has
left `public/` when `hide` returns. Folders without a file are removed: Ollama stops at them.
"""

import contextlib
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TransferRefused
from pullthrough.core.manifest_json import type_of
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.core.routes import ManifestRoute, parse_registry_target
from pullthrough.runtime import platform
from pullthrough.runtime.shared_file import at_once
from pullthrough.store.blob_files import PRIVATE, PUBLIC, ROOTS
from pullthrough.store.ollama_dir import (
    LONGEST_MANIFEST,
    MANIFESTS,
    NAMED_DOCUMENTS,
    document_path,
    manifest_path,
    parse_manifest_path,
)

_log = logging.getLogger(__name__)

OTHER_NAMES: Final = "other-names"
GRANTS: Final = "grants"
TEMPORARY: Final = ".manifest-"
"""The prefix of temporary files in `ingest/`."""

_FOR_OLLAMA: Final = re.compile(
    r"[\w-]+/[A-Za-z0-9][A-Za-z0-9._-]*(%3A[0-9]+)?/[A-Za-z0-9_][A-Za-z0-9_-]{0,79}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,79}){2}"
)
"""Paths that every version of Ollama reads as a name (types/model/name.go)."""
_NOWHERE: Final = re.compile(r"(^|/)((con|prn|aux|nul|com\d|lpt\d)(\.[^/]*)?|[^/]*\.)(/|$)", re.IGNORECASE)
"""Names that Windows takes for a device, or whose last dot it drops."""
_GRANT: Final = re.compile(r"^sha256:([0-9a-f]{64})$", re.MULTILINE)
_PIECE: Final = 120
_LISTS: Final = ".lists"
_TEXT: Final = ".txt"

Place = tuple[str, str]
"""(host, repository)."""


class Document(NamedTuple):
    """A manifest's file as read from the disk."""

    body: bytes
    denied: bool
    """Whether it lies below `private/`."""
    changed: float
    """When it was written, Unix seconds."""

    def record(self, known: ManifestRecord | None) -> ManifestRecord | None:
        """Return the manifest's record, merged with the known one; None if the file is not a manifest."""
        record = ManifestRecord.parse(self.body, type_of(self.body), now=0.0)
        if record is None:
            return None
        if known is None or known.digest != record.digest:
            return record._replace(denied=self.denied, brought=self.changed)
        return known._replace(
            denied=self.denied, listed=record.listed, claimed=record.claimed, references=record.references
        )


@dataclass(frozen=True, slots=True)
class _State:
    """The state to write; the writing thread calls `make`, which returns None for no file."""

    make: Callable[[], bytes | None]
    denied: bool = False


_NOTHING: Final = _State(lambda: None)


class ModelFiles:
    """The manifest and grant files of one store, written by a thread of their own."""

    def __init__(
        self,
        folder: Path,
        *,
        folds_case: bool,
        durable: bool = True,
        change: Callable[[Callable[[], object]], None] = at_once,
    ) -> None:
        """With `durable` False the caller flushes the disk; `change` runs what cannot wait for the thread."""
        self._change = change
        self._durable = durable or not hasattr(os, "sync")
        self._folder = folder
        self._folds_case = folds_case
        self._lock = threading.Lock()
        """Guards `_pending`; never held while waiting for the disk."""
        self._moving = threading.Lock()
        """Guards the files and `_unsynced`."""
        self._pending: dict[Name | Place, _State] = {}
        self._unsynced: set[Path] = set()
        self._is_asked = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ollama-cache-files")

    # --- writing

    def put(self, name: Name, body: bytes, *, denied: bool) -> None:
        """Schedule writing the name's file."""
        self._ask(name, _State(lambda: body, denied))

    def remove(self, name: Name) -> None:
        """Schedule removing the name's file."""
        self._ask(name, _NOTHING)

    def put_grants(self, place: Place, digests: Callable[[], Iterable[str]]) -> None:
        """Schedule writing the repository's grants; another thread calls `digests`."""
        self._ask(
            place, _State(lambda: "".join(f"{each}\n" for each in sorted(digests())).encode() or None, denied=True)
        )

    def drop_grants(self, place: Place) -> None:
        """Remove the repository's grants: at once if the disk answers, else later."""
        self._ask(place, _NOTHING)
        self._change(partial(self._remove_grants, place))

    def _remove_grants(self, place: Place) -> None:
        path = self._folder / PRIVATE / _grants_path(place)
        with self._moving, contextlib.suppress(FileNotFoundError):
            path.unlink()
            self._unsynced.add(path.parent)

    def hide(self, name: Name, body: bytes) -> None:
        """Move the name's file to `private/`: before this returns if the disk answers, else later."""
        self._ask(name, _State(lambda: body, denied=True))
        self._change(partial(self._move_away, name))

    def _move_away(self, name: Name) -> None:
        with self._moving:
            for path in self._paths(name):
                with contextlib.suppress(FileNotFoundError):
                    target = self._folder / PRIVATE / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(self._folder / PUBLIC / path, target)
                    self._unsynced |= {target.parent, (self._folder / PUBLIC / path).parent}

    def is_pending(self, what: Name | Place) -> bool:
        """Return whether the last change to the file is still to be written."""
        return what in self._pending

    def flush(self) -> None:
        """Wait until all changes so far have been written, or have failed."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write the remaining changes, and stop the thread."""
        self._writer.submit(self._write)
        self._writer.shutdown(wait=True)

    def _ask(self, what: Name | Place, state: _State) -> None:
        with self._lock:
            self._pending[what] = state
            was_asked, self._is_asked = self._is_asked, True
        if not was_asked:
            self._writer.submit(self._write)

    def _write(self) -> None:
        """Write all pending changes. Those that the disk refuses stay pending until the next call."""
        with self._lock:
            pending = dict(self._pending)
            self._is_asked = False
        for what, state in pending.items():
            try:
                self._write_one(what, state)
            except OSError as error:
                told = f"the manifest of {what}" if isinstance(what, Name) else f"the grants of {'/'.join(what)}"
                _log.warning("writing %s: %s", told, error)
        with self._moving:
            unsynced, self._unsynced = self._unsynced, set()
        for folder in unsynced if self._durable else ():
            try:
                platform.sync_folder(folder)
            except FileNotFoundError:
                continue  # it was removed again
            except OSError as error:
                _log.warning("flushing %s: %s", folder, error)

    def _write_one(self, what: Name | Place, state: _State) -> None:
        temporary, body = None, state.make()
        if body is not None:
            temporary = self._folder / "ingest" / f"{TEMPORARY}{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags, 0o644)
            try:
                platform.write_at(descriptor, 0, body)
                if self._durable:
                    platform.sync_data(descriptor)
            except OSError:
                temporary.unlink()
                raise
            finally:
                os.close(descriptor)
        with self._moving:
            if self._pending.get(what) is state:
                self._remove_others(what, self._put_in_place(what, state, temporary))
            elif temporary is not None:
                temporary.unlink()
        with self._lock:
            if self._pending.get(what) is state:
                del self._pending[what]

    def _put_in_place(self, what: Name | Place, state: _State, temporary: Path | None) -> Path | None:
        if temporary is None:
            return None
        target = self._folder / (PRIVATE if state.denied else PUBLIC) / self._paths(what)[0]
        folder = target.parent
        while not folder.exists():
            self._unsynced.add(folder.parent)
            folder = folder.parent
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
        self._unsynced.add(target.parent)
        return target

    def _remove_others(self, what: Name | Place, target: Path | None) -> None:
        """Remove all files of the name or place except `target`, and the folders left empty."""
        for root in ROOTS:
            for path in self._paths(what):
                other = self._folder / root / path
                if other == target:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    other.unlink()
                    self._unsynced.add(other.parent)
                self._remove_empty(other.parent)

    def _remove_empty(self, folder: Path) -> None:
        while folder.parent.parent != self._folder:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return  # not empty
            folder = folder.parent

    # --- reading

    def of(self, host: str, repository: str) -> dict[Name, Document]:
        """Read the repository's manifest files. Raises OSError if the disk refuses."""
        found: dict[Name, Document] = {}
        for root in ROOTS:  # `private/` last: a name in both is private
            for folder in self._folders(host, repository):
                self._gather(root, PurePosixPath(folder), found, {(host, repository)})
        return found

    def walk(self) -> Iterator[tuple[tuple[str, str], dict[Name, Document]]]:
        """Yield each (host, repository) with its manifest files. Raises OSError if the disk refuses."""
        places: dict[tuple[str, str], None] = {}
        for root in ROOTS:
            for tree in (MANIFESTS, NAMED_DOCUMENTS, OTHER_NAMES):
                for path in _walk(self._folder / root, PurePosixPath(tree)):
                    if (name := _parse(path)) is not None:
                        places[name.place] = None
        for place in places:
            yield place, self.of(*place)

    def grants(self, place: Place) -> set[Digest]:
        """Read the repository's grants from its file. Raises OSError if the disk refuses."""
        try:
            descriptor = platform.open_regular(self._folder / PRIVATE / _grants_path(place))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
            return set(map(Digest, _GRANT.findall(file.read(LONGEST_MANIFEST))))

    def walk_grants(self) -> Iterator[tuple[Place, set[Digest]]]:
        """Yield each (host, repository) with the grants in its file. Raises OSError if the disk refuses."""
        for path in _walk(self._folder / PRIVATE, PurePosixPath(GRANTS)):
            host, slash, repository = _decoded(path.removeprefix(f"{GRANTS}/").removesuffix(_TEXT)).partition("/")
            if slash and _grants_path((host, repository)) == path:
                yield (host, repository), self.grants((host, repository))

    def _gather(
        self, root: str, folder: PurePosixPath, found: dict[Name, Document], places: set[tuple[str, str]]
    ) -> None:
        for path in _walk(self._folder / root, folder):
            name = _parse(path)
            if name is None or name.place not in places:
                continue
            with contextlib.suppress(FileNotFoundError):
                descriptor = platform.open_regular(self._folder / root / path)
                with os.fdopen(descriptor, "rb") as file:
                    body = file.read(LONGEST_MANIFEST + 1)
                    changed = os.fstat(file.fileno()).st_mtime
                if len(body) <= LONGEST_MANIFEST:
                    found[name] = Document(body, root == PRIVATE, changed)

    # --- paths

    def _paths(self, name: Name | Place) -> list[str]:
        """Return the file's path on this disk, and then the path it would have on a disk of the other kind."""
        if not isinstance(name, Name):
            return [_grants_path(name)]
        other = _other_path(name)
        usual = _usual_path(name)
        if usual is None:
            return [other]
        return [other, usual] if self._folds_case and usual != usual.lower() else [usual, other]

    def _folders(self, host: str, repository: str) -> list[str]:
        """Return the folders that can hold a repository's files."""
        folders = [str(PurePosixPath(_other_path(Name(host, repository, "x"))).parent)]
        for takes_lists in (False, True):
            usual = _usual_path(Name(host, repository, "x", takes_lists))
            if usual is not None:
                folders.append(str(PurePosixPath(usual).parent))
        return folders


def _walk(root: Path, folder: PurePosixPath) -> Iterator[str]:
    """Yield the path, relative to `root`, of each file in the folder and below; links are not followed."""
    try:
        with os.scandir(root / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, folder / entry.name)
        elif entry.is_file(follow_symlinks=False):
            yield str(folder / entry.name)


def _usual_path(name: Name) -> str | None:
    """Return the name's path in Ollama's folders; None if it does not fit them."""
    try:
        path = document_path(name) if name.takes_lists else manifest_path(name)
    except TransferRefused:
        return None
    if not _FOR_OLLAMA.fullmatch(path) or _NOWHERE.search(path) or _parse(path) != name:
        return None
    return path


def _other_path(name: Name) -> str:
    reference = _pieces(f"@{name.reference}") + (_LISTS if name.takes_lists else "")
    return f"{OTHER_NAMES}/{_pieces(f'{name.host}/{name.repository}')}/{reference}"


def _grants_path(place: Place) -> str:
    return f"{GRANTS}/{_pieces('/'.join(place))}{_TEXT}"


def _parse(path: str) -> Name | None:
    """Return the name whose file lies at this path; None if no name's can."""
    tree, _, rest = path.partition("/")
    if tree != OTHER_NAMES:
        name = parse_manifest_path(path)
        return name and name._replace(takes_lists=tree == NAMED_DOCUMENTS)
    takes_lists = rest.endswith(_LISTS)
    place, at, reference = rest.removesuffix(_LISTS).partition("/@")
    host, _, repository = _decoded(place).partition("/")
    route = parse_registry_target(f"/v2/{repository}/manifests/{_decoded(reference)}")
    if not at or not host or not isinstance(route, ManifestRoute):
        return None
    return Name(host, route.repository, route.reference, takes_lists)


def _pieces(text: str) -> str:
    encoded = re.sub(r"[^a-z0-9_@-]", lambda match: "".join(f"%{byte:02x}" for byte in match[0].encode()), text)
    return "+/+".join(encoded[start : start + _PIECE] for start in range(0, len(encoded), _PIECE))


def _decoded(text: str) -> str:
    encoded = text.replace("+/+", "")
    return re.sub(
        r"(?:%[0-9a-f]{2})+", lambda match: bytes.fromhex(match[0].replace("%", "")).decode("latin-1"), encoded
    )
