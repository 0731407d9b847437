"""Which clients do not reach where they were redirected.

A client that retries the same part here did not reach the redirect target; one that reached it does not come back.

Invariant: a client that came back is not redirected for SETTLED_S. Pure state: `now` is a parameter, in seconds of any
steady clock.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

RETURN_S: Final = 120.0
"""How long after a redirect a request for the same part counts as a return: Go gives up dialling after 30 s."""
SETTLED_S: Final = 3600.0
PARTS: Final = 64
"""How many parts are remembered per client: as many as an Ollama v0.3.6 had in flight."""


@dataclass(slots=True)
class _Client:
    sent: dict[Hashable, float] = field(default_factory=dict)
    """When each part was last redirected."""
    refused_until: float = float("-inf")


class RedirectFailures:
    """What is known about each client address."""

    def __init__(self, on_return: Callable[[str], None] = lambda _client: None, *, limit: int = 10_000) -> None:
        """`on_return` is called with each client that came back; beyond `limit` clients the oldest are forgotten."""
        self._on_return = on_return
        self._limit = limit
        self._clients: dict[str, _Client] = {}

    def permits(self, client: str, part: Hashable, *, now: float) -> bool:
        """Return whether to redirect the client's request for `part`; if so, the part counts as redirected."""
        known = self._clients.pop(client, None) or _Client()
        self._clients[client] = known
        if len(self._clients) > self._limit:
            del self._clients[next(iter(self._clients))]
        if now < known.refused_until:
            return False
        if now < known.sent.pop(part, float("-inf")) + RETURN_S:
            known.sent.clear()
            known.refused_until = now + SETTLED_S
            self._on_return(client)
            return False
        known.sent[part] = now
        if len(known.sent) > PARTS:
            del known.sent[next(iter(known.sent))]
        return True
