"""Policy hooks: who may connect, what is intercepted, and where connections may lead.

Invariant: what is not intercepted is never decrypted; every connection that mitmproxy opens is judged here, whatever
request led to it, and pinned to an address that was judged; an exception refuses. Only requests that `pass_on` let
through reach our hosts and those that options and the environment name. For a client that does not know of us
(transparent and reverse mode) the name decides what is intercepted; a connection to an intercepted host never goes to
the address that the client dialled.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping
from typing import Final
from weakref import WeakKeyDictionary

from mitmproxy import connection, ctx, http, tls
from mitmproxy.proxy import commands, events, layer, server_hooks
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import ClientTLSLayer, ServerTLSLayer
from mitmproxy.proxy.layers.http import HttpLayer, HTTPMode, HttpStream
from mitmproxy.proxy.layers.modes import HttpProxy, HttpUpstreamProxy, ReverseProxy, TransparentProxy

from pullthrough.config.settings import Endpoint, Settings, Tunnel
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.core.errors import AddressRefused, LoopDetected, Misdirected
from pullthrough.net.address_policy import SHARED, AddressPolicy, check_elsewhere
from pullthrough.net.client_acl import ClientPolicy, is_shared
from pullthrough.net.connection_limits import ConnectionLimits
from pullthrough.net.happy_eyeballs import first_to_answer
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.proxy.client_limits import ClientLimits
from pullthrough.proxy.sniffing import read_opening
from pullthrough.proxy.takeover import Takeover
from pullthrough.proxy.upstream_proxy import UpstreamProxy
from pullthrough.runtime import platform
from pullthrough.upstream.wording import worded

_log = logging.getLogger(__name__)

INTERFACES_S: Final = 10.0
"""How long a network that this machine has left still counts as its own."""
NEW_INTERFACES_S: Final = 1.0
"""How soon a client that is not admitted makes us look at the interfaces again."""
OPENING_S: Final = 60.0
"""How long a client waits for the cache to open: a large store's start takes some seconds."""
ANSWERED_S: Final = 60.0
"""How long the address of a name that answered first is used without another trial."""

_TLS: Final = b"\x16"
"""The first byte of a ClientHello's record (RFC 8446 section 5.1); no request begins with it."""


class ConnectionHooks:
    """The part of the addon that admits and refuses connections. Admits no client before `open`."""

    name = "ollama_cache_gate"

    def __init__(self, takeover: Takeover) -> None:
        """`takeover` takes connections to the blob host once they have been let through."""
        self._takeover = takeover
        self._loopback = ("", 0)
        self._intercepted: tuple[str, ...] = ()
        self._upstream: Mapping[str, Endpoint] = {}
        self._policy: ClientPolicy | None = None
        self._is_open = False
        self._refusals = 0
        self.refused = ""
        """How many connections were not admitted, and which client's was the last."""
        self._local = platform.LocalNetworks()
        self._legs = AddressPolicy(frozenset(), tunnels=False)
        self._granted: WeakKeyDictionary[connection.Client, set[tuple[str, int]]] = WeakKeyDictionary()
        """The destinations of each client's passed-on requests."""
        self._answered: dict[tuple[str, int], tuple[str, float]] = {}
        """The address of each name that answered first, and until when that counts (the loop's time)."""
        self.judged = 0
        """How many outgoing connections have been judged."""
        self.trial: connection.Client | None = None
        """A client that is admitted before any other: see `hook_check`."""
        self.stranger: connection.Client | None = None
        """A client that is refused then."""
        self._opened = asyncio.Event()
        self._limits = ConnectionLimits(0)
        self.parent = UpstreamProxy()
        self.client_limits = ClientLimits()
        self.addons = [self.parent, self.client_limits]

    def rehearse(self, host: str) -> None:
        """Prepare for a trial in which only `host` is ours and tunnels are permitted."""
        self.parent.open(ParentProxies(), LoopGuard(host))
        self._intercepted = (host,)
        self._legs = AddressPolicy(frozenset(), tunnels=True)
        self.client_limits.open(ConnectionLimits(1))

    def expect(self, limits: ConnectionLimits) -> None:
        """Limit the clients that wait until the cache is open; later the same limits apply to those that are served."""
        self._limits = limits

    def prepare(
        self,
        settings: Settings,
        parents: ParentProxies,
        loop: LoopGuard,
        loopback: tuple[str, int],
    ) -> None:
        """Apply the settings from now on; `loopback` is where flows are re-pointed."""
        self._loopback = loopback
        self.parent.open(parents, loop)
        self.client_limits.open(self._limits)
        self._intercepted = settings.intercepted
        self._upstream = settings.upstream
        self._legs = AddressPolicy(settings.named_hosts, tunnels=settings.tunnel is Tunnel.ANY)
        self._policy = ClientPolicy(settings.clients)

    def open(self) -> None:
        """Serve clients from now on, beginning with those that have waited."""
        self._is_open = True
        self._opened.set()

    def close(self) -> None:
        """Stop admitting clients."""
        self._is_open = False

    def is_ours(self, host: str) -> bool:
        """Return whether `host` is a registry or the blob host."""
        return normal(host) in self._intercepted

    def is_own(self, host: str, port: int) -> bool:
        """Return whether a name of ours, if it leads to this machine, leads to this cache."""
        return self.is_ours(host) and port in own_ports()

    def check_names(self, flow: http.HTTPFlow) -> None:
        """Raise Misdirected unless CONNECT authority, SNI and Host of one of our flows are the same name."""
        host = normal(flow.request.host)
        names = {"Host": flow.request.pretty_host}
        if flow.request.authority:
            names["the request target"] = flow.request.authority.rpartition("@")[2].partition(":")[0]
        if flow.client_conn.tls_established and flow.client_conn.sni is not None:
            names["SNI"] = flow.client_conn.sni
        for kind, name in names.items():
            if normal(name) != host:
                raise Misdirected(f"expected {kind} {host}, got {name!r}")

    def check_plain(self, flow: http.HTTPFlow) -> None:
        """Raise AddressRefused for a request to a foreign host at an address that we never connect to."""
        host, port = flow.request.host, flow.request.port
        if self._legs.is_exempt(host, port) or self.parent.is_parent(host, port):
            raise AddressRefused(f"{host}:{port} is for the cache's own requests; ask for a registry by its name")
        self._legs.check_port(port, encrypted=port == 443)
        self.parent.check(host, port, encrypted=False)

    def repoint(self, flow: http.HTTPFlow) -> None:
        """Send a request to our own listener, for the body that was chosen as its answer."""
        request = flow.request
        flow.server_conn.via = None
        request.scheme, (request.host, request.port) = "http", self._loopback
        self._granted.setdefault(flow.client_conn, set()).add(self._loopback)

    def pass_on(self, flow: http.HTTPFlow) -> None:
        """Send a request to where its host is really reached, by `upstream` and through the parent proxy."""
        request = flow.request
        granted = self._granted.setdefault(flow.client_conn, set())
        if self.is_ours(request.host):
            endpoint = self._upstream.get(normal(request.host))
            if endpoint is not None:
                request.scheme, request.host, request.port = endpoint.scheme, endpoint.host, endpoint.port
            granted.add((normal(request.host), request.port))
        if (parent := self.parent.lead(request, flow.server_conn)) is not None:
            granted.add(parent)

    def admits(self, peer: str) -> bool:
        """Return whether a client at the address `peer` is served, and log it if not."""
        if not self._is_open:
            _log.info("refused client %s: the cache is %s", peer, "ending" if self._opened.is_set() else "not open yet")
            return False
        try:
            admitted = self._policy is not None and self._is_admitted(self._policy, peer)
        except Exception:
            _log.exception("client policy failed; refused")
            admitted = False
        if not admitted and is_shared(peer):
            _log.warning(
                "refused client %s: not in ollama_cache_clients; Tailscale gives such addresses and so do carriers, "
                "so they do not count as private: to admit them add %s, or a part of it",
                peer,
                SHARED,
            )
        elif not admitted:
            _log.warning("refused client %s: not in ollama_cache_clients", peer)
        if not admitted:
            self._refusals += 1
            self.refused = f"{self._refusals} connections since the start, the last from {peer}"
        return admitted

    def _is_admitted(self, policy: ClientPolicy, peer: str) -> bool:
        return any(
            policy.admits(peer, local=self._local.known(age_s=age_s)) for age_s in (INTERFACES_S, NEW_INTERFACES_S)
        )

    async def client_connected(self, client: connection.Client) -> None:
        """Admit or refuse a client; one that comes before the cache is open waits until it is."""
        if client is self.trial:
            return
        if client is not self.stranger and not self._opened.is_set():
            # mitmproxy listens before it calls any addon's `running`.
            self.client_limits.hold(client, self._limits)
            if client.error:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OPENING_S):
                    await self._opened.wait()
        if not self.admits(client.peername[0]):
            client.error = "not admitted"

    def http_connect(self, flow: http.HTTPFlow) -> None:
        try:
            host, port = flow.request.host, flow.request.port
            self.parent.enter(flow)
            # What was passed on before the tunnel grants nothing inside it.
            self._granted.pop(flow.client_conn, None)
            if not self._intercepts(host, port):
                self._legs.check_port(port, encrypted=True)
                self.parent.check(host, port, encrypted=True)
            self._takeover.take_connect(flow)
        except LoopDetected as error:
            refuse(flow, error.status_hint, str(error))
        except AddressRefused as error:
            refuse(flow, 403, f"tunnel to {flow.request.host}:{flow.request.port} refused: {error}")
        except Exception:
            _log.exception("tunnel policy failed; refused")
            refuse(flow, 403, "tunnel refused")

    def next_layer(self, nextlayer: layer.NextLayer) -> None:
        """Pass tunnels to other hosts through unread; mitmproxy intercepts those to ours."""
        context = nextlayer.context
        if isinstance(context.layers[-1], TransparentProxy | ReverseProxy):
            try:
                nextlayer.layer = self._captured(context, nextlayer)
            except Exception:
                # Left to itself, mitmproxy would decrypt.
                _log.exception("capture policy failed; refused")
                nextlayer.layer = _Closing(context)
            return
        if isinstance(context.layers[-1], HttpProxy | HttpUpstreamProxy) and nextlayer.data_client()[:1] == _TLS:
            # mitmproxy would answer with a certificate of an authority that nobody trusts.
            peer = context.client.peername[0]
            _log.warning("refused client %s: it speaks TLS to the proxy: HTTPS_PROXY begins with http:// here", peer)
            nextlayer.layer = _Closing(context)
            return
        in_tunnel = any(isinstance(item, HttpStream) for item in context.layers)
        if in_tunnel and not (context.server.address and self._intercepts(*context.server.address[:2])):
            nextlayer.layer = self._tunnel(context)

    def _captured(self, context: Context, nextlayer: layer.NextLayer) -> layer.Layer | None:
        """Return the layer for a connection whose client takes us for the server; None until its name has come.

        With one of our names, it is as if the client had asked a proxy for that name. With any other, the connection is
        passed on unread to where the client dialled; in reverse mode that was us, so the connection is closed.
        """
        assert context.server.address
        reverse = isinstance(context.layers[-1], ReverseProxy)
        if context.client.transport_protocol != "tcp":
            return _Closing(context)
        opening = read_opening(nextlayer.data_client())
        if opening is None:
            return None
        target, dialled = context.server.address[:2]
        port = 443 if opening.encrypted else 80
        name = opening.name or (target if reverse else "")
        if self.is_ours(name) and (reverse or dialled == port):
            context.server.address = (normal(name), port)
            if not opening.encrypted:
                return HttpLayer(context, HTTPMode.transparent)
            if not reverse and self._takeover.is_for(name) and self._takeover.take_captured(nextlayer):
                return _Closing(context)
            top = ServerTLSLayer(context)
            top.child_layer = ClientTLSLayer(context)
            return top
        if reverse:
            peer = context.client.peername[0]
            _log.warning("refused client %s: expected one of %s, got %r", peer, ", ".join(self._intercepted), name)
            return _Closing(context)
        try:
            self.parent.check(target, dialled, encrypted=opening.encrypted)
        except AddressRefused as error:
            _log.warning("refused connection to %s: %s", target, error)
            return _Closing(context)
        return self._tunnel(context)

    def _tunnel(self, context: Context) -> layer.Layer:
        """Return the layer that passes a connection on, unread, to its destination."""
        self.client_limits.free(context.client)
        top = self.parent.tunnel(context)
        if context.server.via is not None:
            self._granted.setdefault(context.client, set()).add(context.server.via[1])
        return top

    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Judge every outgoing connection, whatever request led to it, and pin the address that was judged."""
        try:
            self.judged += 1
            assert data.server.address
            host, port = data.server.address[:2]
            granted = (normal(host), port) in self._granted.get(data.client, ())
            if granted and (self.parent.is_parent(host, port) or (host, port) == self._loopback):
                return
            if self.is_ours(host) and not granted:
                raise AddressRefused("nothing was passed on to it")
            exempt = granted and self._legs.is_exempt(host, port)
            if exempt and not self.is_own(host, port):
                return
            if not exempt:
                # A CONNECT's port has been checked before; that of a connection redirected to us has not.
                self._legs.check_port(port, encrypted=port == 443)
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = [str(item[4][0]) for item in found]
            if exempt:
                check_elsewhere(host, addresses, own=platform.own_addresses())
            else:
                judged = self._legs.judge(addresses, own=platform.own_addresses())
                data.server.address = (await self._answering(host, port, judged), port)
        except (AddressRefused, OSError) as error:
            data.server.error = worded(error)
            _log.warning(
                "refused connection to %s: %s", data.server.address and data.server.address[0], data.server.error
            )
        except Exception:
            data.server.error = "refused"
            _log.exception("address policy failed; refused")

    async def _answering(self, host: str, port: int, addresses: tuple[str, ...]) -> str:
        """Return the judged address of a name that answers first (untried if it is the only one).

        Raises AddressRefused if none answers.
        """
        if len(addresses) == 1:
            return addresses[0]
        loop = asyncio.get_running_loop()
        known, until = self._answered.get((host, port), ("", 0.0))
        if known in addresses and loop.time() < until:
            return known
        address = await first_to_answer(addresses, port)
        if address is None:
            raise AddressRefused(f"none of its {len(addresses)} addresses answers")
        self._answered = {name: entry for name, entry in self._answered.items() if loop.time() < entry[1]}
        self._answered[host, port] = address, loop.time() + ANSWERED_S
        return address

    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Forget an address that answered first, once it no longer answers."""
        self._answered = {
            name: entry
            for name, entry in self._answered.items()
            if data.server.address is None or (entry[0], name[1]) != data.server.address[:2]
        }

    def tls_failed_client(self, data: tls.TlsData) -> None:
        _log.warning(
            "client %s did not accept our certificate for %s (%s): does it trust the CA?",
            data.conn.peername and data.conn.peername[0],
            data.conn.sni,
            data.conn.error,
        )

    def _intercepts(self, host: str, port: int) -> bool:
        return port == 443 and self.is_ours(host)


class _Closing(layer.Layer):
    """A layer that ends the connection."""

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if isinstance(event, events.Start):
            yield commands.CloseConnection(self.context.client)


def own_ports() -> frozenset[int]:
    """Return the ports that mitmproxy listens on."""
    return frozenset(address[1] for address in ctx.master.addons.get("proxyserver").listen_addrs())


def normal(host: str) -> str:
    """Return a host name for comparison: in lower case, without a final dot."""
    return host.lower().rstrip(".")


def refuse(flow: http.HTTPFlow, status: int, message: str) -> None:
    """Answer the flow with a refusal in plain text; never use it on a route whose body a client would store."""
    _log.warning("%s", message)
    body = message.encode() + b"\n" if flow.request.method != "HEAD" else b""
    flow.response = http.Response.make(status, body, {"Content-Type": "text/plain"})
