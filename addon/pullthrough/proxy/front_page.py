"""Answers for clients that take the proxy's own port for a server's: a browser is redirected, a program is told.

Invariant: a request to another server through the proxy is never answered here: an answered one is for a port that
mitmproxy listens on and, if that is port 80, for a name of this machine. Only a GET of `/` that accepts HTML is
redirected.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from mitmproxy import http

from pullthrough.config.parsers import is_address, parse_host
from pullthrough.config.settings import Endpoint, Settings
from pullthrough.net.own_names import own_names
from pullthrough.pki.client_setup import clients_host, clients_origin
from pullthrough.runtime.platform import own_addresses


def front_page(request: http.Request, settings: Settings, ports: Callable[[], AbstractSet[int]]) -> str | None:
    """Return the address of the front page for a browser at one of our own `ports`; None for any other request."""
    asks = request.method == "GET" and request.path == "/" and "text/html" in request.headers.get("Accept", "")
    if not (asks and settings.listen and request.scheme == "http" and request.port in ports()):
        return None
    host = request.host.lower()
    return f"{clients_origin(settings, host)}/" if _is_own(host, settings) else None


def guidance(request: http.Request, settings: Settings, ports: Callable[[], AbstractSet[int]]) -> http.Response | None:
    """Return the answer to a request that takes one of our own `ports` for a server's; None for any other request."""
    host = request.host.lower()
    # mitmproxy does not keep the form in which the server was named; requests for another server's port 80 are usual.
    if request.scheme != "http" or request.port not in ports() or (request.port == 80 and not _is_own(host, settings)):
        return None
    try:
        host = host if is_address(host) else parse_host(host)
    except ValueError:
        host = clients_host(settings)
    proxy = Endpoint("http", host, request.port).origin
    where = f"pages are at {clients_origin(settings, host)}/" if settings.listen else "pages are off (listen=off)"
    text = f"This port is the proxy of an ollama-cache, for HTTPS_PROXY={proxy}, and serves no pages: {where}\n"
    body = text.encode() if request.method != "HEAD" else b""
    response = http.Response.make(421, body, {"Content-Type": "text/plain", "Cache-Control": "no-store"})
    response.reason = f"Misdirected Request: this port is a proxy, {where}"
    return response


def _is_own(host: str, settings: Settings) -> bool:
    return host in own_names(settings.advertise) or host in own_addresses()
