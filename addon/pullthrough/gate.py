"""Policy hooks: who may connect, what is intercepted, and where connections may lead.

Invariant: what is not intercepted is never decrypted; every leg that mitmproxy opens is judged here, whatever
request led to it, and pinned to the address that was judged; an exception refuses. Knows no request's content.
"""

import asyncio
import logging
import socket

from mitmproxy import connection, ctx, http, tls
from mitmproxy.proxy import layer, server_hooks
from mitmproxy.proxy.layers.http import HttpStream

from pullthrough import platform
from pullthrough.access import ClientPolicy
from pullthrough.errors import AddressRefused, LoopDetected, Misdirected
from pullthrough.loopguard import LoopGuard
from pullthrough.parent import Parents
from pullthrough.parentleg import ParentLeg
from pullthrough.settings import Settings, Tunnel
from pullthrough.streamlayer import Transfers, replace_http_layer
from pullthrough.tunnel import LegPolicy
from pullthrough.upstream import exempt_hosts

_log = logging.getLogger(__name__)


class Gate:
    """The part of the addon that says no. Lets nobody in before `open`."""

    name = "ollama_cache_gate"

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._intercepted: tuple[str, ...] = ()
        self._clients: ClientPolicy | None = None
        self._legs = LegPolicy(frozenset(), tunnels=False)
        self.parent = ParentLeg()
        self.addons = [self.parent]

    def open(self, settings: Settings, parents: Parents, loop: LoopGuard) -> None:
        """From now on clients are served, as the settings say."""
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

    def check_names(self, flow: http.HTTPFlow) -> None:
        """Misdirected unless CONNECT authority, SNI and Host of one of our flows are one name."""
        host = normal(flow.request.host)
        names = {"Host": flow.request.pretty_host}
        if flow.client_conn.tls_established and flow.client_conn.sni is not None:
            names["SNI"] = flow.client_conn.sni
        for kind, name in names.items():
            if normal(name) != host:
                raise Misdirected(f"expected {kind} {host}, got {name!r}")

    def check_plain(self, flow: http.HTTPFlow) -> None:
        """AddressRefused for a plain request that the parent proxy would lead where we lead nobody."""
        host, port = flow.request.host, flow.request.port
        if not self._legs.is_exempt(host, port) and self.parent.leads(host, port, encrypted=False):
            self._legs.check_port(port, encrypted=False)
            self.parent.check(host, port, encrypted=False)

    def client_connected(self, client: connection.Client) -> None:
        try:
            admitted = self._clients is not None and self._clients.admits(client.peername[0])
        except Exception:
            _log.exception("client policy failed; refused")
            admitted = False
        if not admitted:
            client.error = "not admitted"
            _log.warning("refused client %s: not in ollama_cache_clients", client.peername[0])

    def http_connect(self, flow: http.HTTPFlow) -> None:
        try:
            host, port = flow.request.host, flow.request.port
            self.parent.enter(flow)
            if not self._intercepts(host, port) and not self._legs.is_exempt(host, port):
                self._legs.check_port(flow.request.port, encrypted=True)
                self.parent.check(host, port, encrypted=True)
        except LoopDetected as error:
            refuse(flow, error.status_hint, str(error))
        except AddressRefused as error:
            refuse(flow, 403, f"tunnel to {flow.request.host}:{flow.request.port} refused: {error}")
        except Exception:
            _log.exception("tunnel policy failed; refused")
            refuse(flow, 403, "tunnel refused")

    def next_layer(self, nextlayer: layer.NextLayer) -> None:
        """Intercept our hosts with our own HTTP layer; pass every other tunnel through unread."""
        context = nextlayer.context
        in_tunnel = any(isinstance(item, HttpStream) for item in context.layers)
        if in_tunnel and not (context.server.address and self._intercepts(*context.server.address[:2])):
            nextlayer.layer = self.parent.tunnel(context)
            return
        ctx.master.addons.get("nextlayer").next_layer(nextlayer)
        if nextlayer.layer is not None:
            nextlayer.layer = replace_http_layer(nextlayer.layer, self._transfers)

    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """Judge every leg, whatever request led to it, and pin the address that was judged."""
        try:
            assert data.server.address
            host, port = data.server.address[:2]
            if self._legs.is_exempt(host, port) or self.parent.is_parent(host, port):
                return
            # By now a tunnel's port has been checked; what is left are plain requests in absolute form.
            self._legs.check_port(port, encrypted=port == 443)
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            address = self._legs.pin([str(item[4][0]) for item in found], own=platform.own_addresses())
            data.server.address = (address, port)
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


def normal(host: str) -> str:
    """Host names compare without case and final dot."""
    return host.lower().rstrip(".")


def refuse(flow: http.HTTPFlow, status: int, message: str) -> None:
    """Answer the flow with a refusal in plain text; never on a route whose body a client would store."""
    _log.warning("%s", message)
    flow.response = http.Response.make(status, message.encode() + b"\n", {"Content-Type": "text/plain"})
