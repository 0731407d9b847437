"""Keep the store within its bounds: room is made before a recording begins.

Invariant: what is held, what is being recorded (at its full size) and what earlier recordings have left never exceed
`max_size`, and never leave less than `min_free` of the disk, as far as eviction can help: a blob for which no room can
be made is not recorded, and nothing is evicted for it. Knows no client and no upstream.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Hashable, Sequence
from pathlib import Path

import humanfriendly

from pullthrough.digest import Digest
from pullthrough.errors import StoreUnwritable
from pullthrough.retention import Choice, Holding, choose
from pullthrough.store import Store
from pullthrough.threads import Threads

_log = logging.getLogger(__name__)


class Keeper:
    """The bounds of one store."""

    def __init__(
        self, store: Store, threads: Threads, *, max_size: int | None, min_free: int, pins: Sequence[str] = ()
    ) -> None:
        """`max_size` and `min_free` in bytes; `pins` are patterns of models that stay, as the store's do."""
        self._store = store
        self._threads = threads
        self._max_size = max_size
        self._min_free = min_free
        self._pins = pins
        self._reserved: dict[Digest, int] = {}
        self._turn = asyncio.Lock()

    async def reserve(self, digest: Digest, size: int) -> None:
        """Make room for a recording of `size` bytes; it counts in full until `release`. StoreUnwritable if none can be.

        What an earlier recording of it has left is counted in.
        """
        async with self._turn:
            try:
                partials = await self._threads.disk(self._store.partials)
                free = (await self._threads.disk(shutil.disk_usage, self._store.folder)).free
            except OSError as error:
                raise StoreUnwritable(f"recording {digest}: {error}") from error
            excess = self._excess({**self._reserved, digest: size}, partials, free)
            if excess > 0:
                await self._evict(digest, size, excess, partials, free)
            self._reserved[digest] = size

    def release(self, digest: Digest) -> None:
        """The recording has ended."""
        self._reserved.pop(digest, None)

    def _excess(self, reserved: dict[Digest, int], partials: dict[Digest, tuple[int, float]], free: int) -> int:
        """By how many bytes the bounds would be exceeded once all that is reserved has come in."""
        to_come = sum(max(0, size - partials.get(digest, (0, 0.0))[0]) for digest, size in reserved.items())
        excess = to_come + self._min_free - free
        if self._max_size is not None:
            idle = sum(size for digest, (size, _) in partials.items() if digest not in reserved)
            excess = max(excess, self._store.held_bytes + sum(reserved.values()) + idle - self._max_size)
        return excess

    async def _evict(
        self, digest: Digest, size: int, excess: int, partials: dict[Digest, tuple[int, float]], free: int
    ) -> None:
        holdings, sizes, busy = self._survey(digest, partials)
        choice: Choice | None = await self._threads.disk(choose, holdings, sizes, excess=excess, busy=busy)
        if choice is None:
            bound = f"max_size {_text(self._max_size)}, " if self._max_size is not None else ""
            raise StoreUnwritable(
                f"recording {digest}: expected room for {_text(size)} within the bounds "
                f"({bound}min_free {_text(self._min_free)}), got {_text(free)} of free disk and nothing left to evict"
            )
        for holding in choice.holdings:
            # A model may have gone, and a blob may be read, since the survey.
            if holding.name is not None and self._store.manifest(holding.name) is not None:
                age_d = (time.time() - holding.used) / 86400
                _log.info(
                    "evicting %s, last pulled %.1f days ago, to make room for %s", holding.name, age_d, digest.short
                )
                self._store.drop_manifest(holding.name)
        blobs = [part for part in choice.parts if isinstance(part, Digest) and self._is_free(part)]
        paths = [*self._store.evict(blobs), *(part for part in choice.parts if isinstance(part, Path))]
        await self._threads.disk(self._store.remove_files, paths)
        _log.info("evicted %d blobs, %s", len(paths), _text(choice.freed))

    def _is_free(self, digest: Digest) -> bool:
        record = self._store.blob(digest)
        return record is not None and record.held and not self._store.is_open(digest)

    def _survey(
        self, digest: Digest, partials: dict[Digest, tuple[int, float]]
    ) -> tuple[list[Holding], dict[Hashable, int], frozenset[Hashable]]:
        """(what may go, the sizes of its parts, the parts in flight) at this moment."""
        blobs = self._store.blobs()
        sizes: dict[Hashable, int] = {held: record.size or 0 for held, record in blobs.items()}
        holdings = []
        listed: set[Digest] = set()
        for name, manifest in self._store.manifests().items():
            kept = self._store.ledger.keeps(name, self._pins)
            holdings.append(Holding(name, frozenset(manifest.sizes), manifest.pulled, kept))
            listed.update(manifest.sizes)
        # A private model's manifest is never stored: its blobs stand for themselves.
        for held, record in blobs.items():
            if held not in listed:
                holdings.append(Holding(None, frozenset([held]), record.recorded))
        for partial, (size, changed) in partials.items():
            if partial not in self._reserved and partial != digest:
                path = self._store.ingest(partial).partial_path
                holdings.append(Holding(None, frozenset([path]), changed))
                sizes[path] = size
        busy = frozenset([digest, *self._reserved, *(held for held in blobs if self._store.is_open(held))])
        return holdings, sizes, busy


def _text(size: int | None) -> str:
    return str(humanfriendly.format_size(size or 0))
