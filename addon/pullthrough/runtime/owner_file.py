"""A file that names the process that owns a folder, for disks whose locks do not reach every machine that mounts them.

The first process makes the file and keeps renewing it: others see it change, and are refused. A file that has not
changed for STALE_S seconds, or whose process is known to be dead, is taken over. The waiting process measures the time
itself: machines' clocks need not agree, nor the times that a share gives its files.

Invariant: of several that take over at once, one remains. An owner that was taken for dead and comes back is told
(`on_lost`), and leaves the file alone. Knows nothing of what is owned.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil

from pullthrough.runtime import platform

_log = logging.getLogger(__name__)

RENEW_S: Final = 15.0
STALE_S: Final = 60.0
"""An owner that has not renewed the file for this long counts as dead."""
SETTLE_S: Final = 2.0
"""How long to wait after taking over, until others that do so at the same time have written theirs too."""
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_LENGTH: Final = 512
"""Bytes of the file; fixed, so that renewing does not change its size."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that owns the folder."""

    host: str
    pid: int
    born: float
    """When the process began (Unix seconds, by its machine's clock)."""
    machine: str
    """The boot id, and the namespace of process numbers."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host or 'an unknown machine'}"

    @property
    def is_dead(self) -> bool:
        """Whether the process ran on this machine and has ended. False if that is unknown."""
        return self.machine == _machine() != "" and not self._lives()

    def _lives(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.born) < 2
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


_UNKNOWN: Final = Owner("", 0, 0.0, "", "")


class OwnerFile:
    """The file at one path."""

    def __init__(
        self,
        path: Path,
        *,
        renew_s: float = RENEW_S,
        stale_s: float = STALE_S,
        settle_s: float = SETTLE_S,
        on_lost: Callable[[Owner], object] = lambda _: None,
    ) -> None:
        """`on_lost` is called from another thread if another process has taken over the folder."""
        self._path = path
        self._renew_s = renew_s
        self._stale_s = stale_s
        self._settle_s = settle_s
        self._on_lost = on_lost
        born = psutil.Process().create_time()
        self._owner = Owner(socket.gethostname(), os.getpid(), born, _machine(), secrets.token_hex(16))
        self._descriptor = -1
        self._count = 0
        self._over = threading.Event()
        self._renewing: threading.Thread | None = None

    def take(self) -> Owner | None:
        """Become the owner, or return the current one. Waits up to STALE_S for its sign of life. Raises OSError."""
        temporary = self._path.with_name(f".{self._path.name}.{self._owner.token}")
        self._descriptor = os.open(temporary, _NEW, 0o644)
        try:
            holder = self._enter(temporary)
        except BaseException:
            os.close(self._descriptor)
            raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if holder is not None:
            os.close(self._descriptor)
            return holder
        self._renewing = threading.Thread(target=self._renew, name="ollama-cache-owner", daemon=True)
        self._renewing.start()
        return None

    def release(self) -> None:
        """Remove the file if it is still ours, for the next owner."""
        self._over.set()
        if self._renewing is not None:
            self._renewing.join()
        with contextlib.suppress(OSError):
            if (found := self._read()) is not None and found[0].token == self._owner.token:
                self._path.unlink()
        os.close(self._descriptor)

    def _enter(self, temporary: Path) -> Owner | None:
        self._write()
        seen, changed = None, time.monotonic()
        told = False
        while True:
            if (found := self._read()) is None:
                if self._create(temporary):
                    return None
                if time.monotonic() - changed > STALE_S:
                    raise OSError(f"{self._path}: expected a file or none, got what can be neither read nor made")
                time.sleep(0.1)
                continue
            holder, content = found
            if content != seen:
                if seen is not None:
                    return holder  # it is alive
                seen, changed = content, time.monotonic()
            age = time.monotonic() - changed
            if holder.is_dead or age > self._stale_s:
                return self._take_over(temporary, holder, age)
            if holder.machine == self._owner.machine != "":
                return holder  # no need to wait for a sign of life
            if not told:
                told = True
                _log.warning(
                    "%s says that %s has it; waiting up to %.0f s for a sign of life", self._path, holder, self._stale_s
                )
            time.sleep(min(1.0, self._renew_s / 5))

    def _create(self, temporary: Path) -> bool:
        """Make the file; returns False if there is one."""
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        except OSError:  # a disk without links: the content follows a moment later
            return self._make()
        return True

    def _make(self) -> bool:
        try:
            descriptor = os.open(self._path, _NEW, 0o644)
        except FileExistsError:
            return False
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._write()
        return True

    def _take_over(self, temporary: Path, former: Owner, age: float) -> Owner | None:
        os.replace(temporary, self._path)
        time.sleep(self._settle_s)
        found = self._read()
        if found is None or found[0].token != self._owner.token:
            return found[0] if found is not None else _UNKNOWN
        why = "which has ended" if former.is_dead else f"which has given no sign of life for {age:.0f} s"
        _log.warning("%s: taken over from %s, %s", self._path, former, why)
        return None

    def _read(self) -> tuple[Owner, bytes] | None:
        """Return the owner that the file names, and the file's content."""
        try:
            content = self._path.read_bytes()  # opening it anew makes a share fetch fresh content
        except FileNotFoundError:
            return None
        try:
            fields = json.loads(content)
            del fields["count"]
            return Owner(**fields), content
        except (ValueError, KeyError, TypeError):
            return _UNKNOWN, content

    def _write(self) -> None:
        self._count += 1
        text = json.dumps({**asdict(self._owner), "count": self._count})
        platform.write_at(self._descriptor, 0, text.encode().ljust(_LENGTH - 1) + b"\n")
        os.fsync(self._descriptor)

    def _renew(self) -> None:
        """Renew the file until `release`, or until another process owns it."""
        while not self._over.wait(self._renew_s):
            try:
                found = self._read()
                if found is not None and found[0].token not in (self._owner.token, ""):
                    self._on_lost(found[0])
                    return
                if found is not None or not self._make():  # someone may have removed it
                    self._write()
            except OSError as error:
                _log.warning("renewing %s: %s", self._path, error)


def _machine() -> str:
    """Return this process's boot id and process namespace; "" if the system has no boot id."""
    boot = platform.boot_id()
    with contextlib.suppress(OSError):
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}" if boot else ""
    return boot
