"""Bounds of the store: room is made before a recording begins.

Invariant: held blobs, running recordings (at their full size), leftovers of earlier ones and quarantine together never
exceed `max_size`, and never leave less than `min_free` on the disk, as far as eviction can help. A blob is not recorded
if no room can be made for the rest of its model, too, and then nothing is evicted for it. Quarantine is removed first,
then leftovers of recordings, then models. A blob whose bytes twice had another digest gets no room for a while.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Final

from pullthrough.core.access_log import SHOWN
from pullthrough.core.digest import Digest
from pullthrough.core.errors import SourceDistrusted, StoreUnwritable
from pullthrough.core.humanize import count_text, size_text
from pullthrough.core.records import BlobRecord, ManifestRecord, Name, by_model, listed_by
from pullthrough.library.eviction_order import Choice, Holding, choose
from pullthrough.library.mismatches import Mismatches
from pullthrough.runtime.clock import steady
from pullthrough.runtime.executors import Threads
from pullthrough.store.layout import restore
from pullthrough.store.store import Store

_log = logging.getLogger(__name__)


SMALL: Final = 64 << 10
"""Bytes. A blob up to this size is recorded however often it was wrong: it costs little and is sent only verified."""


def room_problem(folder: Path, min_free: int) -> str:
    """Return why nothing can now be recorded on the disk of `folder`; "" if something can."""
    disk = shutil.disk_usage(folder)
    if min_free >= disk.total:
        return (
            f"nothing will be recorded: min_free keeps {size_text(min_free)}, and the whole disk of {folder} has "
            f"{size_text(disk.total)}; set ollama_cache_min_free to less, or dir to another disk"
        )
    if disk.free < min_free:
        return (
            f"little will be recorded: {size_text(disk.free)} of the disk of {folder} is free, and min_free keeps "
            f"{size_text(min_free)}; models are evicted for it: `ollama-cache prune`, a lower min_free or another disk "
            "makes room"
        )
    return ""


class Evictor:
    """The bounds of one store."""

    def __init__(
        self, store: Store, threads: Threads, *, max_size: int | None, min_free: int, pins: Sequence[str] = ()
    ) -> None:
        """`max_size` and `min_free` are bytes; `pins` are patterns of models that stay, in addition to the store's."""
        self._store = store
        self._threads = threads
        self._max_size = max_size
        self._min_free = min_free
        self._pins = pins
        self._reserved: dict[Digest, int] = {}
        self._mismatches = Mismatches()
        self._turn = asyncio.Lock()

    async def reserve(self, digest: Digest, size: int, *, whole: int | None = None) -> None:
        """Make room for a recording of `size` bytes, which counts in full until `release`.

        What an earlier recording of the blob has left counts towards it. A held blob needs no room, nor does one with
        as large a reservation. Nothing is evicted if there cannot be room for the `whole` blob and the rest of its
        model. Raises StoreUnwritable if there is no room, SourceDistrusted if the blob recently had another digest.
        """
        if (known := self._store.blob(digest)) is not None and known.held:
            self._reserved[digest] = 0  # it is only verified again
            return
        if size > SMALL and self._mismatches.holds(digest, now=steady()):
            raise SourceDistrusted(f"{digest.short}: its source has brought other bytes twice; not kept now")
        if 0 < size <= self._reserved.get(digest, 0):
            return
        async with self._turn:
            try:
                free, partials, evidence = await self._threads.disk(self._look)
            except OSError as error:
                raise StoreUnwritable(f"recording {digest}: {error}") from error
            suspect = sum(taken for taken, _ in evidence.values())
            excess = self._excess({**self._reserved, digest: size}, partials, suspect, free)
            if excess > 0:
                # Bytes that belong to no model are removed before models.
                freed = await self._drop_evidence(evidence, excess)
                excess, free, suspect = excess - freed, free + freed, suspect - freed
            if excess > 0:
                await self._store.settle()  # blobs of models still unknown would be removed first
                rest = await self._threads.disk(
                    _rest_of_model,
                    digest,
                    [*self._store.manifests().values(), *self._store.children().values()],
                    self._store.known_blobs(),
                )
                most = max(size, whole or 0)
                total = self._excess({**rest, **self._reserved, digest: most}, partials, suspect, free)
                await self._evict(digest, most + sum(rest.values()), (excess, total), partials, free)
            self._reserved[digest] = size

    def _look(self) -> tuple[int, dict[Digest, tuple[int, float]], dict[Path, tuple[int, float]]]:
        """Return the disk's free bytes, and what partials and quarantined files take of it. Raises OSError."""
        restore(self._store.folder)
        # In this order, room that a recording takes in between does not count twice.
        free = shutil.disk_usage(self._store.folder).free
        return free, self._store.partials(), self._store.quarantined()

    async def _drop_evidence(self, evidence: Mapping[Path, tuple[int, float]], excess: int) -> int:
        """Remove quarantined files, the oldest first, until `excess` bytes are freed; return how many were."""
        freed, paths = 0, []
        for path, (taken, _) in sorted(evidence.items(), key=lambda item: item[1][1]):
            if freed >= excess:
                break
            freed += taken
            paths.append(path)
        await self._threads.disk(self._store.remove_files, paths)
        if paths:
            _log.info("removed %d quarantined files, %s, to make room", len(paths), size_text(freed), extra=SHOWN)
        return freed

    def mismatches(self, digest: Digest) -> None:
        """Note that a recording of the blob had another digest: after two it is not recorded for a while."""
        self._mismatches.note(digest, now=steady())

    def release(self, digest: Digest) -> None:
        """Drop the reservation of a recording that has ended."""
        self._reserved.pop(digest, None)

    def _excess(
        self, reserved: dict[Digest, int], partials: dict[Digest, tuple[int, float]], suspect: int, free: int
    ) -> int:
        """Return by how many bytes the bounds would be exceeded once all reserved bytes have come."""
        to_come = sum(max(0, size - partials.get(digest, (0, 0.0))[0]) for digest, size in reserved.items())
        excess = to_come + self._min_free - free
        if self._max_size is not None:
            idle = sum(size for digest, (size, _) in partials.items() if digest not in reserved)
            taken = sum(max(size, partials.get(digest, (0, 0.0))[0]) for digest, size in reserved.items())
            excess = max(excess, self._store.held_bytes + taken + idle + suspect - self._max_size)
        return excess

    async def _evict(
        self,
        digest: Digest,
        size: int,
        excess: tuple[int, int],
        partials: dict[Digest, tuple[int, float]],
        free: int,
    ) -> None:
        """Free the first `excess` if the second, which is for all `size` bytes of a model, could be freed, too."""
        store = self._store
        busy = frozenset([digest, *self._reserved, *store.open_blobs()])
        idle = {store.ingest(part).partial_path: facts for part, facts in partials.items() if part not in busy}
        choice: Choice | None = await self._threads.disk(
            _choose,
            dict(store.manifests()),
            store.known_blobs(),
            idle,
            pins=(*self._pins, *store.ledger.pins),
            excess=excess,
            busy=busy,
        )
        if choice is None:
            bound = f"max_size {size_text(self._max_size)}, " if self._max_size is not None else ""
            raise StoreUnwritable(
                f"recording {digest}: expected room for {size_text(size or 0)} within the bounds "
                f"({bound}min_free {size_text(self._min_free)}), got {size_text(free)} of free disk "
                "and nothing left to evict"
            )
        for holding in choice.holdings:
            # Since the choice a model may have been removed, and a client may have begun to read a blob.
            if holding.name is not None:
                age_d = (time.time() - holding.used) / 86400
                _log.info(
                    "evicting %s, last pulled %.1f days ago, to make room for %s", holding.name, age_d, digest.short
                )
                self._store.drop_model(holding.name)
        blobs = [part for part in choice.parts if isinstance(part, Digest) and self._is_free(part)]
        paths = [*self._store.evict(blobs), *(part for part in choice.parts if isinstance(part, Path))]
        await self._threads.disk(self._store.remove_files, paths)
        _log.info("evicted %s, %s", count_text(len(paths), "blob"), size_text(choice.freed), extra=SHOWN)

    def _is_free(self, digest: Digest) -> bool:
        record = self._store.blob(digest)
        return record is not None and record.held and not self._store.is_open(digest)


def _rest_of_model(
    digest: Digest, manifests: Sequence[ManifestRecord], blobs: Mapping[Digest, BlobRecord]
) -> dict[Digest, int]:
    """Return the other missing blobs of the model that the blob is for: the one that lists it and lacks the least."""
    rests = []
    for manifest in manifests:
        # A client takes one child of a list, which is a manifest itself.
        if manifest.lists(digest) and not manifest.is_list:
            absent = {
                each: size or 0 for each, size in manifest.sizes.items() if not blobs.get(each, BlobRecord()).held
            }
            absent.pop(digest, None)
            rests.append(absent)
    return min(rests, key=lambda rest: sum(rest.values()), default={})


def _choose(
    manifests: Mapping[Name, ManifestRecord],
    blobs: Mapping[Digest, BlobRecord],
    partials: Mapping[Path, tuple[int, float]],
    *,
    pins: Sequence[str],
    excess: tuple[int, int],
    busy: frozenset[Digest],
) -> Choice | None:
    """Choose what to remove, from the state at one moment; slow for a large store."""
    sizes: dict[Hashable, int] = {digest: record.size or 0 for digest, record in blobs.items() if record.held}
    holdings = [
        Holding(name, frozenset(listed_by(records)), max(record.used for record in records), name.is_among(pins))
        for name, records in by_model(manifests).items()
    ]
    listed = frozenset[Hashable]().union(*(holding.parts for holding in holdings))
    # A private model's manifest is never stored: each of its blobs is a holding of its own.
    for digest, record in blobs.items():
        if record.held and digest not in listed:
            holdings.append(Holding(None, frozenset([digest]), record.recorded))
    for path, (size, changed) in partials.items():
        holdings.append(Holding(None, frozenset([path]), changed, is_leftover=True))
        sizes[path] = size
    least, most = excess
    if most > least and choose(holdings, sizes, excess=most, busy=busy) is None:
        return None
    return choose(holdings, sizes, excess=least, busy=busy)
