"""A file that says who has a folder, for disks whose locks do not reach every machine that has them mounted.

The file is made by whoever comes first, and renewed while he lives: others that see it change are refused. One that has
not changed for STALE_S seconds, or whose process is known to be dead, is taken over. Time is measured by whoever waits:
neither the clocks of machines need agree nor the times that a share gives its files.

Invariant: of several that take over at once one stays. An owner that was taken for dead and comes back is told, and
changes nothing. Knows nothing of what is owned.
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
"""After so long without a sign of life the owner counts as dead."""
SETTLE_S: Final = 2.0
"""How long others that take over at the same time may need to see that somebody has."""
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_LENGTH: Final = 512
"""Bytes of the file, so that renewing changes no size."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has the folder."""

    host: str
    pid: int
    born: float
    """When the process began (Unix seconds of its machine)."""
    machine: str
    """The boot, and what process numbers mean in it."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host or 'an unknown machine'}"

    @property
    def is_dead(self) -> bool:
        """Whether the process is one of ours, and has ended. False where that is not known."""
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
        """`on_lost` is called from another thread if somebody has taken the folder over."""
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
        """Become the owner; returns who is it instead. Waits up to STALE_S to see whether one lives. Raises OSError."""
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
        """Let the next one in."""
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
                    return holder  # it lives
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
        """Make the file, if there is none."""
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        except OSError:  # a disk without links: what is in it comes a moment later
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
        """Return who has it, and the file's content."""
        try:
            content = self._path.read_bytes()  # a share's file is new each time it is opened
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
        """Show that we live, until we end or somebody else has it."""
        while not self._over.wait(self._renew_s):
            try:
                found = self._read()
                if found is not None and found[0].token not in (self._owner.token, ""):
                    self._on_lost(found[0])
                    return
                if found is not None or not self._make():  # somebody may have removed it
                    self._write()
            except OSError as error:
                _log.warning("renewing %s: %s", self._path, error)


def _machine() -> str:
    """Return the boot and the process namespace of this process; "" where the system tells no boot."""
    boot = platform.boot_id()
    with contextlib.suppress(OSError):
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}" if boot else ""
    return boot
