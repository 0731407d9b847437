"""The pages of the blob server's port: what it gives besides models, by path.

Invariant: a page is given only to who asks for it by an address or by a name that is ours. A browser's visitor could
else be led here by a name that a stranger's site owns, and the site would read the answer (DNS rebinding). No page is
framed, sniffed or kept.
"""

import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from pullthrough.config.settings import Endpoint

_log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]
"""Makes the response to a GET; that to a HEAD is the same without its body."""

FIELDS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""On every page that does not say otherwise itself."""


class Pages:
    """A table of paths. Filled before the port is opened."""

    def __init__(self, advertise: Endpoint | None) -> None:
        """`advertise` as in Settings: one more name that is ours."""
        self._names = own_names(advertise)
        self._handlers: dict[str, Handler] = {}

    def add(self, path: str, handler: Handler) -> None:
        """Give `path`, which has no query, to `handler`."""
        self._handlers[path] = handler

    async def answer(self, request: web.BaseRequest) -> web.Response | None:
        """The response, to be sent by the caller; None where no page is at that path."""
        path = request.raw_path.partition("?")[0]
        handler = self._handlers.get(path)
        if handler is None:
            return None
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            response = web.Response(status=405, headers={hdrs.ALLOW: "GET, HEAD"})
        elif not is_ours(host := request.headers.get(hdrs.HOST), self._names):
            response = web.Response(status=421, text=f"expected an address or a name of this cache, got {host!r}\n")
        else:
            response = await handler(request)
        for name, value in FIELDS.items():
            response.headers.setdefault(name, value)
        # Whoever watches a cache asks every few seconds.
        _log.debug("%s %s %s -> %d", request.remote, request.method, path, response.status)
        return response


def own_names(advertise: Endpoint | None) -> frozenset[str]:
    """The names that are ours: this machine's (by mDNS too, RFC 6762), localhost, and what we are told to advertise."""
    machine = socket.gethostname().lower()
    names = {"localhost", machine, f"{machine.partition('.')[0]}.local"}
    return frozenset(names | ({advertise.host} if advertise is not None else set()))


def is_ours(host: str | None, names: AbstractSet[str]) -> bool:
    """Whether a Host field names us or gives an address. Without one, which is HTTP/1.0, no browser has asked."""
    if host is None:
        return True
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        if name not in names:
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return "@" not in host
