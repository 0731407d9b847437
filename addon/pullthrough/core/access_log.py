"""One log line per answered request, the same for every port, and counts of them.

Invariant: query strings and credentials are cut, because they are secret. The names of the fields beside a line's text
never change: scripts read them.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Final

from pullthrough.core.cache_status import CacheStatus, Outcome

_log = logging.getLogger(__name__)

SHOWN: Final = {"is_shown": True}
"""For the `extra` of a line that anybody may see on the status page: it names no model, no blob and no client."""

_USERINFO: Final = re.compile("//[^/]*@")
"""Name and password before a host (RFC 3986 section 3.2.1)."""


class RequestLog:
    """The requests of one daemon."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[Outcome, int]] = Counter()
        """Requests by outcome and status."""
        self.sent = 0
        """Blob bytes sent to clients."""
        self.on_sent: Callable[[str, int], None] = lambda client, count: None
        """Called with a client's address and the number of body bytes that were sent to it."""

    def answer(self, client: str, method: str, target: str, status: int, cache: CacheStatus) -> None:
        """Log a request that was answered at once."""
        fields = self._count(client, method, target, status, cache)
        _log.info("%s %s %s -> %d %s", client, method, fields["path"], status, cache, extra={"fields": fields})

    def transfer(
        self,
        client: str,
        method: str,
        target: str,
        status: int,
        cache: CacheStatus,
        *,
        sent: int,
        seconds: float,
        problem: str,
    ) -> None:
        """Log a body that was sent; `problem` is why it ended early, "" if it did not."""
        fields = self._count(client, method, target, status, cache)
        fields |= {"bytes": sent, "seconds": round(seconds, 3), "problem": problem}
        self.sent += sent
        self.on_sent(client, sent)
        _log.info(
            "%s %s %s -> %d, %d bytes in %.2f s%s; %s",
            client,
            method,
            fields["path"],
            status,
            sent,
            seconds,
            f", short: {problem}" if problem else "",
            cache,
            extra={"fields": fields},
        )

    def _count(self, client: str, method: str, target: str, status: int, cache: CacheStatus) -> dict[str, object]:
        self.answers[cache.outcome, status] += 1
        return {
            "event": "request",
            "client": client,
            "method": method,
            "path": _USERINFO.sub("//", target.partition("?")[0]),
            "status": status,
            "outcome": str(cache.outcome),
            "cache_status": str(cache),
        }
