"""The mitmproxy addon: options and life.

Invariant: a start that fails ends mitmdump before it serves anybody; what runs is owned here, opened in `configure`
and `running`, released in `done`. Knows how mitmproxy works and nothing of how a request is answered.
"""

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, Optional

from mitmproxy import addonmanager, ctx, exceptions
from mitmproxy.proxy.mode_specs import ProxyMode

from pullthrough.admin.command import Arguments, Look
from pullthrough.admin.desk import Desk
from pullthrough.config.options import OPTIONS, check_foreign
from pullthrough.config.settings import PREFIX, PROXY_PORT, Settings
from pullthrough.config.sources import Choices, choices
from pullthrough.core.access_log import RequestLog
from pullthrough.core.errors import CacheError, SettingsError, TierError
from pullthrough.core.records import by_model
from pullthrough.delivery.delivery import Delivery
from pullthrough.delivery.tls_contexts import TlsContext
from pullthrough.doctor.probe_server import look_out
from pullthrough.fleet.lease_holder import LeaseHolder
from pullthrough.fleet.object_store import ObjectStore, endpoint
from pullthrough.fleet.tier import Tier, load_secret
from pullthrough.fleet.uploader import Uploader
from pullthrough.library.eviction import Evictor
from pullthrough.monitoring.health import Health
from pullthrough.monitoring.lookout import Lookout, looks_at
from pullthrough.monitoring.metrics import Metrics
from pullthrough.monitoring.status import StatusView
from pullthrough.net.connection_limits import ConnectionLimits, most_connections
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.pki.authority import Leaf, is_due
from pullthrough.pki.client_setup import guide
from pullthrough.pki.rollover import Rollover
from pullthrough.proxy.connection_hooks import ConnectionHooks, own_ports
from pullthrough.proxy.hook_check import check_hooks
from pullthrough.proxy.idle_addons import remove_idle
from pullthrough.proxy.log_setup import set_up_logs
from pullthrough.proxy.modes import check_modes
from pullthrough.proxy.request_hooks import RequestHooks
from pullthrough.proxy.takeover import Takeover
from pullthrough.proxy.upstream_proxy import check_internals, ways_out
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.recorder import Recorder
from pullthrough.recording.workroom import Workroom
from pullthrough.registry.service import Registry
from pullthrough.runtime import platform
from pullthrough.runtime.executors import Threads
from pullthrough.runtime.loop_lag import LoopLag
from pullthrough.runtime.temp_folder import TemporaryFolder
from pullthrough.server import setup_pages
from pullthrough.server.blob_server import BlobServer
from pullthrough.server.status_routes import StatusRoutes
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream

_log = logging.getLogger(__name__)

REMINT_S: Final = 60.0  # so soon after the machine's clock was set
DESCRIPTORS: Final = 65_536
PROXIES: Final = ("regular", "upstream")
"""Those of mitmproxy's modes whose clients know that they have a proxy."""

MITMPROXY_OPTIONS: Final = {
    # A hit must not dial upstream first (mitmproxy#4775).
    "connection_strategy": "lazy",
    # An early end over HTTP/2 costs Ollama its progress, and mitmproxy's HTTP/2 send buffer is unbounded.
    "http2": False,
    "http3": False,
    "onboarding": False,
    "flow_detail": 0,
    # Who may connect is `clients`' to say, in both directions.
    "block_global": False,
    "block_private": False,
    "store_streamed_bodies": False,
    "stream_large_bodies": None,
    "body_size_limit": None,
    "upstream_cert": False,
    # In reverse mode too, Host is what the client said: it must agree with SNI.
    "keep_host_header": True,
}
_TEXT: Final[Any] = Optional[str]  # noqa: UP045 -- mitmproxy tells types by how they are written
REFUSED: Final = {"ssl_insecure": "the certificates of registries are always verified"} | dict.fromkeys(
    ("emudhra", "emudhra_old"), "it signs with the leaked key of a public authority"
)
"""Options of mitmproxy that stop the start when they are on, and why. The last two came with 12.3."""


class OllamaCache:
    """The addon that `mitmdump -s addon/ollama_cache.py` runs."""

    name = "ollama_cache"

    def __init__(self) -> None:
        self._choices = Choices({}, {})
        self._settings: Settings | None = None
        self._store: Store | None = None
        self._rollover: Rollover | None = None
        self._leaves: list[Leaf] = []
        self._confdir: TemporaryFolder | None = None
        self._parents = ParentProxies()
        self._upstream: Upstream | None = None
        self._threads: Threads | None = None
        self._fleet: tuple[ObjectStore, bytes] | None = None
        self._uploader: Uploader | None = None
        self._leases: LeaseHolder | None = None
        self._recorder: Recorder | None = None
        self._registry: Registry | None = None
        self._requests = RequestLog()
        self._lag = LoopLag()
        self._health: Health | None = None
        self._blob_server: BlobServer | None = None
        self._desk: Desk | None = None
        self._tls = TlsContext()
        self._delivery: Delivery | None = None
        self._minting: asyncio.Task[None] | None = None
        self._descriptors = DESCRIPTORS
        self._takeover = Takeover(lambda client: self._hooks.client_limits.hand_over(client))
        self._hooks = ConnectionHooks(self._takeover)
        self._flows = RequestHooks(self._hooks)
        self.addons = [self._hooks, self._flows]

    def load(self, loader: addonmanager.Loader) -> None:
        """Declare our options, as text: mitmproxy unloads an addon whose numeric option does not parse, silently."""
        try:
            check_internals()
            _check_options()
        except CacheError as error:
            _stop(error)
        for option in OPTIONS:
            # None is what the command line does not say; where else an option may come from is not mitmproxy's to know.
            default = f" Default: {option.default}." if option.default else ""
            loader.add_option(f"{PREFIX}{option.name}", _TEXT, None, f"{option.help}{default}")
        ctx.options.update(**MITMPROXY_OPTIONS)

    def configure(self, updated: AbstractSet[str]) -> None:
        """Understand the options and open what needs no event loop; stop with one line where that fails."""
        if self._settings is not None:
            if changed := sorted(name for name in updated if name.startswith(PREFIX)):
                raise exceptions.OptionsError(f"{changed[0]} cannot be changed while running")
            return
        try:
            self._open()
        except CacheError as error:
            _stop(error)

    def _open(self) -> None:
        check_foreign(ctx.options.deferred)
        said = {option.name: getattr(ctx.options, f"{PREFIX}{option.name}") for option in OPTIONS}
        self._choices = choices({name: text for name, text in said.items() if text is not None}, os.environ)
        settings = self._choices.settings()
        check_modes(ctx.options.mode, settings.intercepted)
        set_up_logs(settings.log, settings.log_level)
        self._rollover = Rollover.load_or_create(settings.certs, settings.intercepted, now=_now())
        self._parents = ways_out(os.environ, _ports())
        try:
            self._upstream = Upstream(
                settings,
                trusted_ca=ctx.options.ssl_verify_upstream_trusted_ca,
                own_addresses=platform.own_addresses,
                own_ports=own_ports,
                parents=self._parents,
            )
        except OSError as error:
            raise CacheError(
                f"option ssl_verify_upstream_trusted_ca: expected a PEM file of certificates, got: {error}"
            ) from error
        if settings.object_store is not None and settings.fleet_secret_file is not None:
            self._fleet = ObjectStore(settings.object_store), load_secret(settings.fleet_secret_file)
        self._confdir = TemporaryFolder()
        self._store = Store.open(settings.dir, settings.index_dir)
        self._health = Health(settings.dir, self._certificates)
        # What a big store keeps resident stays: each full collection would walk all of it, and no client be served.
        gc.freeze()
        self._descriptors = platform.allow_descriptors(DESCRIPTORS)
        self._blob_server = BlobServer(settings)
        self._settings = settings
        self._mint()

    def _mint(self) -> None:
        """Make a leaf for each intercepted host, for mitmproxy too; its own CA is a throw-away that nobody trusts."""
        assert self._settings and self._rollover and self._confdir
        self._leaves = [self._rollover.issue(host, now=_now()) for host in self._settings.intercepted]
        specs = []
        for leaf in self._leaves:
            # A new name each time: mitmproxy reads the files again only when the option changes.
            path = Path(self._confdir.name) / f"{leaf.host}-{time.time_ns()}.pem"
            path.touch(mode=0o600)
            path.write_bytes(leaf.pem)
            specs.append(f"{leaf.host}={path}")
            if leaf.host == self._settings.blob_host:
                self._tls.renew(leaf)
        ctx.options.update(confdir=self._confdir.name, certs=specs)

    def _certificates(self) -> dict[str, datetime]:
        """Until when our certificates are valid."""
        assert self._rollover
        return {"CA": self._rollover.current.not_after, **{leaf.host: leaf.not_after for leaf in self._leaves}}

    async def running(self) -> None:
        """Open what needs the event loop; from here on clients are served."""
        settings, health = self._settings, self._health
        assert settings and health and self._store and self._rollover and self._upstream and self._blob_server
        await self._upstream.open()
        self._threads = Threads()
        evictor = Evictor(
            self._store, self._threads, max_size=settings.max_size, min_free=settings.min_free, pins=settings.pins
        )
        fleet = self._join(*self._fleet) if self._fleet is not None else None
        room = Workroom(
            self._store,
            evictor,
            self._upstream,
            self._threads,
            connections=settings.upstream_connections,
            finish=settings.finish,
            rate_limit=RateLimit(settings.upstream_rate),
            fleet=fleet,
        )
        self._recorder = Recorder(room)
        self._registry = Registry(settings, self._store, self._upstream, self._recorder, fleet and fleet[0])
        self._requests.on_sent = self._registry.count_sent
        self._registry.open()
        health.open(Lookout(self._upstream.reachability, looks_at(self._upstream, fleet and fleet[0])))
        told = {"proxy": Look(_tell_address), "look-out": Look(self._look_out)}
        shared = await self._share(*fleet) if fleet is not None else None
        parts = (self._store, self._recorder, self._registry, self._requests, health.services)
        self._desk = Desk(settings, *parts, self._choices.rows(), told, shared)
        await self._desk.open()
        self._minting = asyncio.get_running_loop().create_task(self._remint(), name="re-mint leaves")
        self._lag.open()
        self._forbid_reload()
        remove_idle()
        try:
            await check_hooks(self._hooks)
        except CacheError as error:
            _stop(error)
        self._delivery = Delivery(settings, self._registry.answer, self._requests, self._tls, self._upstream)
        await self._delivery.open()
        await self._takeover.open(self._delivery, settings.blob_host)
        limits = ConnectionLimits(most_connections(self._descriptors))
        self._hooks.prepare(settings, self._parents, self._upstream.loop, limits, self._delivery.loopback.address)
        self._flows.open(settings, self._registry, self._upstream.loop, self._requests, self._delivery.loopback)
        self._hooks.open()
        views = (settings, self._store, self._recorder, self._upstream)
        metrics = Metrics(*views, self._requests, self._lag, health, self._registry.pulls.counts, self._desk.tier)
        seen = (self._registry.pulls.counts, self._registry.clients)
        watch = StatusView(*views, health, self._desk.view, *seen, self._desk.tier)
        setup = guide(settings, self._rollover.certificates, self._rollover.permitted, _proxy_address()[1])
        setup_pages.add(self._blob_server.pages, settings, setup.documents)
        StatusRoutes(metrics, health, watch, setup).enter(self._blob_server.pages)
        await self._blob_server.open(self._registry, self._hooks.admits, limits, self._requests, self._delivery.threads)
        _log.info(
            "ollama-cache ready: store %s (%d blobs, %d models), CA %s SHA-256 %s, plain HTTP %s",
            settings.dir,
            len(self._store.blobs()),
            len(by_model(self._store.manifests())),
            self._rollover.current.certificate_file,
            self._rollover.current.fingerprint,
            self._blob_server,
        )

    def _join(self, objects: ObjectStore, secret: bytes) -> tuple[Tier, LeaseHolder]:
        """What recordings need of the fleet."""
        assert self._threads and self._upstream and self._store
        tier = Tier(objects, secret, self._threads, self._upstream)
        return tier, LeaseHolder(tier, self._store, self._upstream)

    async def _share(self, tier: Tier, leases: LeaseHolder) -> tuple[Tier, Uploader]:
        """Begin to upload, and to tell the fleet what is being fetched here."""
        assert self._threads and self._store and self._blob_server and self._recorder
        recorder, origin = self._recorder, None
        try:
            host = endpoint(await self._threads.network(tier.objects.sign, "leases", lifetime_s=1.0))
        except TierError as error:
            _log.warning("%s; this cache fetches for itself alone", error)
        else:
            address = await self._threads.network(platform.address_towards, *host)
            origin = self._blob_server.address_for(address) if address is not None else None
        _log.info("the fleet's caches find this one at %s", origin or "no address")
        self._leases, self._uploader = leases, Uploader(tier, self._store, self._threads)
        leases.open(origin, lambda digest: recorder.find(digest) is not None)
        self._uploader.open()
        return tier, self._uploader

    async def done(self) -> None:
        """Let go of everything; recordings keep what they have."""
        if self._health is not None:
            await self._health.close()
        self._hooks.close()
        self._takeover.close()
        self._lag.close()
        _log.info("event loop lag: %s", self._lag)
        if self._minting is not None:
            self._minting.cancel()
        if self._desk is not None:
            await self._desk.close()
        self._flows.close()
        if self._blob_server is not None:
            await self._blob_server.close()
        if self._delivery is not None:
            await self._delivery.close()
        if self._registry is not None:
            await self._registry.close()
        if self._recorder is not None:
            await self._recorder.close()
        if self._uploader is not None:
            await self._uploader.close()
        if self._leases is not None:
            await self._leases.close()
        if self._threads is not None:
            self._threads.close()
        if self._upstream is not None:
            await self._upstream.close()
        if self._store is not None:
            if self._desk is not None:
                self._desk.count()
            self._store.close()
            self._store = None
        if self._confdir is not None:
            self._confdir.cleanup()
            self._confdir = None

    async def _look_out(self, _: Arguments) -> Any:
        """For the doctor: how the registry answers the client that pulls use."""
        assert self._settings and self._upstream and self._registry
        return asdict(await look_out(self._upstream, self._settings, _now(), self._registry.pulls.counts.bypassed))

    async def _remint(self) -> None:
        while True:
            await asyncio.sleep(REMINT_S)
            if any(is_due(leaf, _now()) for leaf in self._leaves):
                self._mint()
                _log.info("leaf certificates renewed")

    def _forbid_reload(self) -> None:
        """mitmproxy reloads a script whose file changes, half-way: a new addon without its asynchronous start."""
        for script in ctx.master.addons.get("scriptloader").addons:
            if script.ns is not None and self in getattr(script.ns, "addons", ()) and script.reloadtask:
                script.reloadtask.cancel()


def _stop(error: CacheError) -> NoReturn:
    """End mitmdump before it serves anybody: a cache that failed to start must not be an open proxy."""
    _log.error("ollama-cache: %s", error)
    sys.exit(1)


def _check_options() -> None:
    """Refuse the options of mitmproxy that undo what clients trust us for. Raises SettingsError."""
    for name, reason in REFUSED.items():
        if name in ctx.options and getattr(ctx.options, name):
            raise SettingsError(f"option {name}: must be off ({reason}); remove it and start again")


def _proxy_address() -> tuple[str, int]:
    """The first listener that speaks as a proxy; host "" for all addresses."""
    servers = ctx.master.addons.get("proxyserver").servers
    found = [address[:2] for server in servers if server.mode.type_name in PROXIES for address in server.listen_addrs]
    return found[0] if found else ("", ctx.options.listen_port or PROXY_PORT)


async def _tell_address(_: Arguments) -> Any:
    host, port = _proxy_address()
    return {"host": host, "port": port}


def _ports() -> set[int]:
    """The ports that mitmproxy is to listen on."""
    modes = (ProxyMode.parse(spec) for spec in ctx.options.mode)
    return {port for mode in modes if (port := mode.listen_port(ctx.options.listen_port))}


def _now() -> datetime:
    return datetime.now(UTC)
