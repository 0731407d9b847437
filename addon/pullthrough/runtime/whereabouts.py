"""The note that a running cache leaves for the commands: its store, its user and its process.

Invariant: a note counts only while the process that wrote it still runs, as the note's owner, in the same boot. Reading
notes writes and removes nothing.
"""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import psutil

SYSTEM: Final = Path("/run/ollama-cache" if Path("/run").is_dir() else "/var/run/ollama-cache")
"""The folder for the notes of root's caches and of services."""
SHARED: Final = Path("/tmp")  # noqa: S108 -- a folder in it counts only for the user whose id is in its name
"""The folder in which any user can make one that all can find: XDG_RUNTIME_DIR is hidden from other users."""
_PREFIX: Final = "ollama-cache-"
LONGEST: Final = 65_536
"""The most bytes that are read of a note."""
_AGE_S: Final = 2.0  # how much two readings of a process's start may differ


@dataclass(frozen=True, slots=True)
class Running:
    """A cache that runs on this machine."""

    store: str
    certs: str
    page: str
    """The status page; empty if the plain port is off."""
    pid: int
    started: float
    boot: str
    user: str = ""
    is_vouched_for: bool = False
    """Whether the note's folder is not one that any user could have made in /tmp."""

    @property
    def is_ours(self) -> bool:
        """Whether it runs as the current user."""
        return self.user == _own_name()

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.user}, store {self.store}"


def announce(chosen: Path | None, *, store: Path, certs: Path, page: str) -> Path:
    """Write the note of this process to the folder `chosen`, by default the user's own.

    Raises:
        OSError: the folder cannot be written to, or is not safe.
    """
    folder = chosen or own_folder()
    if not folder.is_dir():
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # the umask may hide it
    if not _is_safe(folder):
        raise PermissionError(f"{folder} is another user's, or others can write to it")
    for path, running in _notes(folder):
        if running is None and (sys.platform == "win32" or path.stat().st_uid == os.geteuid()):
            path.unlink(missing_ok=True)
    made = Running(str(store), str(certs), page, os.getpid(), psutil.Process().create_time(), _boot())
    path = folder / f"{made.pid}.json"
    partial = path.with_suffix(".new")
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:
        os.chmod(file.fileno(), 0o644)  # noqa: PTH101 -- of the open file
        json.dump(asdict(made), file)
    os.replace(partial, path)
    return path


def running_caches(chosen: Path | None) -> list[Running]:
    """Return the caches that run on this machine, the current user's first."""
    if sys.platform == "win32":
        return []
    usual = [SYSTEM, *SHARED.glob(f"{_PREFIX}*"), own_folder()]
    folders = [chosen] if chosen is not None else list(filter(_is_safe, usual))
    found = {running.pid: running for folder in dict.fromkeys(folders) for _, running in _notes(folder) if running}
    return sorted(found.values(), key=lambda running: (not running.is_ours, running.pid))


def own_folder() -> Path:
    """Return the folder for this user's notes: systemd's for the service, root's, or one in /tmp."""
    if sys.platform == "win32":
        return Path(os.environ.get("TEMP", ".")) / "ollama-cache"
    if made := os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        return Path(made)
    return SYSTEM if os.geteuid() == 0 else SHARED / f"{_PREFIX}{os.geteuid()}"


def _notes(folder: Path) -> Iterator[tuple[Path, Running | None]]:
    """Yield each note's path, and its cache if that is running."""
    for path in sorted(folder.glob("*.json")):
        # It may be gone, incomplete, or made to do harm.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            text, owner = _read(path)
            yield path, _alive(_parse(text), owner, is_vouched_for=folder.parent != SHARED)


def _read(path: Path) -> tuple[bytes, int]:
    """Return a note's content and owner. Raises OSError if it is not a regular file of the folder's owner."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != path.parent.stat().st_uid:
            raise PermissionError(f"{path} is no note")
        return file.read(LONGEST), state.st_uid


def _parse(text: bytes) -> Running:
    """Parse a note. Raises one of the errors that `_notes` suppresses if it is malformed or has unprintable text."""
    fields = json.loads(text)
    texts = [fields.get(name, "") for name in ("store", "certs", "page", "boot", "user")]
    if not all(isinstance(each, str) and each.isprintable() for each in texts):
        raise ValueError("expected printable texts")
    if not isinstance(fields["pid"], int) or not isinstance(fields["started"], float | int):
        raise ValueError("expected numbers")
    return Running(**fields)


def _alive(made: Running, owner: int, *, is_vouched_for: bool) -> Running | None:
    if made.boot != _boot():
        return None
    try:
        process = psutil.Process(made.pid)
        is_it = abs(process.create_time() - made.started) < _AGE_S
        if not is_it or (sys.platform != "win32" and process.uids().effective != owner):
            return None
        return replace(made, user=process.username(), is_vouched_for=is_vouched_for)
    except (psutil.Error, OverflowError):
        return None


def _is_safe(folder: Path) -> bool:
    """Return whether a folder in /tmp, where anyone can make one, belongs to the user in its name. True elsewhere."""
    if sys.platform == "win32" or folder.parent != SHARED:
        return True
    try:
        state = folder.lstat()
    except OSError:
        return False
    is_named = folder.name == f"{_PREFIX}{state.st_uid}"
    return is_named and stat.S_ISDIR(state.st_mode) and not state.st_mode & 0o022


def _own_name() -> str:
    return psutil.Process().username()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))
