"""The mitmproxy addon: options, life, and flows turned into requests and answers.

Invariant: a start that fails ends mitmdump before it serves anybody; what runs is owned here, opened in `configure`
and `running`, released in `done`. Knows how mitmproxy works and nothing of how a request is answered.
"""

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from mitmproxy import addonmanager, ctx, exceptions, http
from mitmproxy.proxy.mode_specs import ReverseMode

from pullthrough import places, platform
from pullthrough.blobserver import BlobServer
from pullthrough.budget import Budget
from pullthrough.ca import Authority, Leaf, is_due
from pullthrough.desk import Desk
from pullthrough.errors import CacheError, Misdirected
from pullthrough.exchange import Answer, Request
from pullthrough.gate import Gate, normal, own_ports, refuse
from pullthrough.keeper import Keeper
from pullthrough.looplag import LoopLag
from pullthrough.modes import check_modes
from pullthrough.options import ENVIRONMENT_PREFIX, OPTIONS, parse_settings
from pullthrough.reader import Reader
from pullthrough.recorder import Recorder
from pullthrough.registry import Registry
from pullthrough.requestlog import log_answer, log_transfer
from pullthrough.settings import PREFIX, Settings
from pullthrough.store import Store
from pullthrough.streamlayer import Mouth, Transfer, Transfers, check_internals
from pullthrough.threads import Threads
from pullthrough.upstream import Upstream
from pullthrough.workroom import Workroom

_log = logging.getLogger(__name__)

REMINT_S: Final = 3600.0
DESCRIPTORS: Final = 65_536

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
    "ssl_insecure": False,
    "store_streamed_bodies": False,
    "stream_large_bodies": None,
    "body_size_limit": None,
    "upstream_cert": False,
    # In reverse mode too, Host is what the client said: it must agree with SNI.
    "keep_host_header": True,
}


class OllamaCache:
    """The addon that `mitmdump -s addon/ollama_cache.py` runs."""

    name = "ollama_cache"

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._store: Store | None = None
        self._authority: Authority | None = None
        self._leaves: list[Leaf] = []
        self._confdir: tempfile.TemporaryDirectory[str] | None = None
        self._upstream: Upstream | None = None
        self._threads: Threads | None = None
        self._recorder: Recorder | None = None
        self._registry: Registry | None = None
        self._lag = LoopLag()
        self._blob_server: BlobServer | None = None
        self._desk: Desk | None = None
        self._minting: asyncio.Task[None] | None = None
        self._transfers: Transfers = {}
        self._gate = Gate(self._transfers)
        self.addons = [self._gate]
        self._mouth = Mouth(lambda client: ctx.master.addons.get("proxyserver").connections.get(client))

    # --- life

    def load(self, loader: addonmanager.Loader) -> None:
        """Declare our options, as text: mitmproxy unloads an addon whose numeric option does not parse, silently."""
        try:
            check_internals()
        except CacheError as error:
            _stop(error)
        for option in OPTIONS:
            default = os.environ.get(f"{ENVIRONMENT_PREFIX}{option.name.upper()}", option.default)
            loader.add_option(f"{PREFIX}{option.name}", str, default, option.help)
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
        texts = {option.name: getattr(ctx.options, f"{PREFIX}{option.name}") for option in OPTIONS}
        texts |= {name.removeprefix(PREFIX): "" for name in ctx.options.deferred if name.startswith(PREFIX)}
        settings = parse_settings(texts, dir=places.default_store(), certs=places.default_certs())
        check_modes(ctx.options.mode, settings.intercepted)
        logging.getLogger("pullthrough").setLevel(settings.log_level.upper())
        # One line per connect and disconnect of every client drowns what the cache has to say.
        quiet = logging.DEBUG if settings.log_level == "debug" else logging.WARNING
        logging.getLogger("mitmproxy.proxy.server").setLevel(quiet)
        logging.getLogger("mitmproxy.proxy.layers").setLevel(quiet)
        self._authority = Authority.load_or_create(settings.certs, settings.intercepted, now=_now())
        try:
            self._upstream = Upstream(
                settings,
                trusted_ca=ctx.options.ssl_verify_upstream_trusted_ca,
                own_addresses=platform.own_addresses,
                own_ports=own_ports,
            )
        except OSError as error:
            raise CacheError(
                f"option ssl_verify_upstream_trusted_ca: expected a PEM file of certificates, got: {error}"
            ) from error
        self._confdir = tempfile.TemporaryDirectory(prefix="ollama-cache-")
        self._store = Store.open(settings.dir)
        platform.allow_descriptors(DESCRIPTORS)
        self._blob_server = BlobServer(settings)
        self._settings = settings
        self._mint()

    def _mint(self) -> None:
        """Give mitmproxy a leaf for each intercepted host; its own CA is a throw-away that nobody trusts."""
        assert self._settings and self._authority and self._confdir
        folder = Path(self._confdir.name)
        self._leaves = [self._authority.issue(host, now=_now()) for host in self._settings.intercepted]
        specs = []
        for leaf in self._leaves:
            # A new name each time: mitmproxy reads the files again only when the option changes.
            path = folder / f"{leaf.host}-{time.time_ns()}.pem"
            path.touch(mode=0o600)
            path.write_bytes(leaf.pem)
            specs.append(f"{leaf.host}={path}")
        ctx.options.update(confdir=self._confdir.name, certs=specs)

    async def running(self) -> None:
        """Open what needs the event loop; from here on clients are served."""
        assert self._settings and self._store and self._authority and self._upstream and self._blob_server
        settings = self._settings
        await self._upstream.open()
        self._threads = Threads()
        keeper = Keeper(
            self._store,
            self._threads,
            max_size=settings.max_size,
            min_free=settings.min_free,
            pins=settings.pins,
        )
        room = Workroom(
            self._store,
            keeper,
            self._upstream,
            self._threads,
            connections=settings.upstream_connections,
            finish=settings.finish,
            budget=Budget(settings.upstream_rate),
        )
        self._recorder = Recorder(room)
        self._registry = Registry(settings, self._store, self._upstream, self._recorder)
        self._registry.open()
        self._desk = Desk(settings, self._store, self._recorder, self._registry, _origins(settings))
        await self._desk.open()
        self._minting = asyncio.get_running_loop().create_task(self._remint(), name="re-mint leaves")
        self._lag.open()
        self._forbid_reload()
        self._gate.open(settings)
        await self._blob_server.open(self._registry, self._gate.admits, self._desk.serve)
        _log.info(
            "ollama-cache ready: store %s (%d blobs, %d models), CA %s SHA-256 %s, plain HTTP %s",
            settings.dir,
            len(self._store.blobs()),
            len(self._store.manifests()),
            self._authority.certificate_file,
            self._authority.fingerprint,
            self._blob_server,
        )

    async def done(self) -> None:
        """Let go of everything; recordings keep what they have."""
        self._gate.close()
        self._lag.close()
        _log.info("event loop lag: %s", self._lag)
        if self._minting is not None:
            self._minting.cancel()
        if self._desk is not None:
            await self._desk.close()
        if self._blob_server is not None:
            await self._blob_server.close()
        registry, self._registry = self._registry, None
        if registry is not None:
            await registry.close()
        if self._recorder is not None:
            await self._recorder.close()
        for transfer in list(self._transfers.values()):
            transfer.close()
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

    # --- flows

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Let bodies flow: only requests that we may answer are held until they are complete."""
        try:
            if self._gate.is_ours(flow.request.host):
                self._gate.check_names(flow)
        except Misdirected as error:
            _log.warning("%s", error)
            if _has_body(flow.request):
                flow.kill()
            else:
                refuse(flow, error.status_hint, str(error))
            return
        if not self._may_answer(flow):
            self._reroute(flow)
            flow.request.stream = True

    async def request(self, flow: http.HTTPFlow) -> None:
        if flow.response is not None or flow.error is not None or flow.request.stream:
            return
        registry = self._registry
        try:
            if registry is None:
                raise CacheError("the cache is not open")
            answer = await registry.answer(_request(flow))
        except Exception:
            # Never upstream's bytes by accident, never text that ends in a model file.
            _log.exception("answering %s failed", flow.request.path.partition("?")[0])
            flow.response = _response(502, [], b"", 0)
            return
        if answer is None:
            self._reroute(flow)
        else:
            self._apply(flow, answer)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is not None and flow.id not in self._transfers:
            flow.response.stream = True

    def response(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    async def ollama_cache_piece(self, transfer: Transfer) -> None:
        """The stream layer wants the next piece of a body."""
        await self._mouth.fill(transfer)

    def _apply(self, flow: http.HTTPFlow, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else b""
        headers = [*answer.headers, ("Cache-Status", str(answer.cache))]
        flow.response = _response(answer.status, headers, body, answer.length)
        if isinstance(answer.body, Reader):
            self._transfers[flow.id] = Transfer(flow, answer.body, held=answer.held)
        else:
            log_answer(
                flow.client_conn.peername[0], flow.request.method, flow.request.path, answer.status, str(answer.cache)
            )

    def _finish(self, flow: http.HTTPFlow) -> None:
        transfer = self._transfers.pop(flow.id, None)
        if transfer is None:
            return
        transfer.close()
        assert flow.response and self._desk
        self._desk.serve(transfer.sent)
        log_transfer(
            flow.client_conn.peername[0],
            flow.request.method,
            flow.request.path,
            flow.response.status_code,
            flow.response.headers.get("Cache-Status", ""),
            sent=transfer.sent,
            seconds=time.monotonic() - transfer.began,
            problem=flow.error.msg if flow.error else "",
        )

    def _may_answer(self, flow: http.HTTPFlow) -> bool:
        return (
            self._gate.is_ours(flow.request.host)
            and flow.request.method in ("GET", "HEAD")
            and not _has_body(flow.request)
        )

    def _reroute(self, flow: http.HTTPFlow) -> None:
        """Send a passed-through request where `upstream` says that its host is."""
        assert self._settings
        endpoint = self._settings.upstream.get(normal(flow.request.host))
        if endpoint is not None:
            flow.request.scheme, flow.request.host, flow.request.port = endpoint.scheme, endpoint.host, endpoint.port


def _stop(error: CacheError) -> NoReturn:
    """End mitmdump before it serves anybody: a cache that failed to start must not be an open proxy."""
    _log.error("ollama-cache: %s", error)
    sys.exit(1)


def _origins(settings: Settings) -> list[dict[str, str]]:
    """Each option as it stands, and where that comes from."""
    places_of = {"dir": str(settings.dir), "certs": str(settings.certs)}
    rows = []
    for option in OPTIONS:
        by_environment = bool(os.environ.get(f"{ENVIRONMENT_PREFIX}{option.name.upper()}"))
        source = "environment" if by_environment else "default"
        if ctx.options.has_changed(f"{PREFIX}{option.name}"):
            source = "command line"
        value = places_of.get(option.name, getattr(ctx.options, f"{PREFIX}{option.name}"))
        rows.append({"name": option.name, "value": value, "source": source})
    return rows


def _now() -> datetime:
    return datetime.now(UTC)


def _has_body(request: http.Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _request(flow: http.HTTPFlow) -> Request:
    headers = {name.lower(): value for name, value in flow.request.headers.items()}
    host = normal(flow.request.host)
    # In reverse mode a client reaches us by a hosts entry, which the blob host need not have.
    reverse = isinstance(flow.client_conn.proxy_mode, ReverseMode)
    return Request(
        flow.request.method,
        flow.request.scheme,
        host,
        flow.request.path,
        headers,
        blobs=f"{flow.request.scheme}://{host}" if reverse else None,
        inline=reverse,
    )


def _response(status: int, headers: list[tuple[str, str]], body: bytes, length: int) -> http.Response:
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    response = http.Response.make(status, body, http.Headers(fields))
    # After the body: setting content writes its own length, which is wrong for HEAD and for streamed bodies.
    response.headers["Content-Length"] = str(length)
    return response
