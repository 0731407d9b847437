"""What this machine is called by those who ask it for a page.

Invariant: a name that a stranger could have led here (DNS rebinding) is none of ours; an address is nobody's name.
"""

import ipaddress
import socket
from collections.abc import Set as AbstractSet
from urllib.parse import urlsplit

from pullthrough.config.settings import Endpoint


def own_names(advertise: Endpoint | None) -> frozenset[str]:
    """Return the names that are ours: this machine's (by mDNS too, RFC 6762), localhost, and what we are told to
    advertise.
    """
    machine = socket.gethostname().lower()
    names = {"localhost", machine, f"{machine.partition('.')[0]}.local"}
    return frozenset(names | ({advertise.host} if advertise is not None else set()))


def is_ours(host: str | None, names: AbstractSet[str]) -> bool:
    """Return whether a Host field names us or gives an address. Without one, which is HTTP/1.0, no browser has
    asked.
    """
    if host is None:
        return True
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        if name not in names:
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return not set(host) & set("@/?#\\")
