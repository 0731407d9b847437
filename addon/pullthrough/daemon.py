"""The running cache: every part is built here, opened in one order, and closed in the reverse order.

Invariant: if a part fails to open, all that were opened before it are closed; each part is closed after everything that
uses it.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from pullthrough.admin.command import Arguments, Command, Look
from pullthrough.admin.commands import Commands
from pullthrough.admin.fleet_commands import FleetCommands
from pullthrough.admin.server import ControlServer
from pullthrough.config.paths import as_called_here, own_program
from pullthrough.config.settings import Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.core.errors import SettingsError, StoreError
from pullthrough.core.humanize import count_text
from pullthrough.core.records import by_model
from pullthrough.delivery.delivery import Delivery
from pullthrough.delivery.tls_contexts import TlsContext
from pullthrough.doctor.probe_server import look_out
from pullthrough.fleet.membership import Membership
from pullthrough.fleet.object_store import ObjectStore
from pullthrough.fleet.tier import load_secret
from pullthrough.library.eviction import Evictor, room_problem
from pullthrough.library.listing import JSON
from pullthrough.library.maintenance import Maintenance
from pullthrough.monitoring.event_log import EventLog
from pullthrough.monitoring.health import Health
from pullthrough.monitoring.metrics import Metrics
from pullthrough.monitoring.probes import Probes, looks_at
from pullthrough.monitoring.status import StatusView
from pullthrough.monitoring.traffic import Traffic
from pullthrough.net.connection_limits import ConnectionLimits, most_connections
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.pki.authority import Leaf
from pullthrough.pki.client_setup import clients_page, guide
from pullthrough.pki.earlier import note_authorities
from pullthrough.pki.leaves import Leaves
from pullthrough.pki.rollover import Rollover
from pullthrough.recording.plan import Line
from pullthrough.recording.pulls import Counts
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.recorder import Recorder
from pullthrough.registry.factory import build_registry
from pullthrough.registry.service import Registry
from pullthrough.runtime import platform, whereabouts
from pullthrough.runtime.executors import Threads
from pullthrough.runtime.loop_lag import LoopLag
from pullthrough.runtime.temp_folder import TemporaryFolder
from pullthrough.server import setup_pages
from pullthrough.server.blob_server import BlobServer
from pullthrough.server.status_routes import StatusRoutes
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream

_log = logging.getLogger(__name__)

DESCRIPTORS: Final = 65_536


class Proxy(Protocol):
    """The proxy that the cache runs in, passed in by the caller: see `proxy.frontend`."""

    def expect(self, limits: ConnectionLimits) -> None:
        """Limit the clients that connect, whether they wait for `open` or are served."""

    async def open(
        self,
        settings: Settings,
        registry: Registry,
        upstream: Upstream,
        delivery: Delivery,
        requests: RequestLog,
        parents: ParentProxies,
    ) -> None:
        """Serve clients from now on. Raises CacheError."""

    def close(self) -> None:
        """Stop serving. May be called without `open`."""

    def admits(self, peer: str) -> bool:
        """Return whether a client at this address is served."""

    def refused(self) -> str:
        """Return how many connections were refused since the start, and which client's was the last; "" for none."""

    def present(self, folder: str, certificates: list[str]) -> None:
        """Show clients these certificates."""

    def ports(self) -> Collection[int]:
        """Return the ports that it listens on."""

    def address(self) -> tuple[str, int]:
        """Return the address that clients use."""


class Daemon:
    """One cache, from its creation to `stop`."""

    def __init__(
        self, settings: Settings, proxy: Proxy, parents: ParentProxies, *, trusted_ca: str | None, options: list[JSON]
    ) -> None:
        """Open what needs no event loop. Raises CacheError, leaving nothing open.

        `parents` are the ways out, `trusted_ca` a file of authorities to verify registries by, `options` what the
        command `config` shows.
        """
        self._settings = settings
        self._proxy = proxy
        self._parents = parents
        self._options = options
        self._requests = RequestLog()
        self._tls = TlsContext()
        self._rollover = Rollover.load_or_create(settings.certs, settings.intercepted, now=datetime.now(UTC))
        self._rollover.offer()
        try:
            self._upstream = Upstream(
                settings,
                trusted_ca=trusted_ca,
                own_addresses=platform.own_addresses,
                own_ports=proxy.ports,
                parents=parents,
            )
        except OSError as error:
            raise SettingsError(
                f"option ssl_verify_upstream_trusted_ca: expected a PEM file of certificates, got: {error}"
            ) from error
        self._fleet: tuple[ObjectStore, bytes] | None = None
        if settings.object_store is not None and settings.fleet_secret_file is not None:
            self._fleet = ObjectStore(settings.object_store), load_secret(settings.fleet_secret_file)
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(TemporaryFolder())
            self._store = Store.open(settings.dir, settings.index_dir)
            stack.callback(self._store.close)
            try:
                for warning in note_authorities(settings.dir, self._rollover, now=datetime.now(UTC)):
                    _log.warning("%s", warning)
            except OSError as error:
                _log.warning("the authority that serves this store could not be noted in it: %s", error)
            # A big store's data stays in memory: each full collection would walk it all while no client is served.
            gc.freeze()
            self._limits = ConnectionLimits(most_connections(platform.allow_descriptors(DESCRIPTORS)))
            proxy.expect(self._limits)
            self._blob_server = BlobServer(settings)
            stack.callback(self._blob_server.release)
            self._leaves = Leaves(self._rollover, settings.intercepted, Path(self._folder), self._show)
            self._health = Health(settings.dir, self._leaves.expiries)
            self._stack = contextlib.AsyncExitStack()
            self._stack.enter_context(stack.pop_all())

    async def start(self) -> None:
        """Open the rest, and serve clients from then on. Raises CacheError, leaving nothing open."""
        async with self._stack as stack:
            await self._open(stack)
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """Close everything; recordings keep what they have. May be called twice, and without `start`."""
        await self._stack.aclose()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        settings, store, upstream = self._settings, self._store, self._upstream
        requests, health = self._requests, self._health
        events = stack.enter_context(EventLog())
        threads, lag = Threads(), LoopLag()
        fleet = Membership(*self._fleet, store, upstream, threads) if self._fleet is not None else None
        evictor = Evictor(store, threads, max_size=settings.max_size, min_free=settings.min_free, pins=settings.pins)
        line = Line(settings.upstream_connections, RateLimit(settings.upstream_rate))
        near = (fleet.tier, fleet.leases) if fleet is not None else None
        recorder = Recorder(store, evictor, upstream, threads, line, settings.finish, near)
        side = build_registry(settings, store, upstream, recorder, fleet.tier if fleet is not None else None)
        registry, pulls = side.registry, side.pulls.counts
        requests.on_sent = lambda client, count: side.clients.send(client, count, now=time.time())
        traffic = Traffic(store.ledger, requests, recorder.counters, side.pulls, side.history)
        delivery = Delivery(settings, registry.answer, requests, self._tls, upstream)

        stack.callback(traffic.count)
        stack.push_async_callback(upstream.close)
        await upstream.open()
        stack.callback(threads.close)
        stack.push_async_callback(lag.close)
        lag.open()
        if fleet is not None:
            stack.push_async_callback(fleet.close)
            await fleet.open(self._blob_server.address_for, lambda digest: recorder.find(digest) is not None)
        stack.push_async_callback(recorder.close)
        stack.callback(side.history.close)
        stack.push_async_callback(side.prefetcher.close)
        stack.push_async_callback(side.redirects.close)
        stack.push_async_callback(side.refresher.close)
        side.refresher.open()
        stack.push_async_callback(delivery.close)
        await delivery.open()
        # The blob server's ports are open already: clients there wait for the proxy, which admits them.
        stack.push_async_callback(self._blob_server.close)
        stack.callback(self._proxy.close)
        await self._proxy.open(settings, registry, upstream, delivery, requests, self._parents)
        maintenance = Maintenance(store, settings.pins, recorder.running)
        shared = None
        if fleet is not None:
            offices = (store, maintenance, side.warmer, recorder.counters)
            shared = FleetCommands(fleet.tier, fleet.uploader, *offices)
        tier = shared.state if shared is not None else None
        commands = Commands(
            store,
            maintenance,
            side.warmer,
            recorder,
            pins=settings.pins,
            options=self._options,
            count=traffic.count,
            pulls=pulls,
            services=health.services,
            tier=tier,
        )
        self._add_pages(
            Metrics(settings, store, recorder, upstream, requests, lag, health, pulls, tier),
            StatusView(
                settings,
                store,
                recorder,
                upstream,
                health,
                commands.view,
                side.pulls,
                side.clients,
                side.history,
                events,
                tier,
            ),
        )
        await self._blob_server.open(registry, self._proxy.admits, self._limits, requests, delivery.threads)
        _run(stack, traffic.keep_counting(), "count bytes")
        _run(stack, _settle(store), "compare the store")
        _run(stack, self._leaves.renew(), "renew leaves")
        table = {**commands.table(), **(shared.table() if shared is not None else {}), **self._own_commands(pulls)}
        control = ControlServer(settings.dir, table)
        stack.push_async_callback(control.close)
        await control.open()
        stack.push_async_callback(health.close)
        health.open(Probes(upstream.reachability, looks_at(upstream, fleet.tier if fleet is not None else None)))
        _log.info(
            "store %s (%s, %s), CA %s SHA-256 %s, plain HTTP %s",
            settings.dir,
            count_text(len(store.blobs()), "blob"),
            count_text(len(by_model(store.manifests())), "model"),
            self._rollover.current.certificate_file,
            self._rollover.current.fingerprint,
            self._blob_server,
        )
        if problem := room_problem(store.folder, settings.min_free):
            _log.warning("%s", as_called_here(problem))
        if settings.offline:
            _log.info("offline: nothing is fetched, and what is stored is served (ollama_cache_offline=true)")
        page = clients_page(settings) if settings.listen else ""
        self._announce(stack, page)
        shows = f"{page} shows it; " if page else ""
        _log.info("ollama-cache ready: %s%s connect sets up a client", shows, own_program())

    def _announce(self, stack: contextlib.AsyncExitStack, page: str) -> None:
        """Let the commands of any user, from any folder, find this cache until it is closed."""
        settings = self._settings
        try:
            note = whereabouts.announce(settings.runtime_dir, store=settings.dir, certs=settings.certs, page=page)
        except OSError as error:
            _log.warning("the commands need --dir %s to find this cache: %s", settings.dir, error)
        else:
            stack.callback(note.unlink, missing_ok=True)

    def _show(self, leaves: Sequence[Leaf], files: list[str]) -> None:
        for leaf in leaves:
            if leaf.host == self._settings.blob_host:
                self._tls.renew(leaf)
        self._proxy.present(self._folder, files)

    def _add_pages(self, metrics: Metrics, watch: StatusView) -> None:
        pages, settings, rollover = self._blob_server.pages, self._settings, self._rollover
        setup = guide(settings, rollover.certificates, rollover.permitted, self._proxy.address()[1])
        setup_pages.add(pages, settings, setup.documents)
        StatusRoutes(metrics, self._health, watch, setup).enter(pages)

    def _own_commands(self, pulls: Counts) -> dict[str, Command]:
        """Return the control commands that the daemon itself answers, not one of its parts."""

        async def tell_address(_: Arguments) -> Any:
            host, port = self._proxy.address()
            return {"host": host, "port": port}

        async def look(_: Arguments) -> Any:
            found = await look_out(self._upstream, self._settings, datetime.now(UTC))
            counted = {"bypassed": pulls.bypassed, "refused": self._proxy.refused()}
            return {**asdict(found), **counted, "descriptors": platform.descriptors()}

        return {"proxy": Look(tell_address), "look-out": Look(look)}


async def _settle(store: Store) -> None:
    try:
        await store.settle()
    except StoreError as error:
        _log.warning("%s; it is tried again before anything is removed", error)


def _run(stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> None:
    """Run `work` in the background until the stack is closed."""
    task = asyncio.get_running_loop().create_task(work, name=name)

    async def end() -> None:
        task.cancel()
        await asyncio.wait([task])

    stack.push_async_callback(end)
