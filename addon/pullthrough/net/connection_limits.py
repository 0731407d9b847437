"""Limits on the connections that clients may hold: per address, and for all together, on all ports.

Invariant: a busy connection is never closed to make room for another. Pure: knows a connection only by the function
that closes it.
"""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pullthrough.net.address_policy import unwrap

PER_ADDRESS: Final = 1024
"""Sixty Ollamas behind one router, with sixteen parts each."""
RESERVED: Final = 1024
"""File descriptors kept for upstream, the disk and ourselves; half of the limit if that is less."""
LEAST_RESERVED: Final = 192
"""The least that is kept: the event loop accepts a hundred connections in a row before one can be closed."""
LEAST: Final = 16
PER_CLIENT: Final = 2
"""Descriptors that a client may take: its connection, and the file or upstream connection that answers it."""


def most_connections(descriptors: int) -> int:
    """Return how many clients may be connected at once if the process may have so many descriptors."""
    reserved = max(LEAST_RESERVED, min(RESERVED, descriptors // 2))
    return max(LEAST, (descriptors - reserved) // PER_CLIENT)


@dataclass(eq=False, slots=True)
class Slot:
    """The place of one connection. The owner of the connection releases it when the connection ends."""

    key: str
    close: Callable[[], None]
    """Closes the connection to make room."""
    limits: "ConnectionLimits"
    busy: bool = False
    """Whether a request is being answered: then the connection is not closed to make room."""

    def release(self) -> None:
        """Give up the place. May be called twice."""
        self.limits.release(self)


@dataclass(slots=True)
class ConnectionLimits:
    """The places of all connections."""

    total: int
    per_address: int = PER_ADDRESS
    _by_key: dict[str, dict[Slot, None]] = field(default_factory=dict)
    """The slots of each client, the oldest first."""
    _count: int = 0

    def __len__(self) -> int:
        return self._count

    def take(self, address: str, close: Callable[[], None]) -> Slot | None:
        """Return a place for a new connection; if there is none, close one that is idle. None if all are busy.

        The one idle longest is closed: of the same address if that has too many, else of the address with the most.
        """
        key = client_key(address)
        if len(self._by_key.get(key, ())) >= self.per_address:
            leaving = _longest_waiting(self._by_key[key])
        elif self._count >= self.total:
            groups = sorted(self._by_key.values(), key=len, reverse=True)
            leaving = next(filter(None, map(_longest_waiting, groups)), None)
        else:
            return self._add(key, close)
        if leaving is None:
            return None
        self.release(leaving)
        leaving.close()
        return self._add(key, close)

    def release(self, slot: Slot) -> None:
        """Give up a slot, unless that was done before."""
        group = self._by_key.get(slot.key, {})
        if slot in group:
            del group[slot]
            self._count -= 1
        if not group:
            self._by_key.pop(slot.key, None)

    def _add(self, key: str, close: Callable[[], None]) -> Slot:
        slot = Slot(key, close, self)
        self._by_key.setdefault(key, {})[slot] = None
        self._count += 1
        return slot


def client_key(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or an IPv6 /64, within which a host chooses its addresses."""
    try:
        found = unwrap(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return address
    return str(found) if found.version == 4 else str(ipaddress.ip_network((int(found), 64), strict=False))


def _longest_waiting(group: dict[Slot, None]) -> Slot | None:
    return next((slot for slot in group if not slot.busy), None)
