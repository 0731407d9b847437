"""What the daemon does for the command line, by verb.

Invariant: what only looks works on a copy in a thread, so that no pull waits for it. Knows the daemon's parts and no
socket.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from pullthrough.catalogue import JSON, View, detail, listing, statistics
from pullthrough.control import Tell, Verb
from pullthrough.errors import CacheError
from pullthrough.housekeeping import Housekeeping
from pullthrough.store import Store
from pullthrough.warm import Warmer


class Verbs:
    """The verbs of one daemon."""

    def __init__(
        self,
        store: Store,
        housekeeping: Housekeeping,
        warmer: Warmer,
        *,
        pins: tuple[str, ...],
        options: list[JSON],
        count: Callable[[], object],
    ) -> None:
        """`options` are what `config` tells; `count` brings the store's days up to date."""
        self._store = store
        self._housekeeping = housekeeping
        self._warmer = warmer
        self._pins = pins
        self._options = options
        self._count = count

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
        }

    def view(self) -> View:
        """What is stored now."""
        ledger = self._store.ledger
        pins = (*self._pins, *sorted(ledger.pins))
        return View(dict(self._store.manifests()), self._store.known_blobs(), pins, dict(ledger.days))

    async def _ls(self, _: Mapping[str, Any], __: Tell) -> Any:
        return await asyncio.to_thread(listing, self.view())

    async def _show(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return await asyncio.to_thread(detail, self.view(), str(arguments["model"]))

    async def _stats(self, _: Mapping[str, Any], __: Tell) -> Any:
        self._count()
        return await asyncio.to_thread(statistics, self.view())

    async def _config(self, _: Mapping[str, Any], __: Tell) -> Any:
        return self._options

    async def _rm(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return await self._housekeeping.remove([str(text) for text in arguments["models"]])

    async def _pin(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return self._housekeeping.pin(str(arguments["model"]))

    async def _unpin(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return self._housekeeping.unpin(str(arguments["model"]))

    async def _prune(self, arguments: Mapping[str, Any], _: Tell) -> Any:
        return await self._housekeeping.prune(
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
