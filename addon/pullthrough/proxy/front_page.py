"""Where a browser is led that asks the proxy's own port for a page.

Invariant: programs get what they get without this: only a GET of `/` that accepts HTML, from this machine by one of its
addresses or names, is led anywhere.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from mitmproxy import http

from pullthrough.config.settings import Settings
from pullthrough.net.own_names import own_names
from pullthrough.pki.client_setup import clients_origin
from pullthrough.runtime.platform import own_addresses


def front_page(request: http.Request, settings: Settings, ports: Callable[[], AbstractSet[int]]) -> str | None:
    """Return the address of the front page for a browser at one of our own `ports`; None for any other request."""
    asks = request.method == "GET" and request.path == "/" and "text/html" in request.headers.get("Accept", "")
    if not (asks and settings.listen and request.scheme == "http" and request.port in ports()):
        return None
    host = request.host.lower()
    if host not in own_names(settings.advertise) and host not in own_addresses():
        return None
    return f"{clients_origin(settings, host)}/"
