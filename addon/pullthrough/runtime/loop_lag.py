"""How late the event loop is: everything else waits at least that long, and no peer counts as silent meanwhile.

While this watches, the loop's clock leaves out the time in which the process did not run (`clock`). Invariant: it costs
one short timer, whatever else runs.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Final

from pullthrough.core.access_log import SHOWN
from pullthrough.runtime.clock import RunningTime

_log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.05
SAMPLES: Final = 12_000
"""Ten minutes."""

ALARM_S: Final = 1.0
"""Clients of v0.1.23-v0.5.7 give up a part after 5 s without a byte; the operator should know well before that."""


class LoopLag:
    """Samples of the last ten minutes, in seconds."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        loop = asyncio.get_running_loop()
        # An instance attribute shadows the method of its class.
        vars(loop)["time"] = RunningTime()
        self._task = loop.create_task(self._watch(), name="loop lag")

    async def close(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            vars(task.get_loop()).pop("time", None)
            await asyncio.wait([task])
            _log.debug("event loop lag: %s", self)

    def quantiles(self, *parts: float) -> list[float]:
        """Return the quantiles of the lag (seconds); 0 if there are no samples."""
        ordered = sorted(self._samples) or [0.0]
        return [ordered[min(len(ordered) - 1, int(len(ordered) * part))] for part in parts]

    def __str__(self) -> str:
        median, late, worst = (1000 * seconds for seconds in self.quantiles(0.5, 0.99, 1.0))
        return f"median {median:.1f} ms, p99 {late:.1f} ms, worst {worst:.1f} ms"

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            lag = max(0.0, time.monotonic() - due)
            self._samples.append(lag)
            if lag > ALARM_S:
                _log.warning("the event loop was held up for %.1f s", lag, extra=SHOWN)
