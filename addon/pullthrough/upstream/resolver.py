"""Which addresses a name may lead to, for our own connections.

Invariant: a name is resolved only to addresses that the policy allows, all of them or none.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pullthrough.net.address_policy import AddressPolicy, check_elsewhere


@dataclass
class Named:
    """The endpoints of the option `upstream`, and their addresses: a parent cache redirects to its own address."""

    endpoints: set[tuple[str, int]]
    addresses: set[tuple[str, int]] = field(default_factory=set)


class AddressRules:
    """The rules for the addresses that a name may lead to."""

    def __init__(
        self,
        policy: AddressPolicy,
        intercepted: Collection[str],
        own: Callable[[], Collection[str]],
        own_ports: Callable[[], Collection[int]],
        named: Named,
        near: Collection[tuple[str, int]] = (),
    ) -> None:
        """`near` are the fleet's (host, port), allowed at any address; the collection may grow."""
        self._policy = policy
        self._intercepted = intercepted
        self._own = own
        self._own_ports = own_ports
        self._named = named
        self._near = near

    def check(self, host: str, port: int, addresses: Sequence[str]) -> None:
        """Raise AddressRefused if the name led to an address that we never connect to. For any thread."""
        if (host, port) in self._named.addresses:
            return
        if not self._policy.is_exempt(host, port) and (host, port) not in self._near:
            self._policy.judge(addresses, own=self._own())
        elif host in self._intercepted and port in self._own_ports():
            check_elsewhere(host, addresses, own=self._own())
        if (host, port) in self._named.endpoints:
            self._named.addresses.update([(address, port) for address in addresses])
