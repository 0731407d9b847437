"""Routing of mitmproxy's own connections through the parent proxy: tokens, pushes, and tunnels that are not read.

The way is chosen for each connection (mitmproxy's `via`) and not by mitmproxy's upstream mode: that does not know
NO_PROXY, does not combine with transparent and reverse mode, and would send the parent's password to registries
(`upstream_auth` is Authorization in reverse mode).

Invariant: `check_remote` has judged every name that the parent is to resolve; credentials go to the parent alone.
"""

import ipaddress
import logging
import socket
from collections.abc import Collection, Mapping
from weakref import WeakKeyDictionary

from mitmproxy import connection, ctx, http, version
from mitmproxy.net import server_spec
from mitmproxy.proxy import layer, server_hooks, tunnel
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.layers.http._upstream_proxy import HttpUpstreamProxy

from pullthrough.config.settings import Endpoint
from pullthrough.core.cdn_loop import CDN_LOOP, LoopGuard
from pullthrough.core.errors import LoopDetected, SettingsError
from pullthrough.net.proxy_env import ParentProxies, Proxy, check_remote
from pullthrough.runtime.platform import own_addresses

_log = logging.getLogger(__name__)


class UpstreamProxy:
    """The addon that routes connections through the parent proxy. Routes none before `open`."""

    name = "ollama_cache_parent"

    def __init__(self) -> None:
        self._parents = ParentProxies()
        self._loop = LoopGuard("")
        self._trails: WeakKeyDictionary[connection.Client, str] = WeakKeyDictionary()

    def open(self, parents: ParentProxies, loop: LoopGuard) -> None:
        """Use these proxies from now on."""
        self._parents = parents
        self._loop = loop

    def is_parent(self, host: str, port: int) -> bool:
        """Return whether this is the parent's address."""
        return any((proxy.host, proxy.port) == (host, port) for proxy in self._parents.all)

    def check(self, host: str, port: int, *, encrypted: bool) -> None:
        """Raise AddressRefused if the parent would be asked for a host that we connect nobody to."""
        if self.leads(host, port, encrypted=encrypted):
            check_remote(host)

    def leads(self, host: str, port: int, *, encrypted: bool) -> bool:
        """Return whether connections to this host go through the parent."""
        return self._parents.of("https" if encrypted else "http", host, port) is not None

    def enter(self, flow: http.HTTPFlow) -> None:
        """Remember which caches a CONNECT has passed. Raises LoopDetected if this one is among them."""
        trail = flow.request.headers.get(CDN_LOOP, "")
        if self._loop.is_own(trail):
            raise LoopDetected(f"expected another way to {flow.request.host}, got one that leads back here")
        self._trails[flow.client_conn] = trail

    def tunnel(self, context: Context) -> layer.Layer:
        """Return the layer that passes a connection on, unread, to `context.server`."""
        assert context.server.address
        stack = tunnel.LayerStack()
        if proxy := self._parents.of("https", *context.server.address[:2]):
            context.server.via = _via(proxy)
            stack /= _Tunnel.make(context, True)
        stack /= TCPLayer(context, ignore=True)
        return stack[0]

    def lead(self, request: http.Request, server: connection.Server) -> tuple[str, int] | None:
        """Route a passed-through request; return the address of the parent on its way, None without one."""
        proxy = self._parents.of(request.scheme, request.host, request.port)
        server.via = None
        if proxy is None:
            return None
        if proxy.scheme == "https" or request.scheme == "https":
            server.via = _via(proxy)
        else:
            # A plain request goes to the proxy itself, in absolute form, because proxies allow CONNECT only to 443.
            request.authority = Endpoint(request.scheme, request.host, request.port).authority
            request.headers.update(proxy.fields)
            request.data.host, request.data.port = proxy.host, proxy.port
        return proxy.host, proxy.port

    # --- hooks

    def http_connect_upstream(self, flow: http.HTTPFlow) -> None:
        """Add the parent's credentials and CDN-Loop to our CONNECT to it."""
        address = flow.server_conn.address
        for proxy in self._parents.all:
            if address and (proxy.host, proxy.port) == address[:2]:
                flow.request.headers.update(proxy.fields)
                flow.request.headers[CDN_LOOP] = self._loop.extend(self._trails.get(flow.client_conn))

    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        if data.server.address and self.is_parent(*data.server.address[:2]):
            _log.warning("parent proxy %s:%d: %s", *data.server.address[:2], data.server.error)

    def error(self, flow: http.HTTPFlow) -> None:
        if flow.server_conn.via is not None and flow.error is not None:
            _log.warning("%s:%d through the parent proxy: %s", flow.request.host, flow.request.port, flow.error.msg)


class _Tunnel(HttpUpstreamProxy):
    """A tunnel that logs why it failed: its client has already been told that it is open."""

    def on_handshake_error(self, err: str) -> layer.CommandGenerator[None]:
        assert self.conn.address
        _log.warning("%s:%d through the parent proxy: %s", *self.conn.address[:2], err)
        yield from super().on_handshake_error(err)


def check_internals() -> None:
    """Raise SettingsError unless mitmproxy is of the generation that was tested, and a tunnel can be made."""
    found = version.VERSION
    if not found.startswith("12.") or tuple(int(part) for part in found.split(".")[:3]) < (12, 2, 3):
        raise SettingsError(f"expected mitmproxy >=12.2.3,<13, got {found}")
    client = connection.Client(peername=("127.0.0.1", 1), sockname=("127.0.0.1", 2))
    context = Context(client, ctx.options)
    context.server = connection.Server(address=("trial.invalid", 443), via=("http", ("127.0.0.1", 3)))
    try:
        trial = _Tunnel.make(context, True)[0]
        is_ours = isinstance(trial, _Tunnel) and callable(HttpUpstreamProxy.on_handshake_error)
    except Exception as error:
        raise SettingsError(
            f"mitmproxy {found} does not make tunnels as expected ({error!r}): use another one"
        ) from error
    if not is_ours:
        raise SettingsError(f"expected a tunnel of our kind from mitmproxy {found}, got {trial!r}: use another one")


def ways_out(environment: Mapping[str, str], ports: Collection[int]) -> ParentProxies:
    """Return the environment's proxies except this cache, which listens on `ports`. Raises SettingsError.

    A variable that names this cache is no way out, but no reason not to start: the variables are often set for all
    programs of a machine so that they use the cache.
    """
    parents = ParentProxies.parse(environment)
    for proxy in parents.all:
        if proxy.port in ports and _is_here(proxy.host):
            _log.warning("the environment's proxy %s is this cache: not used", proxy.origin)
            parents = parents.without(proxy)
        else:
            _log.info("registries are reached through the parent proxy %s", proxy.origin)
    return parents


def _is_here(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        # It does not resolve now: the loop guard will notice.
        return False
    return any(ipaddress.ip_address(text.partition("%")[0]).is_loopback or text in own_addresses() for text in found)


def _via(proxy: Proxy) -> server_spec.ServerSpec:
    return ("https" if proxy.scheme == "https" else "http"), (proxy.host, proxy.port)
