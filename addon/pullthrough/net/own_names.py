"""The names by which others ask this machine for a page.

Invariant: a name that a stranger could have pointed here (DNS rebinding) is not ours; an address always is.
"""

import ipaddress
import socket
from collections.abc import Set as AbstractSet
from urllib.parse import urlsplit

from pullthrough.config.settings import Endpoint


def own_names(advertise: Endpoint | None) -> frozenset[str]:
    """Return our names: this machine's (and for mDNS, RFC 6762), localhost, and the one that is advertised."""
    machine = socket.gethostname().lower()
    names = {"localhost", machine, f"{machine.partition('.')[0]}.local"}
    return frozenset(names | ({advertise.host} if advertise is not None else set()))


def is_ours(host: str | None, names: AbstractSet[str]) -> bool:
    """Return whether a Host field has one of our names or an address. No browser omits the field, as HTTP/1.0 may."""
    if host is None:
        return True
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        if name not in names:
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return not set(host) & set("@/?#\\")
