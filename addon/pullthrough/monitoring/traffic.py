"""Bytes sent to clients and received from upstream, carried from the counters to the store's daily sums.

Invariant: counts reach the index once a minute, when somebody looks, and at the end; never during a request.
"""

import asyncio
import time
from typing import Final

from pullthrough.core.access_log import RequestLog
from pullthrough.net.pull_history import PullHistory
from pullthrough.recording.plan import Counters
from pullthrough.recording.pulls import Pulls
from pullthrough.store.ledger import Ledger
from pullthrough.store.usage import Usage

WRITE_S: Final = 60.0


class Traffic:
    """The traffic of one daemon."""

    def __init__(
        self, ledger: Ledger, requests: RequestLog, counters: Counters, pulls: Pulls, history: PullHistory
    ) -> None:
        self._ledger = ledger
        self._requests = requests
        self._counters = counters
        self._pulls = pulls
        self._history = history
        self._usage = Usage(ledger.days)

    def count(self) -> None:
        """Bring the store's daily sums up to date."""
        self._pulls.expire(now=time.monotonic())
        self._history.expire(now=time.time())
        self._usage.count_up_to(served=self._requests.sent, fetched=self._counters.upstream_bytes, now=time.time())
        self._ledger.put_days(self._usage.take())

    async def keep_counting(self) -> None:
        """Count once a minute; never returns."""
        while True:
            await asyncio.sleep(WRITE_S)
            self.count()
