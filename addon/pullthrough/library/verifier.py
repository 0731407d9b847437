"""Verification: the store against its index, both ways, and every blob against its digest.

Invariant: `check` changes nothing, so it may run beside a daemon. Its findings are checked again before they are
reported, and once more by `mend`, which runs with the store held: under its lock, or in the daemon. What an interrupted
run has verified is remembered until a run is completed.
"""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, Final, Self

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest
from pullthrough.library.parallel_hash import FileRange, HashPool
from pullthrough.library.snapshot import Snapshot
from pullthrough.runtime import platform
from pullthrough.store.blob_files import ROOTS
from pullthrough.store.ollama_dir import BLOBS, parse_blob_path
from pullthrough.store.store import Store

JOURNAL: Final = "verify.journal"
REMEMBERED_S: Final = 7 * 24 * 3600.0
"""How long the results of an interrupted run count."""

_OF_THE_FILE: Final = frozenset(
    {
        errno.EIO,
        errno.EINVAL,
        errno.ELOOP,
        errno.EISDIR,
        *(getattr(errno, name) for name in ("EBADMSG", "EUCLEAN") if hasattr(errno, name)),
    }
)
"""What the system says of a file that is damaged or is none: EBADMSG and EUCLEAN are failed checksums (xfs(5)).

Whatever else fails, such as a share that has gone or descriptors that ran out, tells nothing about the file.
"""

Identity = tuple[int, int, int]
"""Size, mtime_ns and inode, by which the file that was verified is recognised."""


class Problem(StrEnum):
    """A kind of fault in one file or row."""

    DAMAGED = "damaged"
    """The bytes do not match the name, or cannot be read."""
    ALTERED = "altered"
    """The bytes are right; size, time or inode differ from the index."""
    UNKNOWN = "unknown"
    """The bytes are right; there is no record that they were verified."""
    MISSING = "missing"
    """The index has it, the folder does not."""
    FOREIGN = "foreign"
    """A file that is no blob, and is left alone."""


@dataclass(frozen=True, slots=True)
class Defect:
    """A fault that was found."""

    problem: Problem
    name: str
    """The name of the file."""
    expected: str
    got: str
    digest: Digest | None = None
    identity: Identity | None = None
    """The identity of the file when it was read."""

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Parse what `fields` returned. Raises InvalidRequest."""
        try:
            identity = None
            if fields["identity"] is not None:
                size, mtime_ns, inode = map(int, fields["identity"])
                identity = (size, mtime_ns, inode)
            return cls(
                Problem(fields["problem"]),
                str(fields["name"]),
                str(fields["expected"]),
                str(fields["got"]),
                Digest.parse(fields["digest"]) if fields["digest"] else None,
                identity,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"expected a finding of verify, got {fields!r:.200}") from error

    def fields(self) -> dict[str, Any]:
        """Return the defect as JSON."""
        return {**asdict(self), "digest": str(self.digest or "")}

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}: expected {self.expected}, got {self.got}"


@dataclass
class Report:
    """The result of a run."""

    findings: list[Defect] = field(default_factory=list)
    checked: int = 0
    """How many blobs this run hashed."""
    size: int = 0
    """Their bytes."""
    remembered: int = 0
    """How many blobs an earlier, interrupted run had hashed."""


class Journal:
    """The files that an unfinished run over `models` (empty: all) has verified, one per line; torn ends are ignored."""

    def __init__(self, folder: Path, models: Collection[str], *, now: float) -> None:
        self._path = folder / JOURNAL
        self._now = now
        self._head = json.dumps(sorted(models))
        self.verified: set[tuple[Digest, Identity]] = set()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            head, *lines = self._path.read_text().split("\n")
            if head == self._head:
                for line in lines[:-1]:
                    self._load(line)
        if not self.verified:
            self._path.write_text(f"{self._head}\n")
        self._file = self._path.open("a")

    def _load(self, line: str) -> None:
        with contextlib.suppress(ValueError):
            hexadecimal, *numbers = line.split(" ")
            size, mtime_ns, inode, when = map(int, numbers)
            if 0 <= self._now - when < REMEMBERED_S:
                self.verified.add((Digest.parse(f"sha256:{hexadecimal}"), (size, mtime_ns, inode)))

    def add(self, digest: Digest, identity: Identity) -> None:
        """Note that the file was verified."""
        # In one write, so that an interrupted run leaves whole lines.
        self._file.write(f"{digest.hex} {' '.join(map(str, identity))} {int(self._now)}\n")
        self._file.flush()

    def close(self, *, finished: bool) -> None:
        """Keep the journal for the next run, or delete it."""
        self._file.close()
        if finished:
            self._path.unlink(missing_ok=True)


def check(
    folder: Path,
    models: Collection[str],
    *,
    now: float,
    index_dir: Path | None = None,
    on_total: Callable[[int], object] = lambda size: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Report:
    """Check the store, or only what these models list; `on_total` is called with the number of bytes to hash.

    `index_dir` as for `Snapshot.read`. Raises StoreError if there is no store, TransferRefused if a model is not in it.
    """
    inventory = Snapshot.read(folder, index_dir)
    wanted = {digest for model in models for record in inventory.select(model).values() for digest in record.digests}
    report = Report()
    files = _survey(folder, wanted if models else None, report)
    for digest, record in inventory.blobs.items():
        if record.held and digest not in files and (not models or digest in wanted):
            expected = f"{record.size} bytes"
            report.findings.append(Defect(Problem.MISSING, digest.file_name, expected, "no file", digest))
    journal = Journal(folder, models, now=now)
    finished = False
    try:
        _hash(inventory, files, journal, report, on_total, on_bytes)
        finished = True
    finally:
        journal.close(finished=finished)
    if report.findings:
        inventory = Snapshot.read(folder, index_dir)
        report.findings = sorted(
            (finding for finding in report.findings if _stands(finding, inventory)), key=lambda finding: finding.name
        )
    return report


def _survey(folder: Path, wanted: Collection[Digest] | None, report: Report) -> dict[Digest, Identity]:
    """Return the blob files, or the wanted ones of them; report anything else in their folder as a finding."""
    files: dict[Digest, Identity] = {}
    with contextlib.ExitStack() as open_folders:
        roots = [open_folders.enter_context(os.scandir(folder / root / BLOBS)) for root in ROOTS]
        for entry in chain(*roots):
            digest = parse_blob_path(f"{BLOBS}/{entry.name}")
            if wanted is not None and digest not in wanted:
                continue
            if digest is None:
                report.findings.append(Defect(Problem.FOREIGN, entry.name, "nothing but blobs", "another name"))
            elif entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                    files[digest] = _identity(entry.stat(follow_symlinks=False))
            else:
                kind = "a link" if entry.is_symlink() else "another kind"
                report.findings.append(Defect(Problem.DAMAGED, entry.name, "a regular file", kind, digest))
                files[digest] = (-1, 0, 0)
    return files


def _hash(
    inventory: Snapshot,
    files: dict[Digest, Identity],
    journal: Journal,
    report: Report,
    on_total: Callable[[int], object],
    on_bytes: Callable[[int], object],
) -> None:
    crew = HashPool(on_bytes)

    def work(digest: Digest) -> tuple[str, Identity]:
        descriptor = platform.open_regular(inventory.blob_path(digest))
        try:
            extent = FileRange.whole(descriptor)
            return f"sha256:{crew.hash(extent)}", _identity(os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def done(digest: Digest, result: Callable[[], tuple[str, Identity]]) -> None:
        try:
            actual, identity = result()
        except FileNotFoundError:
            return  # evicted meanwhile
        except OSError as error:
            if error.errno not in _OF_THE_FILE:
                raise  # the fault is this run's, not the blob's
            finding = Defect(Problem.DAMAGED, digest.file_name, "a file that can be read", str(error), digest)
            report.findings.append(finding)
            return
        report.checked += 1
        report.size += identity[0]
        if actual != str(digest):
            finding = Defect(Problem.DAMAGED, digest.file_name, str(digest), actual, digest, identity)
            report.findings.append(finding)
        elif (finding_or_none := _compare(inventory, digest, identity)) is not None:
            report.findings.append(finding_or_none)
        else:
            journal.add(digest, identity)

    regular = {digest: identity for digest, identity in files.items() if identity[0] >= 0}
    known = {digest for digest, identity in regular.items() if (digest, identity) in journal.verified}
    report.remembered = len(known)
    # The largest first, or the last one would keep a single core busy.
    todo = sorted(regular.keys() - known, key=lambda digest: (-regular[digest][0], digest))
    on_total(sum(regular[digest][0] for digest in todo))
    crew.each(todo, work, done)


def _compare(inventory: Snapshot, digest: Digest, identity: Identity) -> Defect | None:
    """Return how the index contradicts a file whose bytes are right, if it does."""
    record = inventory.blobs.get(digest)
    if record is None or not record.held or not record.mtime_ns:
        return Defect(Problem.UNKNOWN, digest.file_name, "only verified blobs", "another", digest, identity)
    if record.is_file(*identity):
        return None
    expected = (record.size, record.mtime_ns, record.inode)
    for what, wanted, found in zip(("size", "mtime", "inode"), expected, identity, strict=True):
        if wanted != found:
            return Defect(Problem.ALTERED, digest.file_name, f"{what} {wanted}", f"{what} {found}", digest, identity)
    return None


def _stands(finding: Defect, inventory: Snapshot) -> bool:
    """Return whether the finding still holds: a daemon may have recorded or evicted the blob meanwhile."""
    places = (inventory.folder / root / BLOBS / finding.name for root in ROOTS)
    path = next(filter(os.path.lexists, places), None)
    try:
        if path is None:
            raise FileNotFoundError
        status = path.lstat()
    except FileNotFoundError:
        record = inventory.blobs.get(finding.digest) if finding.digest is not None else None
        return finding.problem is Problem.MISSING and record is not None and record.held
    match finding.problem:
        case Problem.MISSING:
            return False
        case Problem.ALTERED | Problem.UNKNOWN:
            assert finding.digest is not None
            return _identity(status) == finding.identity and (
                _compare(inventory, finding.digest, _identity(status)) is not None
            )
    return finding.identity is None or _identity(status) == finding.identity


def mend(store: Store, finding: Defect, *, now: float) -> str:
    """Make sure that the faulty blob is no longer served; return what was done, "" if nothing could be.

    Damaged files go to quarantine, rows without files are marked as not held, right files enter the index as they are
    now. Only for a caller that holds the store; takes a rename or two, and a flush of a folder.
    """
    if (digest := finding.digest) is None:
        return ""
    path = store.blob_path(digest)
    identity = _identity(path.lstat()) if os.path.lexists(path) else None
    if finding.problem is Problem.MISSING:
        if store.held(digest) is None:
            store.disown(digest)
            return "no longer held"
        return ""
    if identity is None or (finding.identity is not None and identity != finding.identity):
        return ""  # it is another file now
    if finding.problem is Problem.DAMAGED:
        moved = store.folder / "quarantine" / f"{digest.file_name}-{secrets.token_hex(4)}"
        os.replace(path, moved)
        store.disown(digest)
        return f"quarantined as {moved.name}"
    store.publish(digest, store.place(digest, path), now=now)
    return "entered into the index"


def _identity(status: os.stat_result) -> Identity:
    # A link or folder has no bytes that could be right.
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return (size, status.st_mtime_ns, status.st_ino)
