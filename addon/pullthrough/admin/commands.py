"""What the daemon does for the command line, by verb.

Invariant: what only looks works on a copy in a thread, so that no pull waits for it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pullthrough.admin.server import Tell, Verb
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, InvalidRequest
from pullthrough.core.records import Name
from pullthrough.library.import_commit import MANIFEST, Model, Terms, enter, place, refusal
from pullthrough.library.listing import JSON, View, detail, listing, statistics
from pullthrough.library.maintenance import Maintenance
from pullthrough.library.verifier import Defect, mend
from pullthrough.recording.pulls import Counts
from pullthrough.registry.warm import Warmer
from pullthrough.store.store import STAGING, Store


class Commands:
    """The verbs of one daemon."""

    def __init__(
        self,
        store: Store,
        maintenance: Maintenance,
        warmer: Warmer,
        *,
        pins: tuple[str, ...],
        options: list[JSON],
        count: Callable[[], object],
        pulls: Counts,
        tier: Callable[[], JSON] | None = None,
    ) -> None:
        """`options` are what `config` tells; `count` brings the store's days up to date; `tier` tells the fleet's."""
        self._store = store
        self._maintenance = maintenance
        self._warmer = warmer
        self._pins = pins
        self._options = options
        self._count = count
        self._pulls = pulls
        self._tier = tier

    def table(self) -> dict[str, Verb]:
        return {
            "ls": self._ls,
            "show": self._show,
            "stats": self._stats,
            "config": self._config,
            "rm": self._rm,
            "pin": self._pin,
            "unpin": self._unpin,
            "prune": self._prune,
            "warm": self._warm,
            "admit": self._admit,
            "mend": self._mend,
        }

    def view(self) -> View:
        """What is stored now."""
        ledger = self._store.ledger
        pins = (*self._pins, *sorted(ledger.pins))
        manifests, children = dict(self._store.manifests()), dict(self._store.children())
        return View(manifests, self._store.known_blobs(), pins, dict(ledger.days), children)

    async def _ls(self, _: Mapping[str, Any], __: Tell) -> Any:
        return await asyncio.to_thread(listing, self.view())

    async def _show(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return await asyncio.to_thread(detail, self.view(), str(arguments["model"]))

    async def _stats(self, _: Mapping[str, Any], __: Tell) -> Any:
        self._count()
        sums = await asyncio.to_thread(statistics, self.view())
        sums |= {"bypassed_pulls": self._pulls.bypassed, "unseen_pulls": self._pulls.unseen}
        return sums | {"tier": self._tier()} if self._tier is not None else sums

    async def _config(self, _: Mapping[str, Any], __: Tell) -> Any:
        return self._options

    async def _rm(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return await self._maintenance.remove([str(text) for text in arguments["models"]])

    async def _pin(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return self._maintenance.pin(str(arguments["model"]))

    async def _unpin(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return self._maintenance.unpin(str(arguments["model"]))

    async def _prune(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return await self._maintenance.prune(
            age_s=float(arguments["age"]), every=bool(arguments["all"]), dry_run=bool(arguments["dry_run"])
        )

    async def _warm(self, arguments: Mapping[str, Any], tell: Tell) -> Any:
        done = []
        for text in arguments["models"]:
            try:
                done.append(await self._warmer.warm(str(text), tell, dry_run=bool(arguments["dry_run"])))
            except CacheError as error:
                done.append({"model": str(text), "error": str(error)})
        return done

    async def _admit(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        folder = str(arguments["staging"])
        if not folder.startswith(STAGING) or "/" in folder:
            raise InvalidRequest(f"expected a folder {STAGING}… of the store, got {folder!r}")
        staging = self._store.folder / "ingest" / folder
        terms = Terms(bool(arguments["public"]), bool(arguments["replace_confirmed"]))
        name = Name.parse(str(arguments["model"]))
        try:
            body = await asyncio.to_thread((staging / MANIFEST).read_bytes)
        except OSError as error:
            raise InvalidRequest(f"expected a staged manifest of {name}, got {error}") from error
        blobs = {Digest.parse(digest): int(size) for digest, size in arguments["blobs"].items()}
        model = Model.parse(name, body, lambda _: blobs)
        outcome = refusal(self._store, model, terms)
        if outcome is None:
            placed = await asyncio.to_thread(place, self._store, staging, model)
            outcome = enter(self._store, model, terms, placed, now=time.time())
        return asdict(outcome)

    async def _mend(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        done = []
        for finding in map(Defect.parse, arguments["findings"]):
            done.append(mend(self._store, finding, now=time.time()))
            await asyncio.sleep(0)
        return done
