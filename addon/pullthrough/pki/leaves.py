"""The certificates that clients are shown: issued at the start, and renewed in time while the cache runs.

Invariant: a leaf's file is readable only by its owner, and never changed: a renewed leaf gets a new file.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pullthrough.core.errors import AuthorityError
from pullthrough.pki.authority import Leaf, is_due
from pullthrough.pki.rollover import Rollover

_log = logging.getLogger(__name__)

LOOK_S: Final = 60.0
"""How often the leaves are checked, and so how soon after the machine's clock was set."""


class Leaves:
    """The leaves, one for each intercepted host."""

    def __init__(
        self,
        rollover: Rollover,
        hosts: Sequence[str],
        folder: Path,
        on_issue: Callable[[Sequence[Leaf], list[str]], None],
    ) -> None:
        """Issue the first leaves.

        `on_issue` is called with all leaves, and with their files in `folder` as mitmproxy takes them (`HOST=PATH`).
        """
        self._rollover = rollover
        self._hosts = hosts
        self._folder = folder
        self._on_issue = on_issue
        self._leaves: list[Leaf] = []
        self._issue(datetime.now(UTC))

    def expiries(self) -> dict[str, datetime]:
        """Return until when the CA and each leaf are valid."""
        return {"CA": self._rollover.current.not_after, **{leaf.host: leaf.not_after for leaf in self._leaves}}

    async def renew(self) -> None:
        """Check the leaves regularly; never returns."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(datetime.now(UTC))

    def look(self, now: datetime) -> None:
        """Issue all leaves again if one is due: near its end, or not valid yet because the clock was set back.

        While the clock is so wrong that the authority itself is not valid, the leaves stay as they are.
        """
        if not any(is_due(leaf, now) for leaf in self._leaves):
            return
        try:
            self._issue(now)
        except (AuthorityError, OSError) as error:
            _log.warning("leaf certificates could not be renewed, which is tried again in a minute: %s", error)
        else:
            _log.info("leaf certificates renewed")

    def _issue(self, now: datetime) -> None:
        leaves = [self._rollover.issue(host, now=now) for host in self._hosts]
        files = []
        for leaf in leaves:
            # A new name each time, because mitmproxy reads the files again only when the option changes.
            path = self._folder / f"{leaf.host}-{time.time_ns()}.pem"
            path.touch(mode=0o600)
            path.write_bytes(leaf.pem)
            files.append(f"{leaf.host}={path}")
        self._leaves = leaves
        self._on_issue(leaves, files)
