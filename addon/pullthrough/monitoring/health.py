"""Whether the daemon is fit to serve: its disk, its certificates, whether it is ending, and what it can reach.

Invariant: a disk that does not answer blocks one thread and never the event loop.
"""

import asyncio
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pullthrough.monitoring.probes import Probes
from pullthrough.store.layout import restore
from pullthrough.upstream.reachability import Service

FRESH_S: Final = 1.0
"""How long a look at the disk counts."""
FULL: Final = 1 << 20
"""Free bytes below which the disk counts as full."""
PATIENCE_S: Final = 2.0
"""How long the disk may take to answer."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The state of the store's disk."""

    free: int
    """Bytes."""
    problem: str = ""
    """Why nothing can be stored; "" if something can."""


class Health:
    """The health of one daemon."""

    def __init__(self, folder: Path, certificates: Callable[[], Mapping[str, datetime]]) -> None:
        """`folder` is the store's; `certificates` gives by name the expiry of the certificates that clients see."""
        self.draining = False
        self._folder = folder
        self.certificates = certificates
        self._probes: Probes | None = None
        self._look: asyncio.Task[Disk] | None = None
        self._looked = 0.0

    def open(self, probes: Probes) -> None:
        """Start probing the servers that nothing has asked for a while."""
        self._probes = probes
        probes.open()

    async def close(self) -> None:
        """Stop probing, and report from now on that the daemon is draining."""
        self.draining = True
        if self._probes is not None:
            await self._probes.close()

    async def services(self) -> tuple[Service, ...]:
        """Return what is known of each server that the cache uses; nothing before `open`."""
        return await self._probes.services() if self._probes is not None else ()

    async def disk(self) -> Disk:
        """Return the disk's state, at most FRESH_S old."""
        if self._look is None or (self._look.done() and time.monotonic() - self._looked > FRESH_S):
            self._looked = time.monotonic()
            work = asyncio.to_thread(_look, self._folder)
            self._look = asyncio.get_running_loop().create_task(work, name="look at the disk")
        done, _ = await asyncio.wait([self._look], timeout=PATIENCE_S)
        return self._look.result() if done else Disk(0, f"no answer in {PATIENCE_S:.0f} s")

    async def problems(self) -> list[str]:
        """Return why no clients should be sent to the daemon; empty if they may."""
        problems = ["draining"] if self.draining else []
        if problem := (await self.disk()).problem:
            problems.append(f"store: {problem}")
        now = datetime.now(UTC)
        for name, end in self.certificates().items():
            if end <= now:
                problems.append(f"certificate of {name}: expired at {end:%Y-%m-%d %H:%M} UTC")
        return problems


def _look(folder: Path) -> Disk:
    try:
        free = shutil.disk_usage(folder).free
        restore(folder)
    except OSError as error:
        return Disk(0, error.strerror or str(error))
    return Disk(free, "" if free >= FULL else "no room: what is stored is served, and nothing is recorded")
