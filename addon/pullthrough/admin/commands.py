"""What the daemon does for the command line.

Invariant: commands that only read work on a copy, in a thread, so that no pull waits for them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from pullthrough.admin.command import Arguments, Change, Command, Job, Look, Tell
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, InvalidRequest
from pullthrough.core.records import Name
from pullthrough.library.import_commit import MANIFEST, Model, Terms, enter, place, refusal
from pullthrough.library.listing import JSON, View, detail, listing, models_of, statistics
from pullthrough.library.maintenance import Maintenance
from pullthrough.library.snapshot import with_leftovers
from pullthrough.library.verifier import Defect, mend
from pullthrough.recording.pulls import Counts
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.warm import Warmer, in_words
from pullthrough.store.store import STAGING, Store
from pullthrough.upstream.reachability import Service, fetching

Services = Callable[[], Awaitable[Sequence[Service]]]
"""Returns what is known about the servers that the cache uses."""

RATE_S: Final = 0.5
"""Seconds between the two samples that show how fast a recording is."""


class Commands:
    """The commands of one daemon."""

    def __init__(
        self,
        store: Store,
        maintenance: Maintenance,
        warmer: Warmer,
        recorder: Recorder,
        *,
        pins: tuple[str, ...],
        options: list[JSON],
        count: Callable[[], object],
        pulls: Counts,
        services: Services,
        tier: Callable[[], JSON] | None = None,
    ) -> None:
        """`options` are what `config` shows; `count` updates the store's daily figures; `tier` returns the fleet's."""
        self._store = store
        self._maintenance = maintenance
        self._warmer = warmer
        self._recorder = recorder
        self._pins = pins
        self._options = options
        self._count = count
        self._pulls = pulls
        self._services = services
        self._tier = tier

    def table(self) -> dict[str, Command]:
        return {
            "ls": Look(self._ls),
            "ps": Look(self._ps),
            "show": Look(self._show),
            "stats": Look(self._stats),
            "config": Look(self._config),
            "rm": Change(self._rm),
            "pin": Change(self._pin),
            "unpin": Change(self._unpin),
            "prune": Change(self._prune),
            "warm": Job(self._warm),
            "admit": Change(self._admit),
            "mend": Change(self._mend),
        }

    def view(self) -> View:
        """Return what is stored and counted now."""
        self._count()
        ledger = self._store.ledger
        pins = (*self._pins, *sorted(ledger.pins))
        manifests, children = dict(self._store.manifests()), dict(self._store.children())
        return View(manifests, self._store.known_blobs(), pins, dict(ledger.days), children)

    async def _ls(self, _: Arguments) -> Any:
        return await asyncio.to_thread(listing, self.view())

    async def _ps(self, _: Arguments) -> Any:
        running = self._recorder.recordings()
        names = await asyncio.to_thread(models_of, dict(self._store.manifests()), {each.digest for each in running})
        began, before = time.monotonic(), [each.present for each in running]
        if running:
            await asyncio.sleep(RATE_S)
        now = time.monotonic()
        return [
            {
                "model": names[each.digest].typed if each.digest in names else None,
                "digest": str(each.digest),
                "size": each.size,
                "present": each.present,
                "rate": max(0, round((each.present - present) / (now - began))),
                "readers": each.readers,
                "since": time.time() - (now - each.started),
            }
            for each, present in zip(running, before, strict=True)
        ]

    async def _show(self, arguments: Arguments) -> Any:
        return await asyncio.to_thread(detail, self.view(), arguments.text("model"))

    async def _stats(self, _: Arguments) -> Any:
        view = await asyncio.to_thread(with_leftovers, self.view(), self._store.folder)
        sums = await asyncio.to_thread(statistics, view)
        sums |= {"bypassed_pulls": self._pulls.bypassed, "unseen_pulls": self._pulls.unseen}
        services = await self._services()
        sums |= {"fetching": fetching(services), "services": [asdict(service) for service in services]}
        return sums | {"tier": self._tier()} if self._tier is not None else sums

    async def _config(self, _: Arguments) -> Any:
        return self._options

    async def _rm(self, arguments: Arguments) -> Any:
        return await self._maintenance.remove(arguments.texts("models"), unpin=arguments.flag("unpin"))

    async def _pin(self, arguments: Arguments) -> Any:
        return self._maintenance.pin(arguments.text("model"))

    async def _unpin(self, arguments: Arguments) -> Any:
        return self._maintenance.unpin(arguments.text("model"))

    async def _prune(self, arguments: Arguments) -> Any:
        return await self._maintenance.prune(
            age_s=arguments.seconds("age"), every=arguments.flag("all"), dry_run=arguments.flag("dry_run")
        )

    async def _warm(self, arguments: Arguments, tell: Tell) -> Any:
        done = []
        for text in arguments.texts("models"):
            try:
                done.append(await self._warmer.warm(text, tell, dry_run=arguments.flag("dry_run")))
            except CacheError as error:
                done.append({"model": text, "error": in_words(error)})
        return done

    async def _admit(self, arguments: Arguments) -> Any:
        folder = arguments.text("staging")
        if not folder.startswith(STAGING) or "/" in folder:
            raise InvalidRequest(f"expected a folder {STAGING}… of the store, got {folder!r}")
        staging = self._store.folder / "ingest" / folder
        terms = Terms(arguments.flag("public"), arguments.flag("replace_confirmed"))
        name = Name.parse(arguments.text("model"))
        try:
            body = await asyncio.to_thread((staging / MANIFEST).read_bytes)
        except OSError as error:
            raise InvalidRequest(f"expected a staged manifest of {name}, got {error}") from error
        blobs = {Digest.parse(digest): size for digest, size in arguments.sizes("blobs").items()}
        model = Model.parse(name, body, lambda _: blobs)
        outcome = refusal(self._store, model, terms)
        if outcome is None:
            placed = await asyncio.to_thread(place, self._store, staging, model)
            outcome = enter(self._store, model, terms, placed, now=time.time())
        return asdict(outcome)

    async def _mend(self, arguments: Arguments) -> Any:
        done = []
        for finding in map(Defect.parse, arguments.objects("findings")):
            done.append(mend(self._store, finding, now=time.time()))
            await asyncio.sleep(0)
        return done
