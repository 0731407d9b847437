"""What the addon owns for the command line: the control socket, and the count of bytes.

Invariant: counts reach the index once a minute and at the end, never with a request. Knows which parts the verbs
need, and nothing of flows.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final

from pullthrough.admin.command import Command
from pullthrough.admin.commands import Commands, Services
from pullthrough.admin.fleet_commands import FleetCommands
from pullthrough.admin.server import ControlServer
from pullthrough.config.settings import Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.core.errors import StoreError
from pullthrough.fleet.tier import Tier
from pullthrough.fleet.uploader import Uploader
from pullthrough.library.listing import JSON, View
from pullthrough.library.maintenance import Maintenance
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.service import Registry
from pullthrough.store.store import Store
from pullthrough.store.usage import Usage

_log = logging.getLogger(__name__)

WRITE_S: Final = 60.0


class Desk:
    """Of one daemon."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        registry: Registry,
        requests: RequestLog,
        services: Services,
        options: list[JSON],
        others: Mapping[str, Command],
        fleet: tuple[Tier, Uploader] | None = None,
    ) -> None:
        """`services` tells what is known of the servers that the cache draws on, `options` are what `config` tells;
        `others` are commands that are not about the store."""
        self._store = store
        self._recorder = recorder
        self._requests = requests
        self._pulls = registry.pulls
        self._traffic = Usage(store.ledger.days)
        maintenance = Maintenance(store, settings.pins, recorder.running)
        shared = FleetCommands(*fleet, store, maintenance, registry.warmer, recorder.counters) if fleet else None
        self.tier = shared.state if shared else None
        """Tells the state of the fleet's object store, where there is one."""
        self._verbs = Commands(
            store,
            maintenance,
            registry.warmer,
            pins=settings.pins,
            options=options,
            count=self.count,
            pulls=registry.pulls.counts,
            services=services,
            tier=self.tier,
        )
        self._control = ControlServer(
            settings.dir, {**self._verbs.table(), **(shared.table() if shared else {}), **others}
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        await self._control.open()
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._run(), name="count bytes"))
        self._tasks.append(loop.create_task(self._settle(), name="compare the store"))

    async def close(self) -> None:
        """Take no verb any more; what is still sent and fetched is for one more `count`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._control.close()

    def view(self) -> View:
        """What is stored and was counted, now."""
        self.count()
        return self._verbs.view()

    def count(self) -> None:
        """Bring the store's days up to date."""
        self._pulls.expire(now=time.monotonic())
        fetched = self._recorder.counters.upstream_bytes
        self._traffic.count_up_to(served=self._requests.sent, fetched=fetched, now=time.time())
        self._store.ledger.put_days(self._traffic.take())

    async def _settle(self) -> None:
        try:
            await self._store.settle()
        except StoreError as error:
            _log.warning("%s; it is tried again before anything is removed", error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            self.count()
