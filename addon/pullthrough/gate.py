"""Policy hooks: who may connect, what is intercepted, and where connections may lead.

Invariant: what is not intercepted is never decrypted; every leg that mitmproxy opens is judged here, whatever
request led to it, and pinned to the address that was judged; an exception refuses. Of a client that does not know of
us (transparent and reverse mode) the name decides what is intercepted; the address it dialled never leads a leg of an
intercepted host. Knows no request's content.
"""

import asyncio
import logging
import socket

from mitmproxy import connection, ctx, http, tls
from mitmproxy.proxy import commands, events, layer, server_hooks
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers import ClientTLSLayer, ServerTLSLayer
from mitmproxy.proxy.layers.http import HttpLayer, HTTPMode, HttpStream
from mitmproxy.proxy.layers.modes import ReverseProxy, TransparentProxy

from pullthrough import platform
from pullthrough.access import ClientPolicy
from pullthrough.errors import AddressRefused, LoopDetected, Misdirected
from pullthrough.loopguard import LoopGuard
from pullthrough.opening import read_opening
from pullthrough.parent import Parents
from pullthrough.parentleg import ParentLeg
from pullthrough.settings import Settings, Tunnel
from pullthrough.takeover import Takeover
from pullthrough.tunnel import LegPolicy, check_elsewhere
from pullthrough.upstream import exempt_hosts

_log = logging.getLogger(__name__)


class Gate:
    """The part of the addon that says no. Lets nobody in before `open`."""

    name = "ollama_cache_gate"

    def __init__(self, takeover: Takeover) -> None:
        """`takeover` takes connections to the blob host once they have been let through."""
        self._takeover = takeover
        self._private: tuple[str, int] | None = None
        self._intercepted: tuple[str, ...] = ()
        self._clients: ClientPolicy | None = None
        self._legs = LegPolicy(frozenset(), tunnels=False)
        self.parent = ParentLeg()
        self.addons = [self.parent]

    def open(self, settings: Settings, parents: Parents, loop: LoopGuard, private: tuple[str, int]) -> None:
        """From now on clients are served, as the settings say; `private` is where we re-point flows ourselves."""
        self._private = private
        self.parent.open(parents, loop)
        self._intercepted = settings.intercepted
        self._legs = LegPolicy(exempt_hosts(settings), tunnels=settings.tunnel is Tunnel.ANY)
        self._clients = ClientPolicy(settings.clients, local=platform.local_networks())

    def close(self) -> None:
        """Let nobody in any more."""
        self._clients = None

    def is_ours(self, host: str) -> bool:
        """Whether `host` is a registry or the blob host."""
        return normal(host) in self._intercepted

    def is_own(self, host: str, port: int) -> bool:
        """Whether a name of ours that leads to this machine would lead to this cache."""
        return self.is_ours(host) and port in own_ports()

    def check_names(self, flow: http.HTTPFlow) -> None:
        """Misdirected unless CONNECT authority, SNI and Host of one of our flows are one name."""
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
        """AddressRefused for a plain request to where only we re-point one, or the parent proxy leads nobody."""
        host, port = flow.request.host, flow.request.port
        if port == (self._private or ("", 0))[1]:
            self._legs.check_port(port, encrypted=False)
        if not self._legs.is_exempt(host, port) and self.parent.leads(host, port, encrypted=False):
            self._legs.check_port(port, encrypted=False)
            self.parent.check(host, port, encrypted=False)

    def admits(self, peer: str) -> bool:
        """Whether a client at the address `peer` is served; who is not is named in the log."""
        try:
            admitted = self._clients is not None and self._clients.admits(peer)
        except Exception:
            _log.exception("client policy failed; refused")
            admitted = False
        if not admitted:
            _log.warning("refused client %s: not in ollama_cache_clients", peer)
        return admitted

    def client_connected(self, client: connection.Client) -> None:
        if not self.admits(client.peername[0]):
            client.error = "not admitted"

    def http_connect(self, flow: http.HTTPFlow) -> None:
        try:
            host, port = flow.request.host, flow.request.port
            self.parent.enter(flow)
            if not self._intercepts(host, port) and not self._legs.is_exempt(host, port):
                self._legs.check_port(flow.request.port, encrypted=True)
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
        """Pass every tunnel through unread that does not lead to our hosts; mitmproxy intercepts those."""
        context = nextlayer.context
        if isinstance(context.layers[-1], TransparentProxy | ReverseProxy):
            try:
                nextlayer.layer = self._captured(context, nextlayer)
            except Exception:
                # mitmproxy's own choice would be to decrypt.
                _log.exception("capture policy failed; refused")
                nextlayer.layer = _Closing(context)
            return
        in_tunnel = any(isinstance(item, HttpStream) for item in context.layers)
        if in_tunnel and not (context.server.address and self._intercepts(*context.server.address[:2])):
            nextlayer.layer = self.parent.tunnel(context)

    def _captured(self, context: Context, nextlayer: layer.NextLayer) -> layer.Layer | None:
        """The layer for a connection whose client takes us for the server; None while nothing says for which.

        One of our names makes it as if the client had asked a proxy for that name. Another one is passed on unread to
        where the client dialled; in reverse mode that was us, so it ends.
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
        return self.parent.tunnel(context)

    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Judge every leg, whatever request led to it, and pin the address that was judged."""
        try:
            assert data.server.address
            host, port = data.server.address[:2]
            if self.parent.is_parent(host, port) or (host, port) == self._private:
                return
            exempt = self._legs.is_exempt(host, port)
            if exempt and not self.is_own(host, port):
                return
            if not exempt:
                # A CONNECT's port has been checked before; a plain request's, and that of a connection which was
                # redirected to us, has not.
                self._legs.check_port(port, encrypted=port == 443)
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = [str(item[4][0]) for item in found]
            if exempt:
                check_elsewhere(host, addresses, own=platform.own_addresses())
            else:
                data.server.address = (self._legs.pin(addresses, own=platform.own_addresses()), port)
        except (AddressRefused, OSError) as error:
            data.server.error = str(error)
            _log.warning("refused connection to %s: %s", data.server.address and data.server.address[0], error)
        except Exception:
            data.server.error = "refused"
            _log.exception("address policy failed; refused")

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
    """Ends the connection."""

    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        if isinstance(event, events.Start):
            yield commands.CloseConnection(self.context.client)


def own_ports() -> frozenset[int]:
    """The ports that mitmproxy listens on."""
    return frozenset(address[1] for address in ctx.master.addons.get("proxyserver").listen_addrs())


def normal(host: str) -> str:
    """Host names compare without case and final dot."""
    return host.lower().rstrip(".")


def refuse(flow: http.HTTPFlow, status: int, message: str) -> None:
    """Answer the flow with a refusal in plain text; never on a route whose body a client would store."""
    _log.warning("%s", message)
    flow.response = http.Response.make(status, message.encode() + b"\n", {"Content-Type": "text/plain"})
