"""mitmproxy's side of the cache, for the daemon to open and close: hooks, listeners, certificates.

Invariant: no client is admitted before `open`, which fails if this mitmproxy does not call our hooks as it should.
"""

from collections.abc import Collection
from typing import Final

from mitmproxy import ctx

from pullthrough.config.settings import PROXY_PORT, Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.delivery.delivery import Delivery
from pullthrough.net.address_policy import is_loopback
from pullthrough.net.connection_limits import ConnectionLimits
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.proxy.connection_hooks import ConnectionHooks, own_ports
from pullthrough.proxy.hook_check import check_hooks
from pullthrough.proxy.idle_addons import remove_idle
from pullthrough.proxy.request_hooks import RequestHooks
from pullthrough.proxy.takeover import Takeover
from pullthrough.registry.service import Registry
from pullthrough.upstream.client import Upstream

PROXIES: Final = ("regular", "upstream")
"""The modes of mitmproxy in which clients know that they use a proxy."""


class Frontend:
    """The hooks of one mitmproxy addon."""

    def __init__(self) -> None:
        self._takeover = Takeover(lambda client: self._connections.client_limits.hand_over(client))
        self._connections = ConnectionHooks(self._takeover)
        self._requests = RequestHooks(self._connections)
        self.addons = [self._connections, self._requests]
        """The addons that mitmproxy calls."""

    def expect(self, limits: ConnectionLimits) -> None:
        """Limit the clients that connect, whether they wait for `open` or are served."""
        self._connections.expect(limits)

    async def open(
        self,
        settings: Settings,
        registry: Registry,
        upstream: Upstream,
        delivery: Delivery,
        requests: RequestLog,
        parents: ParentProxies,
    ) -> None:
        """Serve clients from now on. Raises SettingsError."""
        remove_idle()
        await check_hooks(self._connections)
        await self._takeover.open(delivery, settings.blob_host)
        self._connections.prepare(settings, parents, upstream.loop, delivery.loopback.address)
        self._requests.open(settings, registry, upstream.loop, requests, delivery.loopback)
        self._connections.open()

    def close(self) -> None:
        """Stop admitting clients and answering; bodies under way go on."""
        self._connections.close()
        self._takeover.close()
        self._requests.close()

    def admits(self, peer: str) -> bool:
        """Return whether a client at the address `peer` is served; one that is not is logged."""
        return self._connections.admits(peer)

    def refused(self) -> str:
        """Return how many connections were not admitted, and which client's was the last."""
        return self._connections.refused

    def present(self, folder: str, certificates: list[str]) -> None:
        """Show clients these certificates (`HOST=PATH`).

        mitmproxy makes its own CA in `folder`, which is thrown away and trusted by nobody.
        """
        ctx.options.update(confdir=folder, certs=certificates)

    def ports(self) -> Collection[int]:
        """Return the ports that mitmproxy listens on."""
        return own_ports()

    def address(self) -> tuple[str, int]:
        """Return the first listener that speaks as a proxy; host "" for all addresses.

        Listeners that other machines can reach come first.
        """
        servers = ctx.master.addons.get("proxyserver").servers
        found = [
            address[:2] for server in servers if server.mode.type_name in PROXIES for address in server.listen_addrs
        ]
        found.sort(key=lambda address: is_loopback(address[0]))
        return found[0] if found else ("", ctx.options.listen_port or PROXY_PORT)
