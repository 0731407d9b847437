"""Changes to a store on request: removing models, pinning them, cleaning up.

Invariant: the event loop is free after each step, so that pulls go on; a blob that is being read and a running
recording are never touched.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from typing import Final

from pullthrough.core.access_log import SHOWN
from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest, ModelPinned, NoSuchModel
from pullthrough.core.humanize import count_text
from pullthrough.core.records import Name, listed_by
from pullthrough.library.listing import JSON, View, beyond_models, find, find_or_none, is_pattern
from pullthrough.library.prune_plan import Plan, plan_prune, plan_removal
from pullthrough.library.snapshot import Snapshot, with_leftovers
from pullthrough.store.blob_files import partials, quarantined
from pullthrough.store.ingest import INGEST, PARTIAL
from pullthrough.store.store import Store

_log = logging.getLogger(__name__)

STEP: Final = 100
"""Blobs that are removed without a pause, which takes a few milliseconds."""


def would_prune(inventory: Snapshot, pins: Sequence[str], *, age_s: float, every: bool) -> JSON:
    """Return what `prune` would do to a store that no daemon holds, without changing or locking anything."""
    left = quarantined(inventory.folder)
    for digest, facts in partials(inventory.folder).items():
        left[inventory.folder / INGEST / f"{digest.file_name}{PARTIAL}"] = facts
    oldest = time.time() - age_s
    manifests, blobs = inventory.manifests, inventory.blobs
    plan = plan_prune(manifests, blobs, left, oldest=oldest, every=every, pins=pins, busy=())
    return _told(plan) | beyond_models(inventory.view(tuple(pins)))


class Maintenance:
    """The changes of one store."""

    def __init__(self, store: Store, pins: Sequence[str], recording: Collection[Digest]) -> None:
        """`pins` are the option's; `recording` is a live view of what is being recorded."""
        self._store = store
        self._pins = pins
        self._recording = recording
        self._turn = asyncio.Lock()

    async def remove(self, texts: Sequence[str], *, unpin: bool = False) -> JSON:
        """Remove these models and, with `unpin`, their own pins, returned as `unpinned`; `pins` are those that stay.

        Raises NoSuchModel if one is not stored, ModelPinned if one is pinned; then none is removed.
        """
        await self._store.settle()
        async with self._turn:
            names = [find(text, self._store.manifests()) for text in texts]
            pinned = {name: pins for name in names if (pins := self.pins_of(name))}
            if pinned and not unpin:
                what = "; ".join(f"{name.typed} is pinned by {', '.join(pins)}" for name, pins in pinned.items())
                raise ModelPinned(f"{what}: nothing was removed; --unpin removes it all the same, and its own pin")
            own = {str(name) for name in names} & self._store.ledger.pins
            for pin in own:
                self._store.ledger.unpin(pin)
            manifests, blobs = dict(self._store.manifests()), self._store.known_blobs()
            plan = await asyncio.to_thread(plan_removal, manifests, blobs, names, busy=self._busy())
            done = await self._carry_out(plan)
            still = {pin for pins in pinned.values() for pin in pins} - own
            return done | {"unpinned": sorted(own), "pins": sorted(still)}

    async def prune(self, *, age_s: float, every: bool, dry_run: bool) -> JSON:
        """Clean up what is older than `age_s` seconds."""
        await self._store.settle()
        async with self._turn:
            manifests, blobs = dict(self._store.manifests()), self._store.known_blobs()
            idle = await asyncio.to_thread(self._store.quarantined)
            for digest, facts in (await asyncio.to_thread(self._store.partials)).items():
                if digest not in self._recording:
                    idle[self._store.ingest(digest).partial_path] = facts
            plan = await asyncio.to_thread(
                plan_prune,
                manifests,
                blobs,
                idle,
                oldest=time.time() - age_s,
                every=every,
                pins=(*self._pins, *self._store.ledger.pins),
                busy=self._busy(),
            )
            if not dry_run:
                return await self._carry_out(plan)
            view = await asyncio.to_thread(with_leftovers, View(manifests, blobs, (), {}), self._store.folder)
            return _told(plan) | beyond_models(view)

    def pins_of(self, name: Name) -> list[str]:
        """Return the pins of the option and of the store that match a model."""
        return sorted(pin for pin in {*self._pins, *self._store.ledger.pins} if name.matches(pin))

    def pin(self, text: str) -> JSON:
        """Keep a model, or all that match a pattern, for good, including models that are pulled later.

        Raises NoSuchModel if several models have the name, InvalidRequest if none can have it.
        """
        pattern = text if is_pattern(text) else str(find_or_none(text, self._store.manifests()) or Name.parse(text))
        if not pattern.strip() or any(character.isspace() for character in pattern):
            raise InvalidRequest(f"expected a model or a pattern such as llama3*, got {text!r}")
        self._store.ledger.pin(pattern)
        names = {name.typed for name in self._store.manifests() if name.matches(pattern)}
        return {"pattern": pattern, "models": sorted(names)}

    def unpin(self, text: str) -> JSON:
        """Remove a pin. Raises NoSuchModel if there is no such pin; `still` are models that another pin keeps."""
        ledger = self._store.ledger
        candidates = [text]
        with contextlib.suppress(InvalidRequest):  # a pattern
            candidates.append(str(Name.parse(text)))
        with contextlib.suppress(NoSuchModel):  # a pin whose model has gone
            candidates.append(str(find(text, self._store.manifests())))
        pattern = next((candidate for candidate in candidates if candidate in ledger.pins), None)
        if pattern is None:
            known = ", ".join(sorted(ledger.pins)) or "none"
            option = ", ".join(self._pins) or "none"
            raise NoSuchModel(f"expected a pin of this store ({known}; by the option: {option}), got {text!r}")
        ledger.unpin(pattern)
        matching = {name.model for name in self._store.manifests() if name.matches(pattern)}
        return {
            "pattern": pattern,
            "models": sorted(name.typed for name in matching),
            "still": sorted(name.typed for name in matching if ledger.keeps(name, self._pins)),
        }

    def _busy(self) -> frozenset[Digest]:
        return self._store.open_blobs() | frozenset(self._recording)

    async def _carry_out(self, plan: Plan) -> JSON:
        store = self._store
        for name in plan.names:
            store.drop_model(name)
            await asyncio.sleep(0)
        listed = await asyncio.to_thread(listed_by, list(store.manifests().values()))
        for start in range(0, len(plan.blobs), STEP):
            step = plan.blobs[start : start + STEP]
            # A client may have come since: what it is reading or needs stays.
            busy = self._busy()
            held = [digest for digest in step if (record := store.blob(digest)) is not None and record.held]
            free = [digest for digest in held if digest not in listed and digest not in busy]
            await asyncio.to_thread(store.remove_files, store.evict(free))
        resumed = {store.ingest(digest).partial_path for digest in self._recording}
        await asyncio.to_thread(store.remove_files, [path for path in plan.files if path not in resumed])
        counts = (len(plan.names), "model"), (len(plan.blobs), "blob"), (len(plan.files), "leftover")
        if removed := [count_text(*each) for each in counts if each[0]]:
            _log.info("removed %s", ", ".join(removed), extra=SHOWN)
        return _told(plan)


def _told(plan: Plan) -> JSON:
    return {
        "models": [name.typed for name in plan.names],
        "blobs": len(plan.blobs),
        "leftovers": len(plan.files),
        "freed": plan.freed,
    }
