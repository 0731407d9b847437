"""Which clients do not reach where they are sent, told by their coming back for the same part.

Who is served elsewhere is never heard of again, so a return is all that can be known.

Invariant: a client that came back is not sent on for SETTLED_S. Pure state: `now` is a parameter, in seconds of any
steady clock. Knows no address's meaning, request or server.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

RETURN_S: Final = 120.0
"""How long after it was sent on a request for the same part is a return: a dial takes Go 30 s to give up."""
SETTLED_S: Final = 3600.0
PARTS: Final = 64
"""What is remembered of one client: as many as an Ollama of v0.3.6 had in flight."""


@dataclass(slots=True)
class _Client:
    sent: dict[Hashable, float] = field(default_factory=dict)
    """When each part was last sent on."""
    refused_until: float = float("-inf")


class Returns:
    """What is known of each client address."""

    def __init__(self, tell: Callable[[str], None] = lambda _client: None, *, limit: int = 10_000) -> None:
        """`tell` hears of each that has come back; of more than `limit` clients, those seen first are forgotten."""
        self._tell = tell
        self._limit = limit
        self._clients: dict[str, _Client] = {}

    def permits(self, client: str, part: Hashable, *, now: float) -> bool:
        """Whether the request that this client makes for `part` is to be sent on; then it counts as sent."""
        known = self._clients.pop(client, None) or _Client()
        self._clients[client] = known
        if len(self._clients) > self._limit:
            del self._clients[next(iter(self._clients))]
        if now < known.refused_until:
            return False
        if now < known.sent.pop(part, float("-inf")) + RETURN_S:
            known.sent.clear()
            known.refused_until = now + SETTLED_S
            self._tell(client)
            return False
        known.sent[part] = now
        if len(known.sent) > PARTS:
            del known.sent[next(iter(known.sent))]
        return True
