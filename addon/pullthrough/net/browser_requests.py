"""Recognition of requests that a web page makes through somebody's browser: no page has any business with models.

Any page that a user opens can have the browser ask a server on the user's network, and so have models recorded,
gigabyte after gigabyte. Hits are no better: their speed tells what is stored.

Invariant: a request of a model client (Ollama, curl, OCI clients) is never taken for a page's.
"""

from collections.abc import Mapping
from typing import Final

_OWN: Final = ("same-origin", "none")
"""Sec-Fetch-Site of requests by our own pages, or by a user who types an address (Fetch Metadata, section 2.3)."""


def asks_for_page(headers: Mapping[str, str]) -> bool:
    """Return whether a page that is not ours made the request with these fields (lower-case names).

    Referer proves nothing: Go sends one with each request that follows a redirect. Browsers send Sec-Fetch-Site to
    https and to loopback only; elsewhere they are known by their User-Agent.
    """
    host = headers.get("host", "").lower()
    site = headers.get("sec-fetch-site")
    if site is not None and site not in _OWN:
        return True
    if "origin" in headers and headers["origin"].lower() != f"http://{host}":
        return True
    return site is None and headers.get("user-agent", "").startswith("Mozilla/")
