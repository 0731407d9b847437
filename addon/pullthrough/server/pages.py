"""The pages of the blob server's port: what it gives besides models, by path.

Invariant: a page is given only to who asks for it by an address or by a name that is ours. A browser's visitor could
else be led here by a name that a stranger's site owns, and the site would read the answer (DNS rebinding). No page is
framed, sniffed or kept.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web

from pullthrough.config.settings import Endpoint
from pullthrough.net.own_names import is_ours, own_names

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
        """Return the response, to be sent by the caller; None where no page is at that path."""
        path = request.raw_path.partition("?")[0]
        handler = self._handlers.get(path)
        if handler is None:
            return None
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            response = web.Response(status=405, headers={hdrs.ALLOW: "GET, HEAD"})
        elif not is_ours(host := request.headers.get(hdrs.HOST), self._names):
            told = f"this cache is not known as {host!r}: ask by its address, or let the option advertise name it so\n"
            response = web.Response(status=421, text=told)
        else:
            response = await handler(request)
        for name, value in FIELDS.items():
            response.headers.setdefault(name, value)
        # Whoever watches a cache asks every few seconds.
        _log.debug("%s %s %s -> %d", request.remote, request.method, path, response.status)
        return response
