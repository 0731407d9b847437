"""The connections that the proxy may open for its clients.

Invariant: a connection to an address that is not public is refused, whatever name led there, so that the proxy does not
open its own network to clients. Pure: the caller resolves names and finds our own addresses.
"""

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pullthrough.config.settings import Endpoint, Settings
from pullthrough.core.errors import AddressRefused, LoopDetected

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")
_AZURE_WIRE_SERVER = ipaddress.ip_address("168.63.129.16")
"""A public address that answers only inside Azure, and with instance secrets."""
SHARED = ipaddress.ip_network("100.64.0.0/10")
"""Carriers give these addresses to their customers, and Tailscale to its machines (RFC 6598). They are neither public
nor private to the cache's network: behind such a carrier, strangers have them too. So no client with one is admitted,
and no connection leads to one, unless the configuration names the network."""


def unwrap(address: Address) -> Address:
    """Return the IPv4 address inside an IPv6 address (mapped, NAT64, 6to4), else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_loopback(host: str) -> bool:
    """Return whether only this machine itself can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_ports(proxy: Endpoint, settings: Settings) -> tuple[str, ...]:
    """Return the ports that listen on loopback only, as text for people; `proxy` is where the proxy listens."""
    ports = {port: [host for host, each in settings.listeners if each == port] for _, port in settings.listeners}
    ports[proxy.port] = [*ports.get(proxy.port, ()), proxy.host]
    return tuple(
        f"port {port} ({', '.join(sorted(hosts))})" for port, hosts in ports.items() if all(map(is_loopback, hosts))
    )


def check_address(text: str, *, own: Collection[str] = ()) -> None:
    """Raise AddressRefused unless `text` is an address on the public Internet and not in `own`."""
    try:
        address = unwrap(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError as error:
        raise AddressRefused(f"expected an IP address, got {text!r}") from error
    if address.version == 4 and address in SHARED:
        raise AddressRefused(f"expected a public address, got {text} (RFC 6598: of a carrier, or of Tailscale)")
    site_local = isinstance(address, ipaddress.IPv6Address) and (address.is_site_local or address in _NAT64_LOCAL)
    if not address.is_global or address.is_multicast or site_local or address == _AZURE_WIRE_SERVER:
        raise AddressRefused(f"expected a public address, got {text}")
    if text in own or str(address) in own:
        raise AddressRefused(f"expected an address of another machine, got our own {text}")


def check_elsewhere(name: str, addresses: Iterable[str], *, own: Collection[str]) -> None:
    """Raise LoopDetected if a registry's name leads to this machine, as by a hosts entry that only clients need."""
    for text in addresses:
        address = unwrap(ipaddress.ip_address(text.partition("%")[0]))
        if address.is_loopback or text in own or str(address) in own:
            raise LoopDetected(
                f"expected {name} on another machine, got our own {text}: "
                "the cache's machine must resolve it as the Internet does"
            )


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """The destinations that mitmproxy may connect to on behalf of clients."""

    exempt: frozenset[tuple[str, int]]
    """The configured (host, port) pairs: registries, their upstreams, the blob host. Exact matches only."""
    tunnels: bool
    """Whether hosts that are not intercepted may be reached at all."""

    def is_exempt(self, host: str, port: int) -> bool:
        return (host.lower().rstrip("."), port) in self.exempt

    def check_port(self, port: int, *, encrypted: bool) -> None:
        """Raise AddressRefused unless tunnels are allowed and `port` is the usual one for the form of the request."""
        if not self.tunnels:
            raise AddressRefused("tunnels to other hosts are switched off (tunnel=none)")
        expected = 443 if encrypted else 80
        if port != expected:
            form = "https" if encrypted else "http"
            raise AddressRefused(f"port {port} is not passed on: for {form} only port {expected} is")

    def judge(self, addresses: Sequence[str], *, own: Collection[str] = ()) -> tuple[str, ...]:
        """Return the addresses, each once, if all may be connected to. Raises AddressRefused otherwise.

        One bad address is enough to refuse the name: public and private answers together mean DNS rebinding.
        """
        if not addresses:
            raise AddressRefused("expected at least one address, got none")
        for address in addresses:
            check_address(address, own=own)
        return tuple(dict.fromkeys(addresses))
