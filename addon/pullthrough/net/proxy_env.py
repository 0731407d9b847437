"""The parent proxy: the way out that the daemon's environment prescribes.

Invariant: loopback and what NO_PROXY names are reached directly, everything else through the parent, by Go's rules
(golang.org/x/net/http/httpproxy), so that cache and clients read an environment alike. A name that only the parent
will resolve is refused here if its spelling shows that it is not public. No message has the parent's credentials.
Pure: the environment is a parameter.
"""

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from pullthrough.config.settings import Endpoint
from pullthrough.core.errors import AddressRefused, SettingsError
from pullthrough.net.address_policy import check_address

PROXY_AUTHORIZATION: Final = "Proxy-Authorization"
_INSIDE: Final = ("localhost", "local", "internal", "home.arpa")
"""RFC 6761 section 6.3, RFC 6762, ICANN's resolution of 2024-07-29, RFC 8375."""
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy."""

    scheme: str
    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)
    """The value of Proxy-Authorization."""

    @property
    def origin(self) -> str:
        """`scheme://host:port`, for the log too."""
        return Endpoint(self.scheme, self.host, self.port).origin

    @property
    def fields(self) -> dict[str, str]:
        """The header fields of a request to the proxy itself."""
        return {PROXY_AUTHORIZATION: self.authorization} if self.authorization else {}


@dataclass(frozen=True, slots=True)
class ParentProxies:
    """The proxies for targets of either scheme, and the targets that need none."""

    https: Proxy | None = None
    http: Proxy | None = None
    direct: tuple[str, ...] = ()
    """The members of NO_PROXY, in lower case."""

    @classmethod
    def parse(cls, environment: Mapping[str, str]) -> "ParentProxies":
        """Read HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in either case. Raises SettingsError."""

        def found(*names: str) -> Proxy | None:
            for name in names:
                for spelling in (name, name.lower()):
                    if text := environment.get(spelling, "").strip():
                        return _parse_proxy(spelling, text)
            return None

        none = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
        members = tuple(filter(None, (member.strip().lower() for member in none.split(","))))
        return cls(found("HTTPS_PROXY", "ALL_PROXY"), found("HTTP_PROXY", "ALL_PROXY"), members)

    @property
    def all(self) -> tuple[Proxy, ...]:
        """Each proxy once."""
        return tuple(dict.fromkeys(proxy for proxy in (self.https, self.http) if proxy is not None))

    def without(self, proxy: Proxy) -> "ParentProxies":
        """Return the proxies except `proxy`."""
        https, http = (None if each == proxy else each for each in (self.https, self.http))
        return ParentProxies(https, http, self.direct)

    def of(self, scheme: str, host: str, port: int) -> Proxy | None:
        """Return the proxy for a target; None if it is reached directly."""
        proxy = self.https if scheme == "https" else self.http
        return None if proxy is None or self._is_direct(host.lower().rstrip("."), port) else proxy

    def _is_direct(self, host: str, port: int) -> bool:
        address = _address(host)
        if host == "localhost" or (address is not None and address.is_loopback):
            return True
        return any(_covers(member, host, address, port) for member in self.direct)


def check_remote(host: str) -> None:
    """Raise AddressRefused for a host that the parent is to resolve, if its spelling shows that it is not public.

    Where a public name leads is for the parent to judge: nobody else can resolve it.
    """
    if _address(host) is not None:
        check_address(host)
        return
    name = host.lower().rstrip(".")
    last = name.rpartition(".")[2]
    # A number as the last label is another spelling of an address (WHATWG URL section 3.5).
    numeric = last.isdecimal() or last.startswith("0x")
    if "." not in name or numeric or any(name == end or name.endswith(f".{end}") for end in _INSIDE):
        raise AddressRefused(f"expected a public name, got {host!r}")


def _parse_proxy(variable: str, text: str) -> Proxy:
    split = urlsplit(text if "://" in text else f"http://{text}")
    try:
        host, port = split.hostname, split.port
    except ValueError:
        host = port = None
    if split.scheme not in _PORTS or not host or split.path not in ("", "/") or split.query or split.fragment:
        # The value is not quoted: it may contain a password.
        raise SettingsError(
            f"environment variable {variable}: expected [http[s]://][user:password@]host[:port], "
            f"got something else ({split.scheme if '://' in text else 'no'} scheme, {len(text)} characters)"
        )
    authorization = None
    if split.username is not None:
        credentials = f"{unquote(split.username)}:{unquote(split.password or '')}"
        authorization = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    return Proxy(split.scheme, host, port or _PORTS[split.scheme], authorization)


def _covers(member: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int) -> bool:
    """Return whether a member of NO_PROXY covers this target: `*`, an address, a network, or a name with its
    subdomains (`.name`: the subdomains only). All but a network may have a port.
    """
    if member == "*":
        return True
    if "/" in member:
        try:
            network = ipaddress.ip_network(member, strict=False)
        except ValueError:
            return False
        return address is not None and address.version == network.version and address in network
    name, colon, suffix = member.rpartition(":")
    if not colon or _address(member) is not None or not suffix.isdecimal():
        name, suffix = member, ""
    if suffix and int(suffix) != port:
        return False
    name = name.strip("[]").removeprefix("*").rstrip(".")
    if address is not None:
        return _address(name) == address
    return host == name or host.endswith(name if name.startswith(".") else f".{name}")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
