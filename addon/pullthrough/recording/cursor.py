"""One reader's position in a recording, and how it waits for the next byte.

Invariant: a reader waits for bytes, never for another reader.
"""

import asyncio
import logging
from typing import Final, Protocol

from pullthrough.core.digest import Digest
from pullthrough.core.humanize import count_text
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.slicing import Demand
from pullthrough.runtime.clock import steady
from pullthrough.runtime.shared_file import SharedFile

_log = logging.getLogger(__name__)

LOOK_S: Final = 0.25
"""How often a waiting reader has its connection looked at."""
HUNGRY_S: Final = 4.0
"""A reader that waits longer than this for a byte is logged: clients of v0.1.23-v0.5.7 give up after 5 s."""


class Feed(Protocol):
    """The recording, as its cursors see it."""

    digest: Digest

    @property
    def readers(self) -> int:
        """How many readers it has."""

    def check(self) -> None:
        """Raise the error with which the recording has failed, if it has."""

    def miss(self, position: int) -> None:
        """Make sure that a connection fetches this byte, for which a reader waits."""

    def detach(self, cursor: "Cursor") -> None:
        """Forget a reader that has gone."""


class Cursor(Demand):
    """One reader's position in a recording."""

    def __init__(self, feed: Feed, assembly: Assembly, file: SharedFile, start: int, stop: int) -> None:
        super().__init__(start, stop, steady())
        self.file = file
        self._assembly = assembly
        self._feed = feed
        self._waiter: asyncio.Future[None] | None = None
        self._told = False

    @property
    def present(self) -> int:
        """The end of the bytes that are present from `position` on."""
        assembly = self._assembly
        return min(assembly.present.stop_at(self.position), max(assembly.shown, self.position))

    async def wait(self, timeout_s: float) -> int:
        """Return the end of the bytes present from `position` on; `position` itself if none came within `timeout_s`.

        Raises the error with which the recording failed, once no byte is left to hand out.
        """
        if (present := self.present) > self.position or self.position >= self.stop:
            return present
        self._feed.check()
        self._waiter = asyncio.get_running_loop().create_future()
        until = steady() + timeout_s
        try:
            while (left := until - steady()) > 0 and not self._waiter.done():
                self._feed.miss(self.position)
                await asyncio.wait([self._waiter], timeout=min(left, LOOK_S))
        finally:
            self._waiter = None
        if (hungry := steady() - self.fed) > HUNGRY_S and not self._told:
            self._told = True
            _log.warning(
                "recording %s: a client has waited %.1f s for a byte; it has %s",
                self._feed.digest.short,
                hungry,
                count_text(self._feed.readers, "reader"),
            )
        return self.present

    def advance(self, position: int) -> None:
        """Note that the bytes up to `position` have been handed out."""
        self.position = position
        self.fed = steady()
        self._told = False

    def rouse(self) -> None:
        """Wake `wait` to check again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Leave the recording, and release its file."""
        self._feed.detach(self)
        self.file.release()


class Readers(set[Cursor]):
    """The readers of one recording, each waiting only for the byte at its own position."""

    def rouse(self, start: int, stop: int) -> None:
        """Wake the readers that wait for a byte of `[start, stop)`."""
        for cursor in self:
            if start <= cursor.position < stop:
                cursor.rouse()
