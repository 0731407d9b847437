"""Where newer clients let themselves be led, and what they dial: transfer/redirect.go of Ollama.

Up to v0.34.4 the file is x/transfer/redirect.go and serves tensors only; since v0.35.0 the parts of every model pass
it. Invariant: an address is judged by the rules of that file and in their order, and by a DNS of the test's own.
Knows nothing of requests.
"""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

from tests.support.goclient import FailedRequest, follow

Dns = Mapping[str, Sequence[str]]
"""The addresses of each name; a name that is not there does not exist."""

_NOT_PUBLIC: Final = [
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "100.64.0.0/10", "198.18.0.0/15")
]
"""What isPublicIP refuses beside loopback, link-local, multicast, broadcast and unspecified addresses."""


class NotAllowed(FailedRequest):
    """The client refuses to go there."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"redirect target not allowed: {reason}")


class Redirects:
    """What one client accepts as the target of a redirect."""

    def __init__(
        self,
        base: str,
        dns: Dns,
        *,
        own_host: str = "",
        allow_private: bool = False,
        uses_proxy: Callable[[str], bool] | None = None,
    ) -> None:
        """`base` is the registry's address. `own_host` may be private when it is dialled.

        With `allow_private` (--insecure) any address will do. `uses_proxy` says which URLs a proxy is asked for: for
        those the client's own DNS need not know the name. None: the client does not know of proxies here.
        """
        self._base = urlsplit(base)
        self._dns = dns
        self._own_host = own_host
        self._allow_private = allow_private
        self._uses_proxy = uses_proxy

    def policy(self, first: SplitResult, target: SplitResult, via: int) -> bool | str:
        """http.Client.CheckRedirect: each hop is judged, and there are ten requests at most.

        https is not left either when only the first hop had it.
        """
        verdict = follow(first, target, via)
        if verdict is not True:
            return verdict
        try:
            self.check_scheme(target.geturl(), first.scheme)
            self.check_target(target.geturl())
        except NotAllowed as error:
            return str(error)
        return True

    def check_scheme(self, target: str, *others: str) -> None:
        """validateRedirectScheme: the registry's scheme, and any other given, forbids http when it is https.

        Raises NotAllowed.
        """
        scheme = urlsplit(target).scheme
        if scheme not in ("https", "http"):
            raise NotAllowed(f'scheme "{scheme}"')
        if scheme == "http" and "https" in (self._base.scheme, *others):
            raise NotAllowed("https registry redirecting to http")

    def check_target(self, target: str) -> None:
        """validateRedirectTarget: every address of the host is public. Raises NotAllowed."""
        if self._allow_private:
            return
        hostname = urlsplit(target).hostname or ""
        if (literal := _literal(hostname)) is not None:
            if not is_public(literal):
                raise NotAllowed(f"{hostname} is not a public address")
            return
        addresses = self._dns.get(hostname)
        if not addresses:
            if self._uses_proxy is not None and self._uses_proxy(target):
                return
            raise NotAllowed(f"resolving {hostname}: no such host")
        _check_addresses(hostname, addresses)

    def pin(self, hostname: str) -> str:
        """checkedDialer: resolve again, judge again, and dial the first address.

        Raises NotAllowed, or ConnectionError for a name that does not exist.
        """
        literal = _literal(hostname)
        addresses = [hostname] if literal is not None else self._dns.get(hostname)
        if not addresses:
            raise ConnectionError(f"dial tcp: lookup {hostname}: no such host")
        if not self._allow_private and hostname != self._own_host:
            _check_addresses(hostname, addresses)
        return addresses[0]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """isPublicIP, which lets more pass than Python's is_global."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    is_special = address.is_unspecified or address.is_loopback or address.is_link_local or address.is_multicast
    is_broadcast = address == ipaddress.IPv4Address("255.255.255.255")
    return not (is_special or is_broadcast or any(address in network for network in _NOT_PUBLIC))


def _literal(hostname: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(hostname)
    except ValueError:
        return None


def _check_addresses(hostname: str, addresses: Sequence[str]) -> None:
    for address in addresses:
        if not is_public(ipaddress.ip_address(address)):
            raise NotAllowed(f"{hostname} resolves to non-public {address}")
