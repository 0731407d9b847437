"""Whether a page in somebody's browser asks, which has no business with models.

Any page that a user opens can have the browser ask a server of the user's network: so it could have models recorded,
gigabyte after gigabyte. Hits are no better: how fast they come tells what is stored.

Invariant: what a client of models sends (Ollama, curl, OCI clients) is never taken for a page.
"""

from collections.abc import Mapping
from typing import Final

_OWN: Final = ("same-origin", "none")
"""Sec-Fetch-Site of what a page of ours asks for, or a user by typing an address (Fetch Metadata, section 2.3)."""


def asks_for_page(headers: Mapping[str, str]) -> bool:
    """Return whether the request with these fields, by lower-case name, is a browser's for a page that is not ours.

    Referer says nothing: Go sends one with each request that follows a redirect. A browser tells Sec-Fetch-Site to
    https and to loopback only; elsewhere it is known by its User-Agent.
    """
    host = headers.get("host", "").lower()
    site = headers.get("sec-fetch-site")
    if site is not None and site not in _OWN:
        return True
    if "origin" in headers and headers["origin"].lower() != f"http://{host}":
        return True
    return site is None and headers.get("user-agent", "").startswith("Mozilla/")
