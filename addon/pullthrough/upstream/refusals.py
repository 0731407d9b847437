"""Tells a registry's own refusals from a page that answers in its place: a captive portal, a web filter, a gateway.

Invariant: a status alone proves nothing. Pure: knows status, fields and the first bytes of a body.
"""

from collections.abc import Mapping
from typing import Final

from pullthrough.core.bounded_json import loads

REFUSAL_LIMIT: Final = 64 << 10
"""Bytes of a refusal's body that are looked at; a registry's has a few hundred."""

_KEYS: Final = frozenset({"errors", "message", "error"})
"""The JSON of a refusal has one of these (OCI distribution-spec, "Error codes"; client2; hf.co)."""
_PLAIN: Final = frozenset({404, 412})
"""Statuses that Ollama's registry sends with plain text: its router's "404 page not found", and "client too old"."""


def media_type(headers: Mapping[str, str]) -> str:
    """Return the media type that a response claims, in lower case and without parameters; "" where there is none."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def is_page(headers: Mapping[str, str]) -> bool:
    """Return whether the response is for a browser. No registry sends HTML, and a challenge is never the registry's."""
    return media_type(headers) in ("text/html", "application/xhtml+xml") or "cf-mitigated" in headers


def is_refusal(status: int, headers: Mapping[str, str], body: bytes, *, head: bool = False) -> bool:
    """Return whether a response of 400 or above has the form of a registry's; one to a HEAD is known by its fields."""
    if is_page(headers):
        return False
    if "WWW-Authenticate" in headers:
        return True
    kind = media_type(headers)
    if status in _PLAIN and kind == "text/plain":
        return True
    is_json = kind == "application/json" or kind.endswith("+json")
    if head:
        return is_json
    return (is_json or kind in ("", "text/plain")) and _is_error(body)


def described(status: int, headers: Mapping[str, str]) -> str:
    """Return status and media type, for people, and nothing of the page's text."""
    kind = media_type(headers)
    challenge = ", a challenge for browsers" if "cf-mitigated" in headers else ""
    return f"{status} {kind[:60] or 'without a type'}{challenge}"


def _is_error(body: bytes) -> bool:
    try:
        document = loads(body, limit=REFUSAL_LIMIT)
    except ValueError:
        return False
    return isinstance(document, dict) and not _KEYS.isdisjoint(document)
