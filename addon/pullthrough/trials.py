"""Which clients reach the blob server, found out by sending it one request of theirs.

Invariant: of a client of which nothing is known, at most one request is out on trial; one that did not arrive within
`WAIT_S` counts against its client, and no other verdict is made. Pure state: `now` is a parameter, in seconds of any
steady clock. Knows no address's meaning, request or server.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

WAIT_S: Final = 2.0
"""How long a client may take from the answer that sends it on to its request at the blob server."""
SETTLED_S: Final = 3600.0
"""How long a verdict counts."""
_NEVER: Final = float("-inf")


@dataclass(slots=True)
class _Client:
    reaches: bool = False
    """The last verdict."""
    until: float = _NEVER
    """When the verdict expires."""
    out: float | None = None
    """When the first request was sent on since the last one arrived."""


class Trials:
    """What is known of each client address."""

    def __init__(self, tell: Callable[[str, bool], None] = lambda _client, _reaches: None, *, limit: int = 10_000):
        """`tell` hears of each new verdict; of more than `limit` clients, those not seen for longest are forgotten."""
        self._tell = tell
        self._limit = limit
        self._clients: dict[str, _Client] = {}

    def permits(self, client: str, *, now: float) -> bool:
        """Whether the request that this client makes is to be sent on; then it counts as sent."""
        known = self._clients.pop(client, None) or _Client()
        self._clients[client] = known
        if len(self._clients) > self._limit:
            del self._clients[next(iter(self._clients))]
        self._judge(client, known, now)
        if now < known.until:
            if known.reaches and known.out is None:
                known.out = now
            return known.reaches
        if known.out is not None:
            return False
        known.out = now
        return True

    def arrived(self, client: str, *, now: float) -> None:
        """A request of this client has come to the blob server; one that nobody sent there proves nothing."""
        known = self._clients.get(client)
        if known is None:
            return
        self._judge(client, known, now)
        if known.out is None:
            return
        news = not known.reaches or now >= known.until
        known.reaches, known.until, known.out = True, now + SETTLED_S, None
        if news:
            self._tell(client, True)

    def _judge(self, client: str, known: _Client, now: float) -> None:
        if known.out is None or now < known.out + WAIT_S:
            return
        sent, known.out = known.out, None
        if known.reaches and sent < known.until:
            # Its user may have ended the pull just then: not more than a reason to try again.
            known.until = _NEVER
            return
        known.reaches, known.until = False, sent + WAIT_S + SETTLED_S
        if now < known.until:
            self._tell(client, False)
